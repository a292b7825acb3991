// Curves under a pointer: the nearest point is read out, a drag zooms in, a double click shows all again, and buttons
// change an axis to its logarithm. Without a script the page shows the same curves, still.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const make = (name, attributes, text) => {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return node;
};
const numbers = (text) => text.split(" ").map(Number);

function short(value) {
  if (value === 0) return "0";
  for (const [bound, unit, letter] of [[1e12, 1e12, "T"], [1e9, 1e9, "B"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
    if (Math.abs(value) >= bound) return Number((value / unit).toPrecision(4)) + letter;
  return String(Number(value.toPrecision(4)));
}

function ticks(low, high, log, count) {
  const found = [];
  if (log && high / low >= 3) {
    const between = Math.log10(high / low) < 1.5 ? [1, 2, 5] : [1];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const digit of between) found.push(digit * 10 ** power);
  } else {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough);
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high * (1 + 1e-9); index++) found.push(index * step);
  }
  return found.filter((each) => each >= low && each <= high);
}

class Chart {
  constructor(svg) {
    this.svg = svg;
    [this.left, this.right, this.top, this.bottom] = numbers(svg.dataset.frame);
    this.shown = numbers(svg.dataset.range); // at first: x from, x to, y from, y to
    this.log = [false, false];
    this.curves = [...svg.querySelectorAll(".curve")].map((group) => ({
      group, title: group.querySelector("title").textContent, xs: numbers(group.dataset.x), ys: numbers(group.dataset.y),
    }));
    this.range = [...this.shown];
    this.mark = svg.appendChild(make("circle", { class: "here", r: 5, visibility: "hidden" }));
    this.box = svg.appendChild(make("rect", { class: "zoom", visibility: "hidden" }));
    this.told = svg.parentNode.appendChild(document.createElement("p"));
    this.told.className = "note told";
    this.help = "Rest the pointer on a curve for its values; drag to zoom in, double-click to see all.";
    this.told.textContent = this.help;
    this.buttons();
    svg.addEventListener("pointermove", (event) => this.move(event));
    svg.addEventListener("pointerleave", () => this.leave());
    svg.addEventListener("pointerdown", (event) => { this.from = this.place(event); event.preventDefault(); });
    svg.addEventListener("pointerup", (event) => this.zoom(event));
    svg.addEventListener("dblclick", () => this.all());
  }

  buttons() {
    const row = this.svg.parentNode.insertBefore(document.createElement("p"), this.svg);
    row.className = "buttons";
    ["x", "y"].forEach((name, axis) => {
      const button = row.appendChild(document.createElement("button"));
      button.textContent = `log ${this.svg.dataset[name]}`;
      button.addEventListener("click", () => {
        this.log[axis] = !this.log[axis];
        button.classList.toggle("on", this.log[axis]);
        this.range = this.positive([...this.shown]);
        this.draw();
      });
    });
  }

  // A logarithm begins at the smallest value above 0.
  positive(range) {
    [0, 1].forEach((axis) => {
      if (!this.log[axis] || range[2 * axis] > 0) return;
      const above = this.curves.flatMap((curve) => (axis ? curve.ys : curve.xs)).filter((each) => each > 0);
      range[2 * axis] = Math.min(...above, range[2 * axis + 1]);
    });
    return range;
  }

  all() {
    const every = [this.curves.flatMap((curve) => curve.xs), this.curves.flatMap((curve) => curve.ys)];
    this.range = every.flatMap((values) => [Math.min(...values), Math.max(...values)]);
    if (this.range[2] === this.range[3]) this.range = [...this.shown];
    if (!this.log[0]) this.range[0] = 0;
    this.range = this.positive(this.range);
    this.draw();
  }

  at(axis, value) {
    let [low, high] = this.range.slice(2 * axis, 2 * axis + 2);
    if (this.log[axis]) [low, high, value] = [low, high, value].map(Math.log);
    const share = high > low ? (value - low) / (high - low) : 0.5;
    return axis ? this.bottom + (this.top - this.bottom) * share : this.left + (this.right - this.left) * share;
  }

