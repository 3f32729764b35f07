// Curves: uPlot does the drawing; this file gives it data, colours, a legend of its own and the keyboard.

const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [5, 2], [1, 2], [12, 4], [3, 6]];
const SMOOTH_FROM = 40; // points from which a running mean is drawn over the raw values
const charts = new Set();

function color(index) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--s${index % 8}`).trim();
}

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Centred running mean over `width` known values; unknown ones stay unknown. */
function runningMean(values, width) {
  const known = [];
  values.forEach((value, i) => { if (value !== null) known.push(i); });
  const sums = [0];
  for (const i of known) sums.push(sums[sums.length - 1] + values[i]);
  const smooth = new Array(values.length).fill(null), half = Math.floor(width / 2);
  known.forEach((i, place) => {
    const low = Math.max(0, place - half), high = Math.min(known.length, place + half + 1);
    smooth[i] = (sums[high] - sums[low]) / (high - low);
  });
  return smooth;
}

/**
 * A chart card. spec: {title, unit, about, noisy, legend, x: steps, lines: [{label, values, low?, high?, color?}]}.
 * Nothing is drawn before the card comes near the window.
 */
function chart(spec) {
  const legend = el("ul", { "aria-hidden": "true" });
  const value = el("output", { "aria-live": "off" });
  const plot = el("div", { class: "plot", "aria-hidden": "true" });
  const spoken = el("p", { class: "hidden", "aria-live": "polite" });
  const heading = show(el("h4"), spec.title);
  const unit = { share: "", $: "US dollars", s: "seconds" }[spec.unit] ?? spec.unit;
  if (unit) heading.append(show(el("span", { class: "unit" }), unit));
  heading.append(value);
  const card = el("figure", { class: "chart card", tabindex: "0", role: "group", "aria-label": summary(spec) },
    heading, legend, plot, spoken, spec.about ? show(el("p", { class: "about" }), spec.about) : null);

  spec.top = spec.unit === "s" ? topOf(spec.lines) : null;
  if (spec.top !== null) card.append(el("p", { class: "about" }, "Peaks above the frame are cut off: the first steps compile."));
  const lines = spec.lines.map((line, i) => ({ ...line, index: line.color ?? i, last: lastKnown(line.values) }));
  const cells = lines.length > 1 || spec.legend ? lines.map((line) => {
    const swatch = el("span", { class: "swatch" });
    swatch.style.borderColor = `var(--s${line.index % 8})`;
    swatch.style.borderTopStyle = line.index ? (line.index % 2 ? "dashed" : "dotted") : "solid";
    const cell = el("b");
    const item = el("li", {}, swatch);
    show(item, line.label).append(cell);
    legend.append(item);
    return cell;
  }) : [value];
  const state = { card, plot, spec, lines, picture: null, place: null };
  state.read = (place) => {
    state.place = place;
    lines.forEach((line, i) => {
      const known = place === null ? line.last : line.values[place];
      cells[i].textContent = known === null && place !== null ? "–" : number(known, spec.unit === "share" || spec.unit === "$" || spec.unit === "s" ? spec.unit : "");
    });
    if (cells[0] !== value) value.textContent = place === null ? "" : `step ${count(spec.x[place])}`;
    else if (place !== null) value.textContent += ` at ${count(spec.x[place])}`;
  };
  state.read(null);
  card.addEventListener("keydown", (event) => moveAlong(event, state, spoken));
  card.addEventListener("blur", () => { if (state.picture) state.picture.setCursor({ left: -10, top: -10 }); state.read(null); });
  charts.add(state);
  near.observe(card);
  return card;
}

function lastKnown(values) {
  for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null) return values[i];
  return null;
}

function summary(spec) {
  const parts = spec.lines.map((line) => {
    const known = line.values.map((value, i) => [spec.x[i], value]).filter(([, value]) => value !== null);
    if (!known.length) return `${line.label}: no values`;
    const [first, last] = [known[0], known[known.length - 1]];
    return `${line.label}: ${number(first[1], spec.unit)} at step ${first[0]}, ${number(last[1], spec.unit)} at step ${last[0]}`;
  });
  return `${spec.title}. ${parts.join("; ")}. The arrow keys read single steps.`;
}

function moveAlong(event, state, spoken) {
  const { x } = state.spec;
  const at = state.place ?? x.length - 1, leap = Math.max(1, Math.round(x.length / 10));
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: x.length - 1, PageUp: at + leap, PageDown: at - leap }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const place = Math.min(x.length - 1, Math.max(0, to));
  if (state.picture) state.picture.setCursor({ left: state.picture.valToPos(x[place], "x"), top: state.plot.clientHeight / 3 });
  state.read(place);
  spoken.textContent = `Step ${x[place]}: ` + state.lines.map((line) => `${line.label} ${number(line.values[place], state.spec.unit)}`).join(", ");
}

function draw(state) {
  if (state.picture) state.picture.destroy();
  const { spec, lines, plot } = state;
  const isSmooth = smoothing && spec.noisy && spec.x.length >= SMOOTH_FROM;
  const width = Math.max(3, Math.round(spec.x.length / 20)) | 1;
  const even = (values) => (isSmooth ? runningMean(values, width) : values);
  const data = [spec.x], series = [{}], bands = [];
  for (const line of lines) {
    const stroke = color(line.index), dash = DASHES[line.index % DASHES.length];
    const isSparse = line.values.filter((value) => value !== null).length <= 24;
    if (line.low) {
      data.push(even(line.high), even(line.low));
      series.push({ stroke: "transparent", spanGaps: true, points: { show: false } }, { stroke: "transparent", spanGaps: true, points: { show: false } });
      bands.push({ series: [series.length - 2, series.length - 1], fill: stroke + "2e" });
    }
    if (isSmooth && !isSparse) {
      if (!line.low) {
        data.push(line.values);
        series.push({ stroke: stroke + "55", width: 1, spanGaps: true, points: { show: false } });
      }
      data.push(even(line.values));
      series.push({ stroke, width: 2, dash, spanGaps: true, points: { show: false } });
    } else {
      data.push(line.values);
      series.push({ stroke, width: line.low ? 2 : 1.6, dash, spanGaps: true, points: { show: isSparse, size: 5, fill: stroke } });
    }
  }
  const axis = { stroke: style("soft"), font: "11px " + style("sans"), ticks: { show: false } };
  const isZeroBased = ["share", "tokens", "s", "$", "calls"].includes(spec.unit);
  state.picture = new uPlot({
    width: Math.max(160, plot.clientWidth), height: 150, series, bands, padding: [8, 14, 0, 0],
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, sync: { key: "steps" }, points: { size: 6 } },
    scales: { x: { time: false }, y: { range: (_, low, high) => yRange(low, spec.top ?? high, isZeroBased) } },
    axes: [
      { ...axis, grid: { show: false }, size: 24, gap: 4, space: 56, values: (_, splits) => splits.map((step) => (Number.isInteger(step) ? count(step) : "")) },
      { ...axis, grid: { stroke: style("line"), width: 1 }, gap: 4, space: 30, values: (_, splits) => tickLabels(splits, spec.unit),
        size: (_, labels) => 12 + 6.2 * Math.max(2, ...(labels || []).map((label) => label.length)) },
    ],
    hooks: { setCursor: [(picture) => state.read(picture.cursor.idx ?? null)] },
  }, data, plot);
}

/** Where to cut a chart off that a few peaks would flatten; null where none do. */
function topOf(lines) {
  const values = lines.flatMap((line) => line.values.filter((value) => value !== null)).sort((a, b) => a - b);
  if (values.length < SMOOTH_FROM) return null;
  const usual = values[Math.floor(0.97 * (values.length - 1))];
  return usual > 0 && values[values.length - 1] > 3 * usual ? 1.3 * usual : null;
}

function yRange(low, high, isZeroBased) {
  if (low === null || high === null || low === undefined || high === undefined) return [0, 1];
  if (isZeroBased && low >= 0) low = Math.min(low, 0);
  const margin = (high - low || Math.abs(high) || 1) * 0.08;
  return [isZeroBased && low === 0 ? 0 : low - margin, high + margin];
}

function tickLabels(splits, unit) {
  const most = Math.max(...splits.map(Math.abs)), gap = splits.length > 1 ? splits[1] - splits[0] : most;
  if (unit === "share") return splits.map((v) => `${+(100 * v).toFixed(gap < 0.001 ? 2 : gap < 0.01 ? 1 : 0)}\u00a0%`);
  const [scale, mark] = most >= 1e9 ? [1e9, "G"] : most >= 1e6 ? [1e6, "M"] : most >= 1e4 ? [1e3, "k"] : [1, ""];
  let digits = 0;
  while (digits < 8 && splits.some((v) => Math.abs(v / scale - Number((v / scale).toFixed(digits))) > gap / scale / 100)) digits++;
  return splits.map((v) => (most < 1e-4 && v !== 0 ? v.toExponential(0) : minus((v / scale).toFixed(digits)) + (v ? mark : "")));
}

let smoothing = true;

function setSmoothing(isOn) {
  smoothing = isOn;
  for (const state of charts) if (state.picture) draw(state);
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    for (const state of charts) if (state.card === entry.target) { draw(state); widths.observe(state.plot); }
  }
}, { rootMargin: "600px 0px" });

const widths = new ResizeObserver((entries) => {
  for (const entry of entries) {
    for (const state of charts) {
      if (state.plot === entry.target && state.picture && Math.abs(state.picture.width - entry.contentRect.width) > 1)
        state.picture.setSize({ width: Math.max(160, entry.contentRect.width), height: 150 });
    }
  }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const state of charts) if (state.picture) draw(state);
});
