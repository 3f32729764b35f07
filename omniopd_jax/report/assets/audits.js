// The audit viewer: a list of responses, one response with its entropy as shading, one chunk with the teacher's texts.

const ROW_HEIGHT = 54;
const HEAT_TOP = 3; // nats at which the shading is full
const unpacked = new Map();

/** The JSON of one compressed piece of the page; a few pieces stay in memory. */
async function piece(index) {
  if (!unpacked.has(index)) {
    const packed = document.getElementById(`piece-${index}`);
    if (!packed) throw new Error("A part of this file is missing: it was cut off when it was copied.");
    if (typeof DecompressionStream === "undefined") throw new Error("This browser is too old to unpack the audits; any of 2023 or later can.");
    const bytes = Uint8Array.from(atob(packed.textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(index, JSON.parse(await new Response(stream).text()));
    if (unpacked.size > 12) unpacked.delete([...unpacked.keys()].find((key) => key !== 0 && key !== index));
  }
  return unpacked.get(index);
}

const ORDERS = {
  step: ["In order of steps", (c) => (a, b) => c.step[a] - c.step[b] || c.row[a] - c.row[b]],
  unlike: ["Least like the teacher", (c) => by(c.similarity, 1)],
  like: ["Most like the teacher", (c) => by(c.similarity, -1)],
  unsure: ["Highest entropy", (c) => by(c.entropy, -1)],
  long: ["Longest", (c) => by(c.tokens, -1)],
};

function by(column, sign) {
  return (a, b) => (column[a] === null) - (column[b] === null) || sign * (column[a] - column[b]) || a - b;
}

async function auditViewer(parent, settings) {
  const { prompts, columns } = await piece(0);
  const total = columns.step.length;
  const steps = [...new Set(columns.step)].sort((a, b) => a - b);
  const state = { shown: [], at: -1, chosen: null, response: null, slot: 0, ticket: 0 };

  const stepSelect = el("select", { "aria-label": "Step", onchange: () => refilter() }, el("option", { value: "" }, "All steps"),
    ...steps.map((step) => el("option", { value: step }, `Step ${count(step)}`)));
  const move = (by) => {
    stepSelect.selectedIndex = Math.min(steps.length, Math.max(1, stepSelect.selectedIndex + by));
    refilter();
  };
  const search = el("input", { type: "search", placeholder: "Find in prompts", "aria-label": "Find in prompts", oninput: () => refilter() });
  const order = el("select", { "aria-label": "Order", onchange: () => refilter() },
    ...Object.entries(ORDERS).map(([key, [label]]) => el("option", { value: key }, label)));
  const found = el("p", { class: "count", "aria-live": "polite" });
  const list = el("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": "Responses" });
  const runway = el("div");
  list.append(runway);
  const response = el("section", { class: "pane response card", "aria-label": "Response" });
  const detail = el("section", { class: "pane detail card", "aria-label": "Audited chunk" });
  parent.append(el("div", { class: "viewer" },
    el("div", { class: "pane picker card" },
      el("div", { class: "steps" },
        el("button", { "aria-label": "Previous step", onclick: () => move(-1) }, "‹"), stepSelect,
        el("button", { "aria-label": "Next step", onclick: () => move(1) }, "›")),
      search, order, found, list),
    response, detail));

  function refilter() {
    const step = stepSelect.value === "" ? null : Number(stepSelect.value), words = search.value.trim().toLowerCase();
    const fits = words ? prompts.map(({ id, label }) => `${id}\n${label}`.toLowerCase().includes(words)) : null;
    const places = [];
    for (let i = 0; i < total; i++) if ((step === null || columns.step[i] === step) && (!fits || fits[columns.prompt[i]])) places.push(i);
    state.shown = places.sort(ORDERS[order.value][1](columns));
    found.textContent = places.length === total ? plural(total, "response") : `${count(places.length)} of ${plural(total, "response")}`;
    runway.style.height = `${places.length * ROW_HEIGHT}px`;
    list.scrollTop = 0;
    state.at = places.indexOf(state.chosen);
    if (state.at < 0 && places.length) choose(0);
    else { reveal(); paint(); }
  }

  // Only the rows in sight are in the document.
  let painted = "";
  function paint() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
    const last = Math.min(state.shown.length, Math.ceil((list.scrollTop + (list.clientHeight || 420)) / ROW_HEIGHT) + 4);
    const key = [first, last, state.at, state.chosen, search.value, stepSelect.value, order.value].join();
    if (key === painted) return;
    painted = key;
    runway.replaceChildren();
    for (let place = first; place < last; place++) runway.append(row(place));
    if (state.at >= first && state.at < last) list.setAttribute("aria-activedescendant", `row-${state.shown[state.at]}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function row(place) {
    const i = state.shown[place], similarity = columns.similarity[i], prompt = prompts[columns.prompt[i]];
    const node = el("div", { class: "row", role: "option", id: `row-${i}`, "aria-selected": String(place === state.at),
      "aria-setsize": state.shown.length, "aria-posinset": place + 1, onclick: () => choose(place) },
      show(el("div", { class: "label", dir: "auto" }), prompt.label || prompt.id || "(no prompt in the log)"),
      el("div", { class: "about" }, el("span", {}, `step ${columns.step[i]} · #${columns.row[i]}`),
        ...(similarity === null ? [] : [meter(similarity), el("span", { title: "mean similarity of its chunks" }, similarity.toFixed(2))])));
    node.style.top = `${place * ROW_HEIGHT}px`;
    return node;
  }

  function reveal() {
    if (state.at < 0) return;
    const top = state.at * ROW_HEIGHT, height = list.clientHeight;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW_HEIGHT > list.scrollTop + height) list.scrollTop = top + ROW_HEIGHT - height;
  }

  list.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW_HEIGHT) - 1), end = state.shown.length - 1;
    const to = { ArrowDown: state.at + 1, ArrowUp: state.at - 1, Home: 0, End: end, PageDown: state.at + page, PageUp: state.at - page }[event.key];
    if (to === undefined || end < 0) return;
    event.preventDefault();
    choose(Math.min(end, Math.max(0, to)));
  });

  function choose(place, slot = 0) {
    state.at = place;
    reveal();
    paint();
    return open(state.shown[place], slot);
  }

  /** Opens response `i` of the index, whatever the list shows. */
  async function open(i, slot = 0) {
    const ticket = ++state.ticket;
    state.chosen = i;
    try {
      const responses = await piece(columns.piece[i]);
      if (ticket !== state.ticket) return; // another one was chosen meanwhile
      state.response = responses[columns.place[i]];
      response.replaceChildren(...responsePane(state.response));
      openChunk(Math.min(slot, Math.max(0, state.response.audits.length - 1)));
    } catch (error) {
      response.replaceChildren(el("p", { class: "empty" }, String(error.message || error)));
      detail.replaceChildren();
    }
  }

  function openChunk(place, isByUser = false) {
    const { audits } = state.response;
    state.slot = place;
    detail.scrollTop = 0;
    detail.replaceChildren(...(audits.length ? chunkPane(audits, place, settings, (to) => { openChunk(to); detail.querySelector("[aria-selected=true]").focus(); })
      : [el("p", { class: "empty" }, "No chunk of this response was audited.")]));
    response.querySelectorAll(".chunk").forEach((mark) => mark.setAttribute("aria-pressed", String(Number(mark.dataset.place) === place)));
    const mark = response.querySelector(`.chunk[data-place="${place}"]`), box = response.querySelector(".tokens");
    if (mark && box && !isByUser) {
      const top = mark.offsetTop - box.offsetTop;
      if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 60) box.scrollTop = Math.max(0, top - 60);
    }
    if (isByUser && detail.getBoundingClientRect().top > window.innerHeight - 80) detail.scrollIntoView({ block: "start" });
  }

  function responsePane(data) {
    const same = [];
    for (let i = 0; i < total; i++) if (columns.prompt[i] === columns.prompt[state.chosen]) same.push(i);
    const words = [plural(data.num_tokens, "token"), data.is_finished ? "ended by the student" : "cut off at the length limit"];
    if (columns.entropy[state.chosen] !== null) words.push(`mean entropy ${number(columns.entropy[state.chosen], "nats")}`);
    const parts = [
      el("h3", {}, `Step ${count(data.step)}, response ${data.row}`),
      el("p", { class: "where" }, show(el("bdi"), clip(data.prompt_id).text), data.has_rollout ? ` · ${words.join(" · ")}` : ""),
    ];
    if (!data.has_rollout) return [...parts, el("p", { class: "note" }, "The response itself is not in rollouts.jsonl; only its chunks are.")];
    const prompt = block(data.prompt, "prompt");
    prompt.setAttribute("tabindex", "0");
    prompt.setAttribute("role", "group");
    prompt.setAttribute("aria-label", "Prompt");
    parts.push(el("p", { class: "label-line" }, "Prompt"), prompt);
    if (clip(data.answer).text) parts.push(el("p", { class: "label-line" }, "Reference answer"), block(data.answer));
    const scale = el("span", { class: "scale" }, "sure", el("i"), `unsure (${HEAT_TOP} nats)`);
    const readout = el("p", { class: "readout", "aria-live": "polite" }, "Point at a token, or use the arrow keys, to read its entropy.");
    parts.push(el("div", { class: "label-line" }, "Response", scale), tokenBox(data, readout), readout);
    parts.push(same.length > 1 ? samePrompt(same) : el("p", { class: "where" }, "This prompt came up only once in the logged steps."));
    return parts;
  }

  function tokenBox(data, readout) {
    const box = el("div", { class: "text tokens", dir: "auto", tabindex: "0", role: "group", "aria-label": "Response, token by token" });
    // Word-level tokenizers leave the white space out of their tokens; a gap stands for it.
    const letters = data.tokens.map((token) => clip(token).text).join("");
    if (data.tokens.length > 2 && !/\s|[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]/u.test(letters)) box.classList.add("bare");
    const starts = new Map(data.audits.map((audit, place) => [audit.start, place]));
    const spans = [];
    let parentNode = box, end = -1, badge = null;
    data.tokens.forEach((token, t) => {
      if (t === end) { parentNode = box; end = -1; }
      const place = starts.get(t);
      if (place !== undefined && end < 0) {
        const audit = data.audits[place];
        end = t + Math.max(1, audit.num_tokens || 1);
        badge = el("b", { class: "badge" }, String(place + 1));
        parentNode = el("span", { class: "chunk", role: "button", tabindex: "0", "data-place": place, "aria-pressed": "false",
          "aria-label": `Open chunk ${place + 1} of ${data.audits.length}` }, badge);
        box.append(parentNode);
      }
      const { text, more } = clip(token), span = el("span", { class: "t" });
      const isLast = t === data.num_tokens - 1;
      if (text === "") { if (isLast && data.is_finished) span.append(el("span", { class: "ctrl" }, "END")); }
      else show(span, text);
      if (more) span.append(cutNote(more));
      const entropy = data.entropy[t];
      if (entropy > 0) span.style.background = `rgba(var(--heat), calc(var(--heat-most) * ${Math.min(1, Math.sqrt(entropy / HEAT_TOP)).toFixed(3)}))`;
      span.dataset.t = t;
      spans.push(span);
      // The number stays on the line of the token that it marks.
      if (badge && text.length <= 24) parentNode.append(el("span", { class: "first" }, badge, span));
      else parentNode.append(span);
      badge = null;
    });
    if (data.num_tokens > data.tokens.length)
      box.append(el("span", { class: "cut", dir: "ltr" }, `… ${count(data.num_tokens - data.tokens.length)} more tokens are in rollouts.jsonl, not on this page.`));

    let now = null;
    const read = (t) => {
      if (now !== null) spans[now].classList.remove("now");
      now = t;
      spans[t].classList.add("now");
      const logprob = data.logprob[t];
      const words = [`token ${t}`];
      if (data.entropy[t] !== null && data.entropy[t] !== undefined) words.push(`entropy ${number(data.entropy[t], "nats")}`);
      if (logprob !== null && logprob !== undefined) words.push(`probability ${number(Math.exp(logprob), "share")}`);
      readout.replaceChildren(show(el("bdi", { class: "text" }), JSON.stringify(clip(data.tokens[t]).text.slice(0, 40))), " · " + words.join(" · "));
    };
    box.addEventListener("mouseover", (event) => {
      const span = event.target.closest(".t");
      if (span) read(Number(span.dataset.t));
    });
    box.addEventListener("click", (event) => {
      const mark = event.target.closest(".chunk");
      if (mark) openChunk(Number(mark.dataset.place), true);
    });
    box.addEventListener("keydown", (event) => {
      const mark = event.target.closest(".chunk");
      if (mark && (event.key === "Enter" || event.key === " ")) {
        event.preventDefault();
        openChunk(Number(mark.dataset.place), true);
      }
      const to = { ArrowRight: (now ?? -1) + 1, ArrowLeft: (now ?? 1) - 1 }[event.key];
      if (to === undefined || !spans.length) return;
      event.preventDefault();
      read(Math.min(spans.length - 1, Math.max(0, to)));
      const top = spans[now].offsetTop - box.offsetTop;
      if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 30) box.scrollTop = top - box.clientHeight / 2;
    });
    return box;
  }

  function samePrompt(same) {
    const first = same[0];
    const body = el("tbody");
    for (const i of same.slice(0, 60)) {
      const isHere = i === state.chosen;
      body.append(el("tr", {}, el("td", {}, isHere ? el("b", {}, `${columns.step[i]} · #${columns.row[i]}`)
        : el("button", { "aria-label": `Open step ${columns.step[i]}, response ${columns.row[i]}`, onclick: () => { state.at = state.shown.indexOf(i); reveal(); paint(); open(i); } },
          `${columns.step[i]} · #${columns.row[i]}`)),
      el("td", { class: "n" }, columns.logprob[i] === null ? "–" : plain(columns.logprob[i])),
      el("td", { class: "n" }, i === first || columns.logprob[i] === null || columns.logprob[first] === null ? "" : signed(+(columns.logprob[i] - columns.logprob[first]).toFixed(3))),
      el("td", { class: "n" }, columns.similarity[i] === null ? "–" : columns.similarity[i].toFixed(2)),
      el("td", { class: "n" }, count(columns.tokens[i]))));
    }
    const head = ["Step", "log-prob./token", "change", "similarity", "tokens"];
    return el("div", { class: "same" }, el("p", { class: "label-line" }, "The same prompt through the run"),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...head.map((name, i) => el("th", { class: i ? "n" : null, scope: "col" }, name)))), body)),
      same.length > 60 ? el("p", { class: "note" }, `and ${count(same.length - 60)} more`) : null);
  }

  state.chosen = Math.max(0, columns.chunks.findIndex((chunks) => chunks > 0)); // something to see at first
  refilter();
  choose(state.at);
}

