// Differences between two short texts: Myers' shortest edit script on words, bounded in time.

const UNITS = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]|\p{L}[\p{L}\p{M}'’]*|\s+|[^]/gu;
const MOST_UNITS = 3000;
const MOST_EDITS = 400;

/** Words, single digits and signs, runs of white space. */
function units(text) {
  return text.match(UNITS) || [];
}

/**
 * How `b` differs from `a`: [[kind, text]], kind "=" both, "-" only in a, "+" only in b.
 * Texts that differ beyond the bounds come back as their common beginning and end with the middle replaced whole.
 */
function diff(a, b) {
  const left = units(a), right = units(b);
  let head = 0, tail = 0;
  const most = Math.min(left.length, right.length);
  while (head < most && left[head] === right[head]) head++;
  while (tail < most - head && left[left.length - 1 - tail] === right[right.length - 1 - tail]) tail++;
  const parts = [];
  add(parts, "=", left.slice(0, head));
  for (const [kind, words] of script(left.slice(head, left.length - tail), right.slice(head, right.length - tail))) add(parts, kind, words);
  add(parts, "=", left.slice(left.length - tail));
  return tidy(parts);
}

/** Neighbouring changes become one removal and one insertion, also across white space that happens to agree. */
function tidy(parts) {
  const tidied = [];
  let removed = "", inserted = "";
  const flush = () => {
    if (removed) tidied.push(["-", removed]);
    if (inserted) tidied.push(["+", inserted]);
    removed = inserted = "";
  };
  parts.forEach(([kind, text], i) => {
    const isBridge = kind === "=" && /^\s+$/.test(text) && (removed || inserted) && parts[i + 1] && parts[i + 1][0] !== "=";
    if (kind === "=" && !isBridge) { flush(); tidied.push([kind, text]); }
    if (kind === "-" || isBridge) removed += text;
    if (kind === "+" || isBridge) inserted += text;
  });
  flush();
  return tidied;
}

function add(parts, kind, words) {
  if (!words.length) return;
  const last = parts[parts.length - 1];
  if (last && last[0] === kind) last[1] += words.join("");
  else parts.push([kind, words.join("")]);
}

function script(a, b) {
  const replaced = [["-", a], ["+", b]];
  if (!a.length || !b.length || a.length > MOST_UNITS || b.length > MOST_UNITS) return replaced;
  const trace = [];
  const reach = new Map([[1, 0]]);
  for (let edits = 0; edits <= Math.min(MOST_EDITS, a.length + b.length); edits++) {
    const before = new Map(reach);
    trace.push(before);
    for (let k = -edits; k <= edits; k += 2) {
      let x = k === -edits || (k !== edits && before.get(k - 1) < before.get(k + 1)) ? before.get(k + 1) : before.get(k - 1) + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
      reach.set(k, x);
      if (x >= a.length && x - k >= b.length) return backtrack(trace, a, b);
    }
  }
  return replaced;
}

function backtrack(trace, a, b) {
  const steps = [];
  let x = a.length, y = b.length;
  for (let edits = trace.length - 1; edits >= 0; edits--) {
    const reach = trace[edits], k = x - y;
    const from = k === -edits || (k !== edits && reach.get(k - 1) < reach.get(k + 1)) ? k + 1 : k - 1;
    const startX = edits ? reach.get(from) : 0, startY = edits ? startX - from : 0;
    while (x > startX && y > startY && x > 0 && y > 0 && a[x - 1] === b[y - 1]) { steps.push(["=", [a[x - 1]]]); x--; y--; }
    if (!edits) break;
    if (x > startX) { steps.push(["-", [a[x - 1]]]); x--; }
    else { steps.push(["+", [b[y - 1]]]); y--; }
  }
  return steps.reverse();
}
