// Draws the figures of a page with plotly.js, from what Python wrote into #content. Without a script the page is its tables.
"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const runs = content.runs;
const NARROW = 700; // pixels
const CUT = 0.15; // of a curve: its first fall would flatten all that follows
const PARTS = {
  useful: "#2a9d6f", start: "#e39a9a", restart: "#cf3d3d", compile: "#8a63d2", checkpoint: "#3366cc",
  data: "#e07b39", other: "#b9bfca", queue: "#e6c34a", idle: "#e9e4d0",
};
const AXES = { step: "step", tokens: "tokens", seconds: "time", flops: "FLOPs" };

// What the reader chose lives as long as the tab, also when the page is read again.
const memory = `page of ${location.pathname}${location.search}`;
const chosen = { x: "step", smooth: 0.01, logx: false, logy: {}, values: [], runs: [], ranges: {} };
try { Object.assign(chosen, JSON.parse(sessionStorage.getItem(memory) ?? "{}")); } catch { /* no storage here */ }
const remember = () => { try { sessionStorage.setItem(memory, JSON.stringify(chosen)); } catch { /* nor here */ } };

// Plotly reads a few tags and entities in its texts: names of runs are no such thing.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const exact = (value) => (value == null ? "" : Number(value).toLocaleString("en", { maximumSignificantDigits: 6 }));
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => window.innerWidth < NARROW;
const make = (tag, attributes, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};

const hides = (run) => chosen.runs.includes(run.number)
  || content.legend.some(({ key }) => chosen.values.includes(`${key}=${run.values[key]}`));
const shown = () => runs.filter((run) => !hides(run));

function duration(seconds) {
  if (seconds < 120) return `${exact(seconds)} s`;
  return seconds < 7200 ? `${exact(seconds / 60)} min` : `${exact(seconds / 3600)} h`;
}

// Where steps lie on the chosen axis: between two known ones in proportion.
function across(run, steps) {
  const clock = run.clock[chosen.x];
  if (chosen.x === "step") return steps;
  if (!clock) return steps.map(() => null);
  let at = 0;
  return steps.map((step) => {
    while (at + 2 < clock.steps.length && clock.steps[at + 1] < step) at++;
    const [low, high] = [clock.steps[at], clock.steps[at + 1] ?? clock.steps[at]];
    const [first, last] = [clock.values[at], clock.values[at + 1] ?? clock.values[at]];
    const share = high > low ? Math.min(1, Math.max(0, (step - low) / (high - low))) : 0;
    return first + (last - first) * share;
  });
}

// Gaussian mean around each point, so that nothing lags; `share`: of the curve that is one standard deviation wide.
function smoothed(values, share) {
  const width = share * values.length, reach = Math.ceil(3 * width);
  if (width < 0.3) return values;
  const kernel = Array.from({ length: reach + 1 }, (_, offset) => Math.exp(-0.5 * (offset / width) ** 2));
  return values.map((_, place) => {
    let total = 0, weight = 0;
    for (let at = Math.max(0, place - reach); at <= Math.min(values.length - 1, place + reach); at++) {
      if (values[at] == null) continue;
      total += kernel[Math.abs(at - place)] * values[at];
      weight += kernel[Math.abs(at - place)];
    }
    return weight > 0 ? total / weight : null;
  });
}

// Curves that lie exactly on each other: the lower ones are broader, so that the colour of each is seen.
function look(run, curve) {
  const above = curve.same.length ? curve.same.length - 1 - curve.same.indexOf(run.number) : 0;
  return { color: run.colour, dash: run.dash, simplify: false, width: 1.8 + 2.4 * Math.min(3, above) };
}