/** One audited chunk: what went into its target, the teacher's texts, the student's branches, what came later. */
function chunkPane(audits, place, settings, openChunk) {
  const audit = audits[place];
  const tabs = el("div", { class: "tabs", role: "tablist", "aria-label": "Audited chunks" },
    ...audits.map((other, i) => {
      const mean = other.count ? other.score_sum / other.count : null;
      return el("button", { role: "tab", "aria-selected": String(i === place), tabindex: i === place ? "0" : "-1", onclick: () => openChunk(i),
        "aria-label": `Chunk ${i + 1}, ${mean === null ? "no answer" : `similarity ${mean.toFixed(2)}`}` }, String(i + 1),
      mean === null ? el("span", { class: "soft" }, "–") : meter(mean));
    }));
  tabs.addEventListener("keydown", (event) => {
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: audits.length - 1 }[event.key];
    if (to === undefined || to < 0 || to >= audits.length) return;
    event.preventDefault();
    openChunk(to);
  });
  const parts = [tabs, el("h3", {}, `Chunk ${place + 1} of ${audits.length}`)];
  const where = [];
  if (audit.start !== null) where.push(audit.num_tokens ? `tokens ${audit.start} to ${audit.start + audit.num_tokens - 1}` : `from token ${audit.start}`);
  if (audit.entropy !== null) where.push(`entropy ${number(audit.entropy, "nats")} where it starts`);
  if (audit.moved) where.push(`compared from ${plural(audit.moved, "token")} earlier, where a character begins`);
  if (audit.is_end) where.push("the answer ends in it");
  parts.push(el("p", { class: "where" }, where.join(" · ")));
  parts.push(sums(audit, settings));

  const student = clip(audit.chunk);
  parts.push(el("h4", {}, "The student wrote"), block(audit.chunk, "student-text"));
  parts.push(...continuations(audit, student));
  if (audit.branches.length) parts.push(...branches(audit));
  if (audit.repeats.length) parts.push(...repeats(audit));
  return parts;
}

