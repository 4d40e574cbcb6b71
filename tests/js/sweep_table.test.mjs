// js/sweep_table.js: the runs of a sweep as a table and a grid, also those that have not ended.

import assert from "node:assert/strict";
import { test } from "node:test";

import "./dom_stub.mjs";
import { load } from "./load.mjs";

const { SweepTable, aboveText, entriesOf, rowsOf, verdictOf } = await load("sweep_table.js");
const { RunState } = await load("run_state.js");

const estimate = (mean, error) => ({ mean, standard_error: error });
const row = (rank, rate, values = {}) => ({
  values: { rank, rate }, run: `s~${rank}-${rate}`, name: `s/${rank}-${rate}`, loss: 0.5, step: 20, is_best: false, difference: estimate(0.01, 0.004), is_worse: false,
  leak: estimate(0.3, 0.05), steps: 30, seconds_per_step: 0.5, stopped: null, ...values,
});
const RUNS = [row("4", "1"), row("4", "2", { is_best: true, difference: null }), row("8", "1", { is_worse: true, stopped: "it loses" })];
const PLANS = [...RUNS, row("8", "2")].map(({ values, run, name }) => ({ values, run, name }));
const SWEEP = { sweep: "s", axes: ["rank", "rate"], planned: 4, plans: PLANS, runs: RUNS };

const texts = (element, tag, found = []) => {
  for (const child of element.children ?? []) {
    if (child.name === tag) found.push(child.textContent);
    texts(child, tag, found);
  }
  return found;
};

test("how a run compares", () => {
  assert.deepEqual(RUNS.map(verdictOf), ["close", "best", "worse"]);
  assert.deepEqual([aboveText(RUNS[0]), aboveText(RUNS[1]), aboveText(row("1", "1", { difference: null }))], ["+0.01 ± 0.004", "best", "-"]);
  assert.deepEqual(entriesOf(SWEEP).map((entry) => Boolean(entry.row)), [true, true, true, false]);
});

test("a row for each run, a grid of two fields, and buttons to the runs that have ended", () => {
  const opened = [];
  const table = new SweepTable((run) => opened.push(run));
  table.draw(SWEEP, "s~8-2");
  assert.equal(table.element.hidden, false);
  const cells = texts(table.element, "td");
  assert.ok(cells.includes("0.5 at step 20") && cells.includes("30, stopped early") && cells.includes("training now") && cells.includes("0.3 ± 0.05"));
  assert.equal(cells.filter((text) => text === "+0.01 ± 0.004").length, 4); // twice in the grid, twice in the table
  assert.equal(texts(table.element, "button").length, 3);
  assert.deepEqual([rowsOf(SWEEP), rowsOf({ ...SWEEP, axes: ["rank"] })], [8.5, 5]);
  table.draw({ ...SWEEP, axes: ["rank"] }, "");
  assert.equal(texts(table.element, "button").length, 3);
  table.draw(null);
  assert.equal(table.element.hidden, true);
});

test("a sweep stays while its runs follow one another", () => {
  const state = new RunState();
  state.take({ kind: "SweepReported", sweep: "s", axes: ["rank"], planned: 2, runs: [] });
  const summary = { run: "s~a", state: "running", message: "", total: 1, step: 0, phase: "train" };
  const history = { summary, steps: { step: [], loss: [], learning_rate: [], grad_norm: [], seconds: [] }, checkpoints: [], notices: [], phase: {}, lora: {}, plan: {}, pictures: [], sweep: SWEEP };
  state.load(history);
  assert.equal(state.sweep.plans.length, 4);
  state.take({ kind: "SweepReported", sweep: "s", axes: ["rank"], planned: 4, runs: RUNS.slice(0, 1) });
  assert.deepEqual([state.sweep.plans.length, state.sweep.runs.length], [4, 1]);
  state.load({ ...history, sweep: null });
  assert.equal(state.sweep, null);
});
