// The state of one run in the page: updated by messages and the run history, read by chart and panel. It uses neither
// DOM nor ComfyUI.

import { has, say } from "./texts.js";

const RECENT = 50; // number of steps that the pace is computed from

const COLUMNS = ["step", "loss", "learning_rate", "grad_norm", "seconds"];
// Bounds of what a page holds of a run, however long it is: as many points as the server's history has, and the newest as they came.
const MOST_POINTS = 8000;
const NEWEST_POINTS = 2000;
const OLDER_GROUPS = 3000;
const MOST_MARKS = 1000; // checkpoints, evaluations, images
const MOST_NOTICES = 20;

export class RunState {
  constructor() {
    this.clear("");
  }

  // Resets the state: from now on it belongs to the run of this folder, "" before there is one.
  clear(run) {
    Object.assign(this, {
      run, state: "", message: "", total: 0, phase: { phase: "", done: 0, total: 0, unit: "" },
      steps: Object.fromEntries(COLUMNS.map((name) => [name, []])),
      checkpoints: [], evals: [], leaks: [], scores: [], pictures: [], drawn: [], sampling: null, notices: [], lora: null, memory: null, plan: null, settings: null, prompt: null,
      summary: null, sweep: null,
    });
  }

  get step() {
    return this.steps.step.at(-1) ?? this.summary?.step ?? 0;
  }

  get numPoints() {
    return this.steps.step.length;
  }

  // What the run is doing, as text.
  get doing() {
    if (this.state !== "running") return stateText(this.state);
    const { phase } = this.phase;
    if (!phase) return say("state.starting"); // a process of its own takes seconds to its first phase
    return has(`phase.${phase}`) ? say(`phase.${phase}`) : phase;
  }

  // [done, total] of the progress bar: of the phase if it has its own count, else of the steps.
  get progress() {
    const { phase, done, total } = this.phase;
    if (this.state === "running" && phase !== "train" && total) return [done, total];
    return [this.step, this.total];
  }

  // Median seconds of the last steps; 0 if there are none. The median, because saves and images also take time.
  get pace() {
    const recent = this.steps.seconds.slice(-RECENT).filter((value) => value !== null).sort((a, b) => a - b);
    return recent.length ? recent[recent.length >> 1] : 0;
  }

  get secondsLeft() {
    return this.state === "running" && this.total && this.numPoints ? this.pace * (this.total - this.step) : null;
  }

  // Applies one message of chroma_trainer.event.
  take(message) {
    if (message.memory) this.memory = message.memory;
    if (message.kind !== "RunEnded") this.state = "running";
    const take = TAKE[message.kind];
    if (take) take(this, message);
  }

  // Appends steps, given as columns. Steps that are already there were lost by a resume and were repeated.
  append(columns, total) {
    const [first] = columns.step;
    if (first === undefined) return;
    if (first <= (this.steps.step.at(-1) ?? 0)) this.rewind(first - 1);
    for (const name of COLUMNS) for (const value of columns[name]) this.steps[name].push(value);
    if (this.numPoints > MOST_POINTS) this.steps = thinOut(this.steps);
    if (total) this.total = total;
  }

  // Drops every second of the older marks of a kind once there are too many; the newest stay.
  bound(name) {
    if (this[name].length > MOST_MARKS) this[name] = this[name].filter((_, i) => i % 2 || i >= MOST_MARKS / 2);
  }

  addNotice(notice) {
    this.notices = [...this.notices, notice].slice(-MOST_NOTICES);
  }

  addCheckpoint(step) {
    if (!this.checkpoints.includes(step)) this.checkpoints.push(step);
    this.bound("checkpoints");
  }

  addLeak(values) {
    this.leaks = inserted(this.leaks.filter((found) => found.step !== values.step), values);
    this.bound("leaks");
  }

  addScores(values) {
    const others = this.scores.filter(({ step, strength }) => step !== values.step || strength !== values.strength);
    this.scores = inserted(others, values);
    this.bound("scores");
  }

  // The scores that charts show, one of each step.
  get shownScores() {
    return this.scores.filter(({ is_shown, clip }) => is_shown && Number.isFinite(clip));
  }