function sums(audit, settings) {
  const rows = [];
  const add = (name, value, small) => rows.push(el("div", {}, el("dt", {}, name), el("dd", {}, value, small ? el("small", {}, ` ${small}`) : null)));
  if (audit.count !== null) add("Answers n", number(audit.count), audit.requested ? `of ${number(audit.requested)}` : "");
  if (audit.score_sum !== null) add("Similarity k", number(audit.score_sum), audit.count ? `mean ${(audit.score_sum / audit.count).toFixed(2)}` : "");
  if (audit.prior !== null) add("Prior π̄", number(audit.prior));
  if (audit.target !== null) add("Target π̂", number(audit.target));
  if (audit.weight !== null) add("Weight", signed(audit.weight));
  if (audit.logprob !== null) add("Log-probability", number(audit.logprob), audit.num_tokens ? `${plain(audit.logprob / audit.num_tokens)} a token` : "");
  for (const [name, value] of Object.entries(audit.others)) {
    const shown = clip(value).text;
    rows.push(el("div", {}, show(el("dt"), name), show(el("dd"), typeof value === "number" ? number(value) : shown)));
  }
  const node = el("div", {}, el("dl", { class: "sum" }, ...rows));
  const alpha = Number(settings["objective.prior_strength"]);
  const expected = (audit.score_sum + alpha * audit.prior) / (audit.count + alpha);
  if (audit.count && audit.prior !== null && audit.target !== null && Math.abs(expected - audit.target) < 0.005)
    node.append(el("p", { class: "equation" }, `π̂ = (k + α π̄) / (n + α) = (${plain(audit.score_sum)} + ${plain(alpha)} · ${plain(audit.prior)}) / (${plain(audit.count)} + ${plain(alpha)}) = `,
      el("b", {}, plain(audit.target))));
  return node;
}