  value(axis, pixel) {
    let [low, high] = this.range.slice(2 * axis, 2 * axis + 2);
    const share = axis ? (pixel - this.bottom) / (this.top - this.bottom) : (pixel - this.left) / (this.right - this.left);
    return this.log[axis] ? low * (high / low) ** share : low + (high - low) * share;
  }

  place(event) {
    const matrix = this.svg.getScreenCTM().inverse(), point = new DOMPoint(event.clientX, event.clientY);
    const { x, y } = point.matrixTransform(matrix);
    return [Math.min(Math.max(x, this.left), this.right), Math.min(Math.max(y, this.top), this.bottom)];
  }

  points(curve) {
    const kept = curve.xs.map((x, index) => [x, curve.ys[index]]);
    return kept.filter(([x, y]) => (!this.log[0] || x > 0) && (!this.log[1] || y > 0))
      .map(([x, y]) => ({ x, y, px: this.at(0, x), py: this.at(1, y) }));
  }

  draw() {
    for (const curve of this.curves) {
      const points = this.points(curve), text = points.map((each) => `${each.px.toFixed(1)},${each.py.toFixed(1)}`).join(" ");
      curve.group.querySelectorAll("polyline").forEach((line) => line.setAttribute("points", text));
      const marks = [...curve.group.querySelectorAll("circle")];
      marks.slice(points.length).forEach((mark) => mark.setAttribute("visibility", "hidden"));
      points.slice(0, marks.length).forEach((each, index) => {
        marks[index].setAttribute("visibility", "visible");
        marks[index].setAttribute("cx", each.px);
        marks[index].setAttribute("cy", each.py);
      });
    }
    const grid = this.svg.querySelector(".grid"), [xs, ys] = [[0, Math.round((this.right - this.left) / 95)], [1, 6]].map(
      ([axis, count]) => ticks(this.range[2 * axis], this.range[2 * axis + 1], this.log[axis], count));
    grid.replaceChildren();
    for (const value of xs) {
      const x = this.at(0, value);
      grid.append(make("line", { x1: x, x2: x, y1: this.top, y2: this.bottom }));
      grid.append(make("text", { class: "tick", x, y: this.bottom + 17 }, short(value)));
    }
    for (const value of ys) {
      const y = this.at(1, value);
      grid.append(make("line", { x1: this.left, x2: this.right, y1: y, y2: y }));
      grid.append(make("text", { class: "left", x: this.left - 7, y: y + 4 }, short(value)));
    }
  }

  move(event) {
    const [x, y] = this.place(event);
    if (this.from) {
      const [left, top] = [Math.min(x, this.from[0]), Math.min(y, this.from[1])];
      const [width, height] = [Math.abs(x - this.from[0]), Math.abs(y - this.from[1])];
      for (const [key, value] of Object.entries({ x: left, y: top, width, height, visibility: "visible" }))
        this.box.setAttribute(key, value);
      return;
    }
    let best = { distance: 900 }; // 30 pixels, squared
    for (const curve of this.curves)
      for (const each of this.points(curve)) {
        const distance = (each.px - x) ** 2 + (each.py - y) ** 2;
        if (distance < best.distance) best = { distance, curve, ...each };
      }
    if (!best.curve) return this.leave();
    this.mark.setAttribute("cx", best.px);
    this.mark.setAttribute("cy", best.py);
    this.mark.setAttribute("visibility", "visible");
    const where = `${this.svg.dataset.x} ${best.x.toLocaleString("en")}: ${this.svg.dataset.y} ${best.y}`;
    this.told.textContent = `${best.curve.title.split("\n")[0]}, ${where}`;
  }

  leave() {
    this.mark.setAttribute("visibility", "hidden");
    this.told.textContent = this.help;
  }

  zoom(event) {
    const from = this.from, to = this.place(event);
    this.from = undefined;
    this.box.setAttribute("visibility", "hidden");
    if (!from || Math.abs(to[0] - from[0]) < 8 || Math.abs(to[1] - from[1]) < 8) return;
    const [xs, ys] = [0, 1].map((axis) => [this.value(axis, from[axis]), this.value(axis, to[axis])].sort((a, b) => a - b));
    this.range = [...xs, ...ys];
    this.draw();
  }
}

document.querySelectorAll("svg.lines").forEach((svg) => new Chart(svg));