  rewind(step) {
    let keep = this.steps.step.length;
    while (keep && this.steps.step[keep - 1] > step) keep--;
    for (const name of COLUMNS) this.steps[name].length = keep;
    this.checkpoints = this.checkpoints.filter((saved) => saved <= step);
    this.evals = this.evals.filter((found) => found.step <= step);
    this.leaks = this.leaks.filter((found) => found.step <= step);
    this.scores = this.scores.filter((found) => found.step <= step);
    this.pictures = this.pictures.filter((picture) => picture.step <= step);
  }

  // The evaluations on held-out images.
  get heldOut() {
    return this.evals.filter((found) => found.held_out && Number.isFinite(found.loss));
  }

  addEval(values) {
    this.evals = inserted(this.evals.filter((found) => found.step !== values.step), values);
    this.bound("evals");
  }

  addPicture(picture) {
    this.pictures = this.pictures.filter(({ step, label }) => step !== picture.step || label !== picture.label);
    this.pictures.push(picture);
    this.pictures.sort((a, b) => a.step - b.step);
    this.bound("pictures");
  }

  // Loads the history of a run, the answer of GET /chroma_trainer/runs/RUN.
  load(history) {
    const { sweep } = this; // a sweep goes on with the next run
    this.clear(history.summary.run);
    this.sweep = "sweep" in history ? history.sweep : sweep;
    this.follow(history);
    Object.assign(this, { settings: history.settings, prompt: history.prompt });
  }

  // Adds the newer part of a history, requested with ?after=.
  follow(history) {
    const { summary } = history;
    Object.assign(this, {
      summary, state: summary.state, message: summary.message,
      checkpoints: history.checkpoints, evals: history.evals ?? [], leaks: history.leaks ?? [], scores: history.scores ?? [], notices: history.notices,
      crops: history.crops, pairs: history.pairs, plan: history.plan, lora: history.lora?.lora ? history.lora : null,
      phase: { done: 0, total: 0, unit: "", phase: summary.phase, ...history.phase },
    });
    this.sweep = history.sweep ?? this.sweep;
    this.drawn = (history.drawn ?? []).map((image) => ({ ...image, url: `${image.url}&v=${image.changed}` }));
    this.append(history.steps, summary.total);
    if (summary.total) this.total = summary.total;
    this.pictures = [];
    for (const { step, url, label, changed } of history.pictures)
      this.addPicture({ step, label, url: `${url}&v=${changed}` });
  }
}

const TAKE = {
  RunWaiting(state) {
    state.state = "waiting";
  },
  RunOpened(state) {
    state.notices = []; // drop the warnings of an earlier start
  },
  PhaseStarted(state, { phase, total, unit }) {
    state.sampling = null;
    state.phase = { phase, done: 0, total, unit };
    if (phase === "train" && total) state.total = total;
  },
  PhaseProgress(state, { phase, done, total }) {
    const unit = state.phase.phase === phase ? state.phase.unit : "";
    state.phase = { phase, done, total, unit };
  },
  StepReports(state, { steps, total }) {
    state.phase = { phase: "train", done: 0, total, unit: "steps" };
    state.append(steps, total);
  },
  CheckpointSaved(state, { step }) {
    state.addCheckpoint(step);
  },
  EvalReport(state, { step, loss, standard_error, held_out }) {
    state.addEval({ step, loss, standard_error, held_out });
  },
  EvalCompared(state, { kind, node, name, run, memory, ...values }) {
    if (state.evals.at(-1)?.step === values.step) Object.assign(state.evals.at(-1), values);
  },
  LeakMeasured(state, { kind, node, name, run, memory, ...values }) {
    state.addLeak(values);
  },
  ImagesScored(state, { kind, node, name, run, memory, ...values }) {
    state.addScores(values);
  },
  SweepReported(state, { sweep, axes, planned, runs }) {
    const plans = state.sweep?.sweep === sweep ? state.sweep.plans : undefined;
    state.sweep = { sweep, axes, planned, runs, ...(plans ? { plans } : {}) };
  },
  SamplingPreview(state, { step, total, url }) {
    if (url) state.sampling = { step, total, url: `${url}&v=${Date.now()}` };
  },
  PreviewReady(state, { step, url, label }) {
    state.sampling = null;
    if (url && step >= 0) state.addPicture({ step, label, url: `${url}&v=${Date.now()}` });
  },
  LoraSaved(state, { lora, applied, num_keys, folder }) {
    state.lora = { lora, applied, num_keys, ...(folder ? { folder } : {}) };
  },
  Notice(state, { text, level }) {
    state.addNotice({ text, level });
  },
  MemoryPlanned(state, message) {
    state.plan = message;
  },
  RunEnded(state, message) {
    state.sampling = null;
    state.state = message.state;
    state.message = message.message;
  },
};