function continuations(audit, student) {
  const groups = new Map(); // equal texts once, with how often
  for (const { text, score, finish_reason } of audit.continuations) {
    const { text: words, more } = clip(text), key = `${words}\n${more}\n${finish_reason}`;
    if (!groups.has(key)) groups.set(key, { text: words, more, score, finish_reason, times: 0 });
    groups.get(key).times++;
  }
  const ranked = [...groups.values()].sort((a, b) => (b.score ?? -1) - (a.score ?? -1));
  const key = el("span", { class: "key" }, el("ins", {}, "only the teacher"), " ", el("del", {}, "only the student"));
  const heading = el("h4", {}, "The teacher would have written", ranked.length ? key : null);
  if (!ranked.length) return [heading, el("p", { class: "note" }, "No answer arrived, so this chunk counts as unaudited.")];
  const list = el("ol", { class: "ranked" }, ...ranked.map((item) => {
    const score = el("div", { class: "score" }, item.score === null ? "–" : item.score.toFixed(2), meter(item.score));
    if (item.times > 1) score.append(el("small", {}, `${item.times} times`));
    if (clip(item.finish_reason).text === "stop") score.append(el("small", { title: "the teacher ended its answer here" }, "ends here"));
    return el("li", {}, score, differences(student.text, item.text, item.more));
  }));
  const left = audit.num_continuations - audit.continuations.length;
  return [heading, list, left > 0 ? el("p", { class: "note" }, `${count(left)} more are in audits.jsonl.`) : null].filter(Boolean);
}