function curves(place) {
  const chart = content.charts.find((each) => each.title === place.dataset.title), traces = [], ends = [], shapes = [];
  for (const run of shown()) {
    const curve = run.curves[chart.title];
    if (!curve) continue;
    const x = across(run, curve.steps), raw = curve.values;
    const y = chart.noisy ? smoothed(raw, chosen.smooth) : raw, line = look(run, curve);
    if (y !== raw) traces.push({ x, y: raw, mode: "lines", line: { ...line, dash: "solid", width: 1 }, opacity: 0.2, hoverinfo: "skip" });
    const others = curve.same.length > 1 ? `<br>exactly as run ${curve.same.filter((each) => each !== run.number).join(", ")}` : "";
    const text = raw.map((value, at) => {
      const smooth = y === raw ? "" : ` (smoothed ${exact(y[at])})`;
      return `<b>${plain(run.label)}</b><br>${plain(chart.title)} ${exact(value)}${smooth}<br>`
        + `step ${exact(curve.steps[at])}${chosen.x === "step" ? "" : `, ${plain(reading(x[at]))}`}${others}`;
    });
    traces.push({
      x, y, text, name: plain(run.label), mode: chart.marks || raw.length === 1 ? "lines+markers" : "lines", line,
      marker: { color: run.colour, size: 6 }, hovertemplate: "%{text}<extra></extra>", meta: run.number,
      connectgaps: false,
    });
    const border = { type: "line", yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: run.colour, width: 1, dash: "dot" } };
    shapes.push(...across(run, run.borders).filter((x) => x != null).map((x) => ({ ...border, x0: x, x1: x })));
    if (run.state !== "diverged") ends.push(...raw.map((value, at) => [at / raw.length, value]).filter((each) => each[1] != null));
  }
  const layout = { xaxis: axis(), yaxis: { type: chosen.logy[chart.title] ? "log" : "linear" }, shapes };
  if (chart.fall && !chosen.logy[chart.title]) Object.assign(layout.yaxis, withoutFall(ends));
  return [traces, layout];
}

function withoutFall(points) {
  const values = points.map((each) => each[1]), late = points.filter((each) => each[0] >= CUT).map((each) => each[1]);
  if (late.length < 8) return {};
  const low = Math.min(...values), high = Math.max(...late);
  if (Math.max(...values) <= high + 0.5 * (high - low)) return {};
  const room = 0.05 * (high - low) || 0.1;
  return { range: [low - room, high + room], autorange: false };
}

const span = () => Math.max(0, ...shown().flatMap((run) => run.clock.seconds?.values.slice(-1) ?? []));
const unit = () => (span() < 120 ? [1, "s"] : span() < 7200 ? [60, "min"] : [3600, "h"]);
const reading = (value) => (value == null ? "" : chosen.x === "seconds" ? duration(value) : `${exact(value)} ${AXES[chosen.x]}`);

function axis() {
  const found = { type: chosen.logx ? "log" : "linear", title: { text: AXES[chosen.x] } };
  if (chosen.x !== "seconds" || chosen.logx) {
    if (chosen.x === "seconds") found.title.text = "seconds";
    return { ...found, exponentformat: "SI" };
  }
  const [size, name] = unit(), rough = span() / size / (narrow() ? 3 : 6), power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough) ?? 1;
  const ticks = Array.from({ length: Math.floor(span() / size / step) + 1 }, (_, at) => at * step);
  return { ...found, title: { text: `time since the first line, ${name}` }, tickvals: ticks.map((each) => each * size), ticktext: ticks.map(exact) };
}

const done = () => shown().filter((run) => run.loss != null);
const dots = (all, x) => ({
  x, y: all.map((run) => run.loss), mode: "markers", hovertemplate: "%{text}<extra></extra>",
  text: all.map((run) => `<b>${plain(run.label)}</b><br>${plain(content.loss)} ${exact(run.loss)}`),
  marker: { color: all.map((run) => run.colour), size: 10, line: { color: colour("--card"), width: 1.5 } },
});
const joined = (x, y, shape) => ({ x, y, mode: "lines", hoverinfo: "skip", line: { color: colour("--soft"), width: 1.3, dash: "dot", shape } });

function against(place) {
  const { key, names, log } = content.keys.find((each) => each.key === place.dataset.key), all = done();
  const x = all.map((run) => (names ? names.indexOf(run.values[key]) : Number(run.values[key])));
  const places = [...new Set(x)].sort((a, b) => a - b);
  const mean = places.map((each) => {
    const losses = all.filter((_, at) => x[at] === each).map((run) => run.loss);
    return losses.reduce((sum, loss) => sum + loss, 0) / losses.length;
  });
  const few = new Map(all.map((run, at) => [x[at], plain(run.values[key])]));
  const ticks = names ? { tickvals: names.map((_, at) => at), ticktext: names.map(plain), range: [-0.5, names.length - 0.5] }
    : few.size <= 8 ? { tickvals: [...few.keys()], ticktext: [...few.values()] } : { exponentformat: "power" };
  const xaxis = { title: { text: plain(key) }, type: log ? "log" : "linear", ...ticks };
  return [[joined(places, mean), dots(all, x)], { xaxis, yaxis: {} }];
}

function best() {
  const all = done(), x = all.map((run) => run.number);
  const lowest = all.map((_, at) => Math.min(...all.slice(0, at + 1).map((run) => run.loss)));
  return [[joined(x, lowest, "hv"), dots(all, x)], { xaxis: { title: { text: "run" } }, yaxis: {} }];
}

