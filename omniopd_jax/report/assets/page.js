// The page: reads the head block, builds the sections, opens the audit viewer once the whole file is there.

const head = JSON.parse(document.getElementById("head").textContent);

function section(id, title, ...children) {
  const heading = el("div", { class: "section-head" }, el("h2", { id: `${id}-title` }, title));
  return { node: el("section", { id, "aria-labelledby": `${id}-title` }, heading, ...children), heading };
}

function resultSection() {
  const node = el("section", { id: "result", "aria-label": "Result" });
  const headline = show(el("h1"), head.headline);
  if (head.interval) headline.append(" ", show(el("span"), head.interval));
  node.append(show(el("p", { class: "kicker" }), head.kicker), headline);
  if (head.lead) node.append(show(el("p", { class: "lead" }), head.lead));
  if (head.measures.length) node.append(el("div", { class: "measures card" }, ...head.measures.map(measure)));
  if (head.facts.length) node.append(el("dl", { class: "facts" }, ...head.facts.map(([name, value]) => el("div", {}, show(el("dt"), name), show(el("dd"), value)))));
  return node;
}

/** One measured share: its number, its interval, and where it started, on a line from 0 to 100 %. */
function measure(item) {
  const name = show(el("div", { class: "name" }), item.label);
  if (item.about) name.append(show(el("small"), item.about));
  const value = el("div", { class: "value" }, number(item.value, "share"));
  if (item.low !== null) value.append(el("small", {}, `${(100 * item.low).toFixed(1)} to ${(100 * item.high).toFixed(1)}\u00a0%`));
  return el("div", { class: "measure" }, name, value, range(item));
}

function range(item) {
  const NS = "http://www.w3.org/2000/svg";
  const make = (tag, attributes, text) => {
    const node = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    return node;
  };
  const at = (share) => `${100 * share}%`;
  const stroke = `var(--s${(item.color || 0) % 8})`;
  const spoken = item.before === null ? number(item.value, "share") : `from ${number(item.before, "share")} to ${number(item.value, "share")}`;
  const svg = make("svg", { role: "img", "aria-label": `${item.label}: ${spoken}` });
  svg.append(make("line", { x1: "0", x2: "100%", y1: 14, y2: 14, stroke: "var(--line)", "stroke-width": 2 }));
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(make("line", { x1: at(share), x2: at(share), y1: 10, y2: 18, stroke: "var(--line)", "stroke-width": 1 }));
    svg.append(make("text", { x: at(share), y: 34, "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" }, `${100 * share}\u00a0%`));
  }
  if (item.before !== null) {
    svg.append(make("line", { x1: at(item.before), x2: at(item.value), y1: 14, y2: 14, stroke, "stroke-width": 2, opacity: 0.45 }));
    svg.append(make("circle", { cx: at(item.before), cy: 14, r: 5, fill: "var(--card)", stroke, "stroke-width": 2 }));
  }
  if (item.low !== null) svg.append(make("line", { x1: at(item.low), x2: at(item.high), y1: 14, y2: 14, stroke, "stroke-width": 7, opacity: 0.35, "stroke-linecap": "round" }));
  svg.append(make("circle", { cx: at(item.value), cy: 14, r: 5.5, fill: stroke }));
  return svg;
}

const SIGNS = { alarm: "▲", fine: "✓" };

function healthSection() {
  const { node } = section("health", "Health");
  const alarms = head.findings.filter(({ level }) => level === "alarm");
  const others = head.findings.filter(({ level }) => level !== "alarm");
  const cards = alarms.map(({ title, sentence }) => el("article", { class: "finding card alarm" }, el("span", { class: "sign", "aria-hidden": "true" }, SIGNS.alarm),
    show(el("h3"), title), show(el("p"), sentence)));
  if (!alarms.length) cards.push(el("article", { class: "finding card fine" }, el("span", { class: "sign", "aria-hidden": "true" }, SIGNS.fine),
    el("h3", {}, "Nothing alarming"), el("p", { class: "soft" }, `${plural(others.filter(({ level }) => level === "fine").length, "check")} passed.`)));
  node.append(el("div", { class: "findings" }, ...cards));
  if (others.length) node.append(el("details", { class: "quiet checks" }, el("summary", {}, "What was checked"),
    el("ul", {}, ...others.map(({ level, title, sentence }) => el("li", {}, show(el("b"), title), show(el("span"), `${level === "unknown" ? " – not measured" : ""}. ${sentence}`))))));
  return node;
}

