// js/problems.js: what a rejected prompt says, beside what the page says by itself.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { app } from "./comfyui_stub.mjs";
import { load } from "./load.mjs";

const { tell } = await load("problems.js");
const told = [];

beforeEach(() => {
  told.length = 0;
  app.extensionManager = { toast: { add: (toast) => told.push(toast) } };
  const inner = { getNodeById: (id) => (id === 5 ? { title: "My trainer" } : undefined) };
  app.rootGraph = { getNodeById: (id) => (id === 12 ? { title: "A subgraph", subgraph: inner } : undefined) };
});

const problems = [["targets", "'x' is no layer"], ["steps", "is 0"]];

test("each problem has the name of its own field, under the title of its node", () => {
  tell({ node: "12:5", problems }, "LoRA Trainer rejected the value for name.");
  assert.equal(told.length, 1);
  assert.equal(told[0].summary, "My trainer");
  assert.equal(told[0].detail, "targets: 'x' is no layer\nsteps: is 0");
  assert.equal(told[0].severity, "error");
});

test("a node that is not on the page is named by its id", () => {
  tell({ node: "7", problems }, "");
  assert.equal(told[0].summary, "7");
});

test("what the page shows is not told again", () => {
  tell({ node: "12:5", problems }, "Custom validation failed for node: name - steps: is 0");
  assert.equal(told[0].detail, "targets: 'x' is no layer");
  told.length = 0;
  tell({ node: "12:5", problems }, "targets: 'x' is no layer\nsteps: is 0");
  assert.deepEqual(told, []);
});
