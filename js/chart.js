// The loss curve of a run: raw and smoothed, the loss of held-out images with its error, that of trained ones on the same
// noise, the learning rate on a second axis, checkpoints and images as marks.
// SVG, because a node is scaled with the canvas: it stays sharp at every zoom and uses ComfyUI's colors.

import { el, set, svg, text } from "./dom.js";
import { clock, smoothed } from "./run_state.js";
import { say } from "./texts.js";

const EDGE = { left: 40, right: 44, top: 8, bottom: 20 };
const MARK_PIXELS = 9; // minimum distance between two marks
const CLIPPED = 0.01; // share of the raw losses, at each end, that may lie outside of the chart

export class Chart {
  constructor() {
    this.parts = {
      grid: svg("g.ct-grid"), rate: svg("path.ct-rate"), raw: svg("path.ct-raw"), smooth: svg("path.ct-smooth"),
      trained: svg("path.ct-trained"), held: svg("path.ct-held"), evals: svg("g.ct-evals"), clip: svg("path.ct-clip"), scores: svg("g.ct-scores"), marks: svg("g.ct-marks"), cursor: svg("line.ct-cursor"), spot: svg("circle.ct-spot", { r: 3 }),
    };
    this.svg = svg("svg.ct-svg", { role: "img", "aria-label": say("panel.chart") }, ...Object.values(this.parts));
    this.tip = el("div.ct-tip", { hidden: "" });
    this.element = el("div.ct-chart", {
      onpointermove: (event) => this.hover(event), onpointerleave: () => this.leave(),
    }, this.svg, this.tip);
    this.leave();
  }

  draw(state) {
    const [width, height] = [this.element.clientWidth, this.element.clientHeight];
    if (width < 80 || height < 50) return;
    set(this.svg, { viewBox: `0 0 ${width} ${height}`, width, height });
    const { step, loss, learning_rate: rate } = state.steps;
    const smooth = smoothed(state.steps, state.total);
    const x = scale([0, span(state)], [EDGE.left, width - EDGE.right]);
    const columns = bucketed(step, loss, x);
    const evals = state.heldOut;
    const y = scale(range(columns, [...smooth, ...evals.flatMap(({ loss, trained }) => [loss, trained ?? null])]), [height - EDGE.bottom, EDGE.top]);
    // Not Math.max(...rate): a long run overflows the stack.
    const top = rate.reduce((highest, value) => (value > highest ? value : highest), 0) || 1;
    const yRate = scale([0, top * 1.04], [height - EDGE.bottom, EDGE.top]);
    this.view = { state, smooth, x, y };
    if (state.numPoints) this.drawGrid(width, height, x, y, top);
    else this.parts.grid.replaceChildren();
    set(this.parts.raw, { d: band(columns, y) });
    set(this.parts.smooth, { d: line(step, smooth, x, y) });
    set(this.parts.rate, { d: line(step, rate, x, yRate) });
    this.drawEvals(state.numPoints ? evals : [], x, y);
    this.drawScores(state.numPoints ? state.shownScores : [], x, height);
    this.drawMarks(state, x, height);
    if (this.at !== null) this.point();
  }

