// Text and numbers into the document. Every string of the data enters it as a text node, never as markup.

/** An element. Attributes: class, text, on* handlers, anything else by its own name; children: nodes or strings. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;
const NAMES = {
  0x61c: "ALM", 0xad: "SHY", 0x200b: "ZWSP", 0x200e: "LRM", 0x200f: "RLM", 0x2028: "LSEP", 0x2029: "PSEP", 0x202a: "LRE", 0x202b: "RLE",
  0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM", 0x0d: "CR",
  0x1b: "ESC", 0x00: "NUL", 0x07: "BEL", 0x08: "BS", 0x7f: "DEL",
};

/** Appends `text` with characters that cannot be seen, or that turn the writing direction, shown by their names. */
function show(parent, text) {
  let last = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    if (match.index > last) parent.append(text.slice(last, match.index));
    const code = match[0].codePointAt(0);
    parent.append(el("span", { class: "ctrl" }, NAMES[code] || `U+${code.toString(16).toUpperCase().padStart(4, "0")}`));
    last = match.index + match[0].length;
  }
  if (last < text.length) parent.append(text.slice(last));
  return parent;
}

/** What a clipped text holds: {text, more}; `more` characters were left out. */
function clip(value) {
  return value !== null && typeof value === "object" ? value : { text: value || "", more: 0 };
}

/** A block of model text, its writing direction its own, with a note where it was clipped. */
function block(value, className = "") {
  const { text, more } = clip(value);
  const node = show(el("div", { class: `text ${className}`, dir: "auto" }), text);
  if (more) node.append(cutNote(more));
  return node;
}

function cutNote(more) {
  return el("span", { class: "cut", dir: "ltr" }, `… ${count(more)} more characters are in the log file, not on this page.`);
}

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

function count(value) {
  return grouped.format(value);
}

/** A number as one reads it, with its unit. */
function number(value, unit = "") {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return `${fixed(100 * value, value && Math.abs(value) < 0.1 ? 2 : 1)}\u00a0%`;
  if (unit === "$") return `$${Math.abs(value) < 10 ? fixed(value, value !== 0 && Math.abs(value) < 0.1 ? 4 : 2) : count(value)}`;
  if (unit === "s" && Math.abs(value) >= 120) return value < 7200 ? `${fixed(value / 60, 1)} min` : `${fixed(value / 3600, 1)} h`;
  const shown = plain(value);
  return unit ? `${shown}\u00a0${unit}` : shown;
}

function plain(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e7 || size < 1e-4) return value.toExponential(2).replace("-", "−").replace("e+", "e").replace("e-", "e−");
  if (size >= 1000) return minus(count(value));
  return fixed(value, size >= 100 ? 1 : size >= 10 ? 2 : size >= 0.1 ? 3 : 4);
}

function fixed(value, digits) {
  const text = value.toFixed(digits);
  return minus(text.includes(".") ? text.replace(/\.?0+$/, "") : text);
}

function minus(text) {
  return text.replace("-", "−");
}

function signed(value) {
  return value === null ? "–" : `${value > 0 ? "+" : ""}${plain(value)}`;
}

function plural(n, one, many = `${one}s`) {
  return `${count(n)} ${n === 1 ? one : many}`;
}

/** A bar for a similarity in [0, 1]. */
function meter(value) {
  const bar = el("i");
  bar.style.width = `${100 * Math.min(1, Math.max(0, value || 0))}%`;
  return el("span", { class: "meter", "aria-hidden": "true" }, bar);
}