const bar = (y, x, color, text, name) => ({ type: "bar", orientation: "h", y, x, text, textposition: "outside", cliponaxis: false,
  textfont: { color: colour("--soft") }, hovertemplate: `%{y}<br>%{customdata}<extra></extra>`, marker: { color }, name });
const rows = (count) => ({ height: Math.max(170, 80 + (narrow() ? 22 : 26) * count), bargap: 0.3 });
const short = (run) => plain(`${run.number}: ${run.label}`.slice(0, narrow() ? 18 : 34));
const unzoomed = { fixedrange: true, automargin: true };

function importance() {
  const keys = Object.keys(content.importance), shares = Object.values(content.importance).map((each) => 100 * each);
  const trace = bar(keys.map(plain), shares, "#3f78c8", shares.map((each) => `${each.toFixed(0)}%`));
  trace.customdata = shares.map((each) => `${each.toFixed(1)} % of the variance`);
  return [[trace], { ...rows(keys.length), xaxis: { title: { text: "% of the variance" }, range: [0, 108], fixedrange: true }, yaxis: unzoomed }];
}

function rates() {
  const all = shown().filter((run) => run.rate).reverse();
  const trace = bar(all.map(short), all.map((run) => run.rate), all.map((run) => run.colour), all.map((run) => exact(Math.round(run.rate))));
  trace.customdata = all.map((run) => `${exact(run.rate)} tokens/s`);
  const most = Math.max(...all.map((run) => run.rate));
  return [[trace], { ...rows(all.length), xaxis: { title: { text: "tokens per second and device" }, range: [0, 1.18 * most], fixedrange: true }, yaxis: unzoomed }];
}

function times() {
  const all = shown().filter((run) => Object.keys(run.seconds).length).reverse();
  const total = (run) => Object.values(run.seconds).reduce((sum, each) => sum + each, 0);
  const longest = Math.max(...all.map(total)), [size, name] = longest < 120 ? [1, "seconds"] : longest < 7200 ? [60, "minutes"] : [3600, "hours"];
  const traces = Object.entries(PARTS).filter(([part]) => all.some((run) => run.seconds[part] > 0)).map(([part, color]) => {
    const trace = bar(all.map(short), all.map((run) => run.seconds[part] / size), color, undefined, part);
    return Object.assign(trace, { customdata: all.map((run) => `${part}: ${duration(run.seconds[part])}`) });
  });
  const annotations = all.map((run) => ({ x: total(run) / size, y: short(run), xanchor: "left", showarrow: false,
    text: ` ${((100 * run.seconds.useful) / total(run)).toFixed(0)}%`, font: { color: colour("--soft") } }));
  const layout = { ...rows(all.length), barmode: "stack", annotations, showlegend: true,
    xaxis: { title: { text: name }, range: [0, (1.12 * longest) / size], fixedrange: true }, yaxis: unzoomed };
  layout.legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" };
  layout.height += 30;
  return [traces, layout];
}

function parallel() {
  const all = done(), losses = all.map((run) => run.loss);
  const dimensions = content.keys.map(({ key, names, log }) => {
    const texts = all.map((run) => run.values[key]);
    if (names) return { label: plain(key), values: texts.map((each) => names.indexOf(each)), tickvals: names.map((_, at) => at), ticktext: names.map(plain) };
    if (!log) return { label: plain(key), values: texts.map(Number) };
    const values = texts.map((each) => Math.log10(Number(each))), few = [...new Set(texts)];
    const ticks = few.length <= 8 ? few : [Math.min(...texts.map(Number)), Math.max(...texts.map(Number))].map(String);
    return { label: plain(key), values, tickvals: ticks.map((each) => Math.log10(Number(each))), ticktext: ticks.map(plain) };
  });
  dimensions.push({ label: plain(`final ${content.loss}`), values: losses });
  const ink = { color: colour("--ink"), size: 12 };
  const trace = { type: "parcoords", dimensions, labelfont: ink, tickfont: ink, rangefont: { ...ink, color: colour("--soft") },
    unselected: { line: { color: colour("--line"), opacity: 0.4 } },
    line: { color: losses, colorscale: [[0, "#2a9d6f"], [0.5, "#b5b827"], [1, "#6b4fc3"]], showscale: false } };
  return [[trace], { margin: { l: 60, r: 60, t: 44, b: 26 }, height: 340 }];
}