  drawGrid(width, height, x, y, top) {
    const bottom = height - EDGE.bottom;
    const elements = [];
    for (const value of ticks(y.domain, Math.max(2, Math.floor((bottom - EDGE.top) / 28)))) {
      elements.push(svg("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }));
      elements.push(label(EDGE.left - 6, y(value) + 3, short(value), "end"));
    }
    for (const value of ticks(x.domain, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger))
      elements.push(label(x(value), bottom + 14, String(value), "middle"));
    elements.push(label(width - EDGE.right + 9, EDGE.top + 4, rateText(top), "start", "ct-rate-text"));
    elements.push(label(width - EDGE.right + 9, bottom, "0", "start", "ct-rate-text"));
    this.parts.grid.replaceChildren(...elements);
  }

  drawEvals(evals, x, y) {
    const steps = evals.map(({ step }) => step);
    set(this.parts.held, { d: line(steps, evals.map(({ loss }) => loss), x, y) });
    set(this.parts.trained, { d: line(steps, evals.map(({ trained }) => trained ?? NaN), x, y) });
    this.parts.evals.replaceChildren(...evals.map(({ step, loss, overfits }) =>
      svg(`circle.ct-eval${overfits ? ".ct-overfits" : ""}`, { cx: x(step), cy: y(loss), r: 2.5 })));
  }

  // CLIP scores have a scale of their own, from their lowest to their highest: the tip says the values.
  drawScores(scores, x, height) {
    const values = scores.map(({ clip }) => clip);
    const y = scale([Math.min(...values), Math.max(...values)], [height - EDGE.bottom - 12, EDGE.top + 12]);
    const steps = scores.map(({ step }) => step);
    set(this.parts.clip, { d: line(steps, values, x, y) });
    this.parts.scores.replaceChildren(...scores.map(({ step, clip }) => svg("circle.ct-score", { cx: x(step), cy: y(clip), r: 2.5 })));
  }

  drawMarks(state, x, height) {
    const bottom = height - EDGE.bottom;
    const elements = [];
    for (const step of apart(state.checkpoints, x))
      elements.push(svg("path.ct-saved", { d: `M${x(step)} ${bottom - 6}l4 6h-8z` }));
    for (const step of apart(state.pictures.map((picture) => picture.step), x))
      elements.push(svg("rect.ct-pictured", { x: x(step) - 3, y: EDGE.top - 3, width: 6, height: 6, rx: 1.5 }));
    this.parts.marks.replaceChildren(...elements);
  }

  hover(event) {
    const box = this.svg.getBoundingClientRect(); // in screen pixels: the node may be zoomed
    this.at = ((event.clientX - box.left) / (box.width || 1)) * this.element.clientWidth;
    this.point();
  }

  leave() {
    this.at = null;
    this.tip.hidden = true;
    for (const name of ["cursor", "spot"]) this.parts[name].style.display = "none";
  }

  point() {
    if (!this.view?.state.numPoints) return;
    const { state, smooth, x, y } = this.view;
    const { step, loss, learning_rate: rate, seconds } = state.steps;
    const i = nearest(step, x.invert(this.at));
    const place = x(step[i]);
    set(this.parts.cursor, { x1: place, x2: place, y1: EDGE.top, y2: this.element.clientHeight - EDGE.bottom });
    set(this.parts.spot, { cx: place, cy: y(smooth[i] ?? y.domain[0]) });
    for (const name of ["cursor", "spot"]) this.parts[name].style.display = "";
    const hasImages = state.pictures.some((picture) => picture.step === step[i]);
    const marks = [state.checkpoints.includes(step[i]) && say("tip.checkpoint"), hasImages && say("tip.images")];
    const held = state.heldOut.find((found) => found.step === step[i]);
    if (held) marks.push(say("tip.held", { loss: short(held.loss), error: short(held.standard_error) }));
    if (held?.overfits) marks.push(say("tip.overfits"));
    const leak = state.leaks.find((found) => found.step === step[i]);
    if (leak) marks.push(say("tip.leak", { leak: short(leak.leak), error: short(leak.standard_error) }));
    const scored = state.shownScores.find((found) => found.step === step[i]);
    if (scored) marks.push(say("tip.clip", { score: short(scored.clip), error: short(scored.clip_error) }));
    const lines = [
      say("step", { step: step[i] }), say("tip.loss", { loss: short(loss[i]), smooth: short(smooth[i]) }),
      say("tip.rate", { rate: rateText(rate[i]), pace: pace(seconds[i]) }), ...marks.filter(Boolean),
    ];
    text(this.tip, lines.join("\n"));
    this.tip.hidden = false;
    const width = this.tip.offsetWidth;
    const left = place + 10 + width > this.element.clientWidth ? place - 10 - width : place + 10;
    Object.assign(this.tip.style, { left: `${Math.max(0, left)}px`, top: `${EDGE.top}px` });
  }
}

function scale([low, high], [from, to]) {
  const size = high - low || 1;
  const place = (value) => Math.round((from + ((value - low) / size) * (to - from)) * 100) / 100;
  const invert = (at) => low + ((at - from) / (to - from)) * size;
  return Object.assign(place, { domain: [low, high], invert });
}

// Last step of the axis. It grows in jumps, so that the curve of a long run that has just started is not a sliver.
function span(state) {
  const [last, total] = [state.step || 1, Math.max(state.total, state.step, 1)];
  if (state.state !== "running") return total;
  const power = 10 ** Math.floor(Math.log10(last * 1.2));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= last * 1.2);
  return Math.min(total, Math.max(50, size));
}

// The steps to mark: all of a few, some of many, at least MARK_PIXELS apart; always the last.
function apart(steps, x) {
  let next = Infinity;
  return [...steps].sort((a, b) => b - a).filter((step) => {
    const free = x(step) <= next;
    if (free) next = x(step) - MARK_PIXELS;
    return free;
  });
}

// One column per pixel: [x, lowest, highest]. Thousands of steps become a few hundred points.
function bucketed(step, loss, x) {
  const columns = [];
  for (let i = 0; i < step.length; i++) {
    if (!Number.isFinite(loss[i])) continue;
    const place = Math.round(x(step[i]));
    const last = columns.at(-1);
    if (last?.[0] === place) [last[1], last[2]] = [Math.min(last[1], loss[i]), Math.max(last[2], loss[i])];
    else columns.push([place, loss[i], loss[i]]);
  }
  return columns;
}

// Range of the loss axis: the whole smoothed curve and nearly all raw losses, so that a single spike does not flatten
// the rest.
function range(columns, smooth) {
  const values = smooth.filter((value) => value !== null);
  if (!values.length) return [0, 1];
  const [lows, highs] = [1, 2].map((side) => columns.map((column) => column[side]).sort((a, b) => a - b));
  const clipped = Math.floor(columns.length * CLIPPED);
  const low = Math.min(lows[clipped], values.reduce((a, b) => Math.min(a, b)));
  const high = Math.max(highs[highs.length - 1 - clipped], values.reduce((a, b) => Math.max(a, b)));
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - margin, high + margin];
}