function curvesSection() {
  const { node, heading } = section("curves", "Curves");
  const groups = new Map();
  for (const spec of head.curves) {
    if (!groups.has(spec.group)) groups.set(spec.group, []);
    groups.get(spec.group).push(spec);
  }
  const isLong = head.curves.some((spec) => spec.noisy && spec.x.length >= SMOOTH_FROM);
  if (head.band) heading.append(show(el("p", { class: "note" }), head.band));
  if (isLong) heading.append(el("label", {}, el("input", { type: "checkbox", checked: true, onchange: (event) => setSmoothing(event.target.checked) }), " running mean in bold"));
  for (const [name, specs] of groups) {
    const grid = el("div", { class: "charts" }, ...specs.map(chart));
    if (name) node.append(el("div", { class: "group" }, show(el("h3"), name), grid));
    else node.append(el("details", { class: "quiet group" }, el("summary", {}, `Everything else that was measured (${specs.length})`), grid));
  }
  if (!head.curves.length) node.append(el("p", { class: "empty" }, "No step has been finished yet."));
  return node;
}

function auditsSection() {
  const { node, heading } = section("audits", "Audits");
  const { responses, chunks, remark, none } = head.audits;
  if (none) heading.append(show(el("p", { class: "note" }), none));
  else heading.append(el("p", { class: "note" }, `${plural(responses, "response")}, ${plural(chunks, "audited chunk")}. Numbered chunks are where the teacher was asked.`));
  if (remark) node.append(show(el("p", { class: "note" }), remark));
  if (!responses) node.append(el("p", { class: "empty" }, none ? "No response is logged: in this arm the student writes none." : "No response has been logged."));
  return node;
}

/** A table; a cell is a text, or [text, small text below it]. */
function table(columns, rows, isNumber) {
  const headRow = el("tr", {}, ...columns.map((name, i) => show(el("th", { scope: "col", class: isNumber(i) ? "n" : null }), name)));
  const cell = (content, i) => {
    const [text, small] = Array.isArray(content) ? content : [content, ""];
    const node = show(i ? el("td", { class: isNumber(i) ? "n" : null, "data-column": columns.length > 2 ? columns[i] : null }) : el("th", { scope: "row" }), text);
    if (small) node.append(show(el("small"), small));
    return node;
  };
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": columns[0] },
    el("table", {}, el("thead", {}, headRow), el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell))))));
}

function settingsSection() {
  const { node } = section("settings", "Settings");
  const { changed, all } = head.settings;
  if (changed && changed.length) node.append(el("div", { class: "settings named card" }, table(["Changed from the default", "This run", "Default"], changed, () => false)));
  else if (changed) node.append(el("p", { class: "note" }, "Every setting is at its default."));
  if (all.length) node.append(el("details", { class: "quiet", open: !changed }, el("summary", {}, `All ${all.length} settings`),
    el("div", { class: "settings named card" }, table(["Setting", "Value"], all, () => false))));
  else node.append(el("p", { class: "empty" }, "There is no config.json."));
  return node;
}

function tablesSections() {
  return head.tables.map(({ id, title, note, columns, rows, numeric }) => {
    const { node, heading } = section(id, title, el("div", { class: id === "differences" ? "settings named card" : "settings card" }, table(columns, rows, (i) => i >= numeric)));
    if (note) heading.append(show(el("p", { class: "note" }), note));
    return node;
  });
}

function build() {
  const content = document.getElementById("content");
  const sections = [resultSection()];
  if (head.tables.length) sections.push(...tablesSections());
  if (head.findings) sections.push(healthSection());
  sections.push(curvesSection());
  if (head.audits) sections.push(auditsSection());
  if (head.settings) sections.push(settingsSection());
  content.append(...sections, show(el("footer"), head.footer));
  const links = sections.map((node) => el("a", { href: `#${node.id}` }, node.id === "result" ? "Result" : node.querySelector("h2").textContent));
  document.getElementById("bar").append(el("div", {}, show(el("b"), head.name), ...links));
}

build();
performance.mark("built");
if (head.audits && head.audits.responses) {
  const start = () => auditViewer(document.getElementById("audits"), head.named).then(() => performance.mark("audits"),
    (error) => document.getElementById("audits").append(el("p", { class: "empty" }, String(error.message || error))));
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
}