// Traces that Python has made: of a fit.
function given(place) {
  const { traces, layout } = structuredClone(content.drawn[place.dataset.title]);
  return [traces, layout];
}

const KINDS = { given, curves, against, parallel, importance, best, rates, times };
const zooms = (place) => ["given", "curves", "against", "best"].includes(place.dataset.kind);
const name = (place) => place.dataset.title;

function common(layout) {
  const line = colour("--line"), soft = colour("--soft");
  for (const each of [layout.xaxis, layout.yaxis].filter(Boolean))
    Object.assign(each, { gridcolor: line, linecolor: line, zeroline: false, automargin: true, tickfont: { color: soft }, title: { font: { color: soft, size: 13 }, standoff: 8, ...each.title } });
  const touch = matchMedia("(pointer: coarse)").matches;
  return {
    height: 330, margin: { l: 56, r: 14, t: 8, b: 44 }, showlegend: false, hovermode: "closest", hoverdistance: 40,
    dragmode: touch ? false : "zoom", paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", color: colour("--ink"), size: 12 },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: line, font: { color: colour("--ink") }, align: "left" },
    modebar: { bgcolor: "transparent", color: soft, activecolor: colour("--accent") }, ...layout,
  };
}

function draw(place) {
  const empty = (place.dataset.kind === "curves" ? shown() : done()).length === 0 && !["rates", "times", "importance"].includes(place.dataset.kind);
  const [traces, layout] = empty ? [[], { xaxis: {}, yaxis: {} }] : KINDS[place.dataset.kind](place);
  const range = chosen.ranges[name(place)];
  if (range && zooms(place)) {
    Object.assign(layout.xaxis, { range: range.x, autorange: false });
    Object.assign(layout.yaxis, { range: range.y, autorange: false });
  }
  if (place.dataset.kind === "curves" && name(place) === "Validation loss") layout.height = 380;
  const config = { responsive: true, displaylogo: false, doubleClick: "reset+autosize", displayModeBar: zooms(place) ? "hover" : false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], toImageButtonOptions: { filename: name(place), scale: 2 } };
  const first = !place.data;
  Plotly.react(place, traces, common(layout), config);
  if (first) listen(place);
}

function listen(place) {
  place.on("plotly_relayout", (event) => {
    if (!zooms(place) || !Object.keys(event).some((key) => key.includes("axis"))) return;
    const { xaxis, yaxis } = place.layout, all = Object.keys(event).some((key) => key.endsWith("autorange"));
    if (all) delete chosen.ranges[name(place)];
    else chosen.ranges[name(place)] = { x: xaxis.range, y: yaxis.range };
    remember();
  });
  place.on("plotly_click", ({ points }) => {
    const row = document.querySelector(`tr[data-run="${points[0].data.meta}"]`);
    document.querySelectorAll("tr.picked").forEach((each) => each.classList.remove("picked"));
    row?.classList.add("picked");
  });
}

// Only what is near the screen is drawn: 50 runs in 15 figures at once would keep a browser busy for seconds.
const near = new Set();
const observer = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  if (!isIntersecting) return void near.delete(target);
  near.add(target);
  if (stale.delete(target)) draw(target);
}), { rootMargin: "900px" });
const places = [...document.querySelectorAll(".plot")], stale = new Set(places);
function redraw() {
  remember();
  places.forEach((each) => stale.add(each));
  near.forEach((each) => { stale.delete(each); draw(each); });
}

function button(text, on, click, title = "") {
  const node = make("button", { type: "button", textContent: text, title, onclick: () => { click(); show(); } });
  const show = () => { node.classList.toggle("on", on()); node.setAttribute("aria-pressed", on()); };
  show();
  return node;
}

function controls() {
  const known = Object.keys(AXES).filter((each) => each === "step" || runs.some((run) => run.clock[each]));
  if (!known.includes(chosen.x)) chosen.x = "step";
  const horizontal = known.map((each) => button(AXES[each], () => chosen.x === each, () => {
    chosen.x = each;
    chosen.ranges = {};
    redraw();
    horizontal.forEach((one, at) => { one.classList.toggle("on", known[at] === each); one.setAttribute("aria-pressed", known[at] === each); });
  }));
  const log = button("log x", () => chosen.logx, () => { chosen.logx = !chosen.logx; chosen.ranges = {}; redraw(); }, "logarithmic horizontal axis");
  const slider = make("input", { type: "range", id: "smoothing", min: 0, max: 10, step: 0.5, value: 100 * chosen.smooth });
  slider.addEventListener("input", () => { chosen.smooth = slider.value / 100; redraw(); });
  const row = make("div", { className: "row" }, make("span", { className: "group" }, "x", ...horizontal, log),
    make("label", { className: "group" }, "smoothing", slider));
  const card = document.getElementById("controls");
  if (content.charts.length === 0) return;
  card.append(row);
  const entries = legend();
  if (entries) card.append(entries);
}