function band(columns, y) {
  const clip = (value) => y(Math.min(y.domain[1], Math.max(y.domain[0], value)));
  return columns.map(([x, low, high], i) => {
    const start = `${i ? "L" : "M"}${x} ${clip(high)}`;
    return high > low ? `${start}L${x} ${clip(low)}` : start;
  }).join("");
}

function line(step, values, x, y) {
  let [path, last] = ["", -Infinity];
  for (let i = 0; i < step.length; i++) {
    const place = x(step[i]);
    if (!Number.isFinite(values[i]) || (place - last < 0.5 && i < step.length - 1)) continue;
    path += `${path ? "L" : "M"}${place} ${y(values[i])}`;
    last = place;
  }
  return path;
}

function ticks([low, high], num) {
  const rough = (high - low) / num;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
  const first = Math.ceil(low / size);
  const length = Math.floor(high / size) - first + 1;
  return Array.from({ length }, (_, i) => Number(((first + i) * size).toPrecision(10)));
}

function nearest(step, target) {
  let [low, high] = [0, step.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (step[middle] < target) low = middle + 1;
    else high = middle;
  }
  return low && target - step[low - 1] < step[low] - target ? low - 1 : low;
}

function label(x, y, value, anchor, name = "ct-label") {
  return svg(`text.${name}`, { x, y, "text-anchor": anchor }, value);
}

export function short(value) {
  return value === null || value === undefined ? "-" : String(Number(value.toPrecision(3)));
}

export function rateText(value) {
  return value === null || value === undefined ? "-" : value && value < 0.001 ? value.toExponential(1) : short(value);
}

export function pace(seconds) {
  if (!seconds) return "-";
  if (seconds < 100) return say("pace.seconds", { value: short(seconds) });
  return say("pace.clock", { value: clock(seconds) });
}
