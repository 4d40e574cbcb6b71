// The panel of a run: phase, progress, pace, memory, the loss curve and the newest images.

import { Chart, pace, rateText, short } from "./chart.js";
import { el, set, text } from "./dom.js";
import { Pictures } from "./pictures.js";
import { bytes, clock, heldOutText, leakText, scoreText, smoothed } from "./run_state.js";
import { SweepTable, rowsOf } from "./sweep_table.js";
import { say } from "./texts.js";

const FRAME_MS = 100; // between two redraws
const HEIGHT = { empty: 44, status: 110, chart: 230, pictures: 220, sweep: 40, row: 22, most: 330 };

export class Panel {
  // hasSweep: whether the runs of a sweep are listed in the panel.
  constructor({ hasSweep = true } = {}) {
    this.sweep = hasSweep ? new SweepTable() : null;
    this.chart = new Chart();
    this.pictures = new Pictures();
    this.parts = {
      doing: el("span.ct-doing", { role: "status" }), count: el("span.ct-count"), left: el("span.ct-left"), bar: el("i", { role: "progressbar", "aria-label": say("panel.progress"), "aria-valuemin": 0, "aria-valuemax": 100 }),
      facts: el("div.ct-facts"), note: el("div.ct-note", { hidden: "" }),
    };
    const { doing, count, left, bar, facts, note } = this.parts;
    this.element = el("div.ct-panel", { "data-state": "" },
      el("div.ct-head", {}, el("span.ct-dot"), doing, count, left), el("div.ct-bar", {}, bar), facts,
      this.chart.element, this.pictures.element, ...(this.sweep ? [this.sweep.element] : []), note);
    this.lastDraw = 0;
    this.observer = new ResizeObserver(() => this.update());
    this.observer.observe(this.element);
  }

  // Height in pixels that the panel needs to be readable.
  get minHeight() {
    if (!this.state?.state) return HEIGHT.empty;
    const { numPoints, pictures, sampling } = this.state;
    const { sweep } = this.state;
    const table = sweep ? Math.min(HEIGHT.most, HEIGHT.sweep + HEIGHT.row * rowsOf(sweep)) : 0;
    return (numPoints ? HEIGHT.chart : HEIGHT.status) + (pictures.length || sampling ? HEIGHT.pictures : 0) + table;
  }

  show(state) {
    this.state = state;
    this.update();
  }

  // Schedules a redraw, at most ten times a second however many messages arrive.
  update() {
    if (this.waiting || !this.state) return;
    this.waiting = true;
    const wait = Math.max(0, this.lastDraw + FRAME_MS - performance.now());
    setTimeout(() => requestAnimationFrame(() => {
      this.waiting = false;
      this.lastDraw = performance.now();
      this.draw();
    }), wait);
  }

  draw() {
    const { state, parts } = this;
    const [done, total] = state.progress;
    set(this.element, {
      "data-state": state.state, "data-phase": state.phase.phase, "data-step": state.step, "data-total": state.total,
      "data-points": state.numPoints, "data-run": state.run, "data-pictures": state.pictures.length + (state.sampling ? 1 : 0),
      "data-checkpoints": state.checkpoints.length, "data-evals": state.heldOut.length,
      "data-overfits": Boolean(state.heldOut.at(-1)?.overfits),
    });
    text(parts.doing, state.doing);
    text(parts.count, total ? `${done} / ${total}` : "");
    const left = state.secondsLeft;
    text(parts.left, left !== null && state.phase.phase === "train" ? say("panel.left", { time: clock(left) }) : "");
    const percent = total ? Math.min(100, (100 * done) / total) : 0;
    parts.bar.style.width = `${percent}%`;
    set(parts.bar, { "aria-valuenow": Math.round(percent) });
    this.drawFacts(state);
    this.drawNote(state);
    this.pictures.draw(state.pictures, state.sampling);
    this.chart.draw(state);
    this.sweep?.draw(state.sweep, state.run);
  }

  drawFacts(state) {
    const facts = [];
    if (state.numPoints) {
      const loss = smoothed(state.steps, state.total).at(-1);
      const rate = rateText(state.steps.learning_rate.at(-1));
      facts.push([say("panel.loss"), short(loss), say("panel.loss.tip"), "ct-key-loss"]);
      facts.push([say("panel.rate"), rate, say("panel.rate.tip"), "ct-key-rate"]);
      facts.push(["", pace(state.pace), say("panel.pace.tip")]);
    }
    const held = heldOutText(state, short);
    if (held) facts.push([say("panel.held"), held, say("panel.held.tip"), "ct-key-held"]);
    const leak = leakText(state, short);
    if (leak) facts.push([say("panel.leak"), leak, say("panel.leak.tip")]);
    const clip = scoreText(state, "clip", short);
    if (clip) facts.push([say("panel.clip"), clip, say("panel.clip.tip"), "ct-key-clip"]);
    const likeness = scoreText(state, "likeness", short);
    if (likeness) facts.push([say("panel.likeness"), likeness, say("panel.likeness.tip")]);
    if (state.memory && state.state === "running") {
      const { kind, used, total } = state.memory;
      const planned = state.plan?.[kind === "RAM" ? "ram_bytes" : "device_bytes"];
      const inUse = planned ? say("panel.planned", { used: bytes(used), planned: bytes(planned) }) : bytes(used);
      facts.push([kind, inUse, say("panel.memory.tip", { kind, total: bytes(total) })]);
    }
    if (state.lora) {
      const { lora, applied, num_keys: numKeys } = state.lora;
      facts.push(["", lora, say("panel.keys", { applied, count: numKeys }), "ct-file"]);
    }
    this.parts.facts.replaceChildren(...facts.map(([name, value, title, style]) =>
      el(`span${style ? `.${style}` : ""}`, { title }, ...(name ? [`${name} `] : []), el("b", {}, value))));
  }

  drawNote(state) {
    const warning = state.message || state.notices.filter(({ level }) => level === "warning").at(-1)?.text || "";
    this.parts.note.hidden = !warning;
    text(this.parts.note, warning);
    set(this.parts.note, { title: warning });
  }

  remove() {
    this.observer.disconnect();
  }
}