function differences(student, teacher, more) {
  const node = el("div", { class: "text", dir: "auto" });
  for (const [kind, text] of diff(student, teacher))
    node.append(show(kind === "=" ? el("span") : el(kind === "+" ? "ins" : "del"), text));
  if (!teacher) node.append(el("span", { class: "soft" }, " (an empty text)"));
  if (more) node.append(cutNote(more));
  return node;
}

function branches(audit) {
  const groups = new Map();
  for (const branch of audit.branches) {
    const key = JSON.stringify([branch.text, branch.score, branch.weight]);
    if (!groups.has(key)) groups.set(key, { ...branch, times: 0 });
    groups.get(key).times++;
  }
  const ranked = [...groups.values()].sort((a, b) => (b.weight ?? b.score ?? 0) - (a.weight ?? a.score ?? 0));
  const list = el("ol", { class: "ranked" }, ...ranked.map((branch) => el("li", {},
    el("div", { class: "score" }, branch.score === null ? "–" : branch.score.toFixed(2), meter(branch.score),
      branch.weight === null ? null : el("small", { title: "weight in the loss, each" }, signed(branch.weight)),
      branch.times > 1 ? el("small", {}, `${branch.times} times`) : null),
    block(branch.text))));
  const left = audit.num_branches - audit.branches.length;
  return [el("h4", {}, "The student's branches from here", el("span", { class: "key" }, "similarity, weight in the loss")), list,
    left > 0 ? el("p", { class: "note" }, `${count(left)} more are in audits.jsonl.`) : null].filter(Boolean);
}

function repeats(audit) {
  const items = audit.repeats.map(([step, logprob], i) => {
    const before = audit.repeats[0][1];
    const change = i && logprob !== null && before !== null ? ` (${signed(+(logprob - before).toFixed(3))})` : "";
    return el("li", {}, `step ${count(step)}: ${logprob === null ? "–" : plain(logprob)}${change}`);
  });
  return [el("h4", {}, "The same words for the same prompt", el("span", { class: "key" }, "log-probability of the chunk")), el("ul", { class: "note" }, ...items)];
}
