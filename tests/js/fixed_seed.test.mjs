// js/fixed_seed.js: the seed of a new node stays as it is.

import assert from "node:assert/strict";
import { test } from "node:test";

import { app } from "./comfyui_stub.mjs";
import { load } from "./load.mjs";

await load("fixed_seed.js");
const [extension] = app.extensions;

function created(category) {
  const node = { constructor: { nodeData: { category } }, widgets: [{ name: "seed", value: 7 }, { name: "control_after_generate", value: "randomize" }] };
  extension.nodeCreated(node);
  return node.widgets.map(({ value }) => value);
}

test("a new node of this pack keeps its seed", () => {
  assert.deepEqual(created("ChromaTrainer/training"), [7, "fixed"]);
});

test("nodes of others are left as they are", () => {
  assert.deepEqual(created("sampling"), [7, "randomize"]);
  extension.nodeCreated({ constructor: {}, widgets: undefined });
});