function swatch(look, shows) {
  const dashes = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 4" };
  if (!shows) return "";
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), line = document.createElementNS(svg.namespaceURI, "line");
  for (const [key, value] of Object.entries({ width: 26, height: 8 })) svg.setAttribute(key, value);
  const style = { x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 3, stroke: shows === "dash" ? "currentColor" : look.colour,
    "stroke-dasharray": shows === "colour" ? "" : dashes[look.dash] };
  for (const [key, value] of Object.entries(style)) line.setAttribute(key, value);
  svg.append(line);
  return svg;
}

function toggle(list, value, all) {
  const at = list.indexOf(value);
  if (all) { // of a double click: this one alone, or all again
    const others = all.filter((each) => each !== value), alone = others.every((each) => list.includes(each)) && at < 0;
    all.forEach((each) => list.includes(each) && list.splice(list.indexOf(each), 1));
    if (!alone) list.push(...others);
  } else if (at < 0) list.push(value); else list.splice(at, 1);
}

// Entries of the values of each swept key; without one, of the runs.
function legend() {
  const box = make("div", { className: "legend" }), refresh = [];
  const entry = (list, value, all, text, sample) => {
    const node = make("button", { type: "button", className: "entry", title: "click: show or hide; double click: this alone" }, sample, text);
    node.addEventListener("click", () => { toggle(list, value); redraw(); sync(); });
    node.addEventListener("dblclick", () => { toggle(list, value, all); redraw(); sync(); });
    refresh.push(() => { node.classList.toggle("off", list.includes(value)); node.setAttribute("aria-pressed", !list.includes(value)); });
    return node;
  };
  const sync = () => { refresh.forEach((each) => each()); boxes(); };
  for (const { key, many, entries } of content.legend) {
    const group = make("span", { className: "group" }, make("b", { textContent: key }));
    if (many) {
      const [first, last] = [entries[0], entries.at(-1)];
      group.append(swatch(first.look, first.shows), first.value, " … ", swatch(last.look, last.shows), last.value);
    } else {
      const all = entries.map(({ value }) => `${key}=${value}`);
      group.append(...entries.map(({ value, look, shows }) => entry(chosen.values, `${key}=${value}`, all, value, swatch(look, shows))));
    }
    box.append(group);
  }
  if (content.legend.length === 0 && runs.length > 1) {
    const all = runs.map((run) => run.number);
    box.append(...runs.map((run) => entry(chosen.runs, run.number, all, run.label, swatch(run, "both"))));
  }
  sync();
  return box.childElementCount ? box : null;
}

// The boxes of the table, one for each run.
function boxes() {
  for (const box of document.querySelectorAll("input[data-run]")) {
    const run = runs.find((each) => each.number === Number(box.dataset.run));
    box.checked = !hides(run);
    box.closest("tr").classList.toggle("hidden", hides(run));
    box.onchange = () => { toggle(chosen.runs, run.number); redraw(); boxes(); };
  }
}

function buttons() {
  for (const place of places.filter((each) => each.dataset.kind === "curves")) {
    const node = button("log y", () => Boolean(chosen.logy[name(place)]), () => {
      chosen.logy[name(place)] = !chosen.logy[name(place)];
      delete chosen.ranges[name(place)];
      remember();
      draw(place);
    });
    place.parentNode.querySelector("h2").append(node);
  }
}

// A page that lives is read again, but not under somebody's hand.
function again() {
  let last = 0;
  for (const event of ["pointermove", "pointerdown", "keydown", "wheel"]) addEventListener(event, () => { last = Date.now(); }, { passive: true });
  setInterval(() => { if (!document.hidden && Date.now() - last > 5000) location.reload(); }, 1000 * content.refresh);
}

async function library() {
  const packed = document.getElementById("plotly");
  if (window.Plotly || !packed) return;
  const bytes = Uint8Array.from(atob(packed.textContent), (each) => each.charCodeAt(0));
  const code = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(make("script", { textContent: code }));
}

library().then(() => {
  controls();
  buttons();
  boxes();
  places.forEach((each) => observer.observe(each));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  if (content.refresh) again();
});