// The items with one more, in the order of their steps: a resumed run measures step 0 again.
function inserted(items, item) {
  return [...items, item].sort((a, b) => a.step - b.step);
}

// The columns with the older points in groups of about as many steps, each with the mean of its values and its last step.
function thinOut(columns) {
  const older = columns.step.length - NEWEST_POINTS;
  const span = (columns.step[older - 1] - columns.step[0]) / OLDER_GROUPS;
  const ends = []; // of groups
  for (let i = 0, start = columns.step[0]; i < older; i++) {
    if (i + 1 < older && columns.step[i + 1] - start < span) continue;
    ends.push(i + 1);
    start = columns.step[i + 1];
  }
  return Object.fromEntries(COLUMNS.map((name) => {
    const group = (end, i) => columns[name].slice(ends[i - 1] ?? 0, end);
    const groups = ends.map((end, i) => (name === "step" ? columns.step[end - 1] : mean(group(end, i))));
    return [name, groups.concat(columns[name].slice(older))];
  }));
}

// Of values that may be missing; null if all are. What is not finite stays so.
function mean(values) {
  const given = values.filter((value) => value !== null);
  return given.length ? given.reduce((sum, value) => sum + value, 0) / given.length : null;
}

// Running mean of the losses, corrected for the bias at the start; steps that are further apart have more weight.
export function smoothed({ step, loss }, total) {
  const share = Math.min(0.1, Math.max(0.005, 20 / (total || 1)));
  const means = [];
  let [mean, weight, last] = [0, 0, 0];
  for (let i = 0; i < step.length; i++) {
    if (Number.isFinite(loss[i])) {
      const keep = (1 - share) ** (step[i] - last);
      [mean, weight, last] = [mean * keep + loss[i] * (1 - keep), weight * keep + 1 - keep, step[i]];
    }
    means.push(weight ? mean / weight : null);
  }
  return means;
}

// The held-out loss in words: the newest, and how it has changed since its lowest; "" without held-out images.
export function heldOutText(state, number) {
  const newest = state.heldOut.at(-1);
  if (!newest) return "";
  const loss = number(newest.loss);
  if (!newest.waiting) return loss;
  const change = `${newest.change < 0 ? "\u2212" : "+"}${number(Math.abs(newest.change))}`;
  return say("panel.held.since", { loss, change, error: number(newest.change_error), step: newest.best });
}

// The newest leak without the trigger in words; "" where it is not measured.
export function leakText(state, number) {
  const newest = state.leaks.at(-1);
  return newest ? `${number(newest.leak)} \u00b1 ${number(newest.standard_error)}` : "";
}

// A newest score in words, and how it has changed from the base model's images; "" where it is not measured.
export function scoreText(state, name, number) {
  const newest = state.shownScores.at(-1);
  if (!newest || !Number.isFinite(newest[name])) return "";
  const error = (value) => (value ? ` \u00b1 ${number(value)}` : ""); // of one image there is none
  const score = `${number(newest[name])}${error(newest[`${name}_error`])}`;
  const change = newest[`${name}_change`];
  if (!Number.isFinite(change)) return score;
  const sign = change < 0 ? "\u2212" : "+";
  return `${score} (${sign}${number(Math.abs(change))}${error(newest[`${name}_change_error`])})`;
}

// The state of a run in words.
export function stateText(state) {
  const key = `state.${state || "none"}`;
  return has(key) ? say(key) : state;
}

export function clock(seconds) {
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (value) => String(value).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

export function bytes(value) {
  return value >= 1e10 ? `${(value / 2 ** 30).toFixed(0)} GB` : `${(value / 2 ** 30).toFixed(1)} GB`;
}

// "3 minutes ago", from seconds since 1970.
export function ago(time) {
  if (!time) return "";
  const minutes = Math.floor(Math.max(0, Date.now() / 1000 - time) / 60);
  if (minutes < 1) return say("ago.now");
  if (minutes < 60) return say("ago.minutes", { count: minutes });
  if (minutes < 1440) return say("ago.hours", { count: Math.floor(minutes / 60) });
  return say("ago.days", { count: Math.floor(minutes / 1440) });
}
