// The sidebar's view of LoRA files: answers in lines, files that are none, charts and the family tree.

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import "./dom_stub.mjs";
import { load } from "./load.mjs";

const { Lines, work } = await load("long_work.js");
const { fileSize, isSafetensors } = await load("lora_view.js");
const { blockBars, drawBlocks, drawSpectrum } = await load("lora_charts.js");
const { drawFamily, relativeText } = await load("family_tree.js");
const { api } = await import("./comfyui_stub.mjs");

const bytes = (...values) => new Uint8Array(values);
const textOf = (element) => (typeof element === "string" ? element : element.children.map(textOf).join("|"));

describe("answers that take long", () => {
  const answer = (...pieces) => ({ ok: true, body: new ReadableStream({
    start(controller) {
      for (const piece of pieces) controller.enqueue(new TextEncoder().encode(piece));
      controller.close();
    },
  }) });

  test("lines arrive in pieces", () => {
    const lines = new Lines();
    assert.deepEqual([lines.take('{"a'), lines.take('":1}\n{"b":2}\n\n{'), lines.rest], [[], ['{"a":1}', '{"b":2}'], "{"]);
  });

  test("progress, then the result", async () => {
    const seen = [];
    api.fetchApi = async () => answer('{"done": 1, "tot', 'al": 3}\n{"done": 3, "total": 3}\n{"result": {"x": null}}\n');
    assert.deepEqual(await work("/x", {}, (...values) => seen.push(values)), { x: null });
    assert.deepEqual(seen, [[1, 3], [3, 3]]);
  });

  test("an error, and an answer that stops", async () => {
    api.fetchApi = async () => answer('{"error": "no such file"}\n');
    await assert.rejects(work("/x", {}, () => {}), /no such file/);
    api.fetchApi = async () => answer('{"done": 1, "total": 3}\n');
    await assert.rejects(work("/x", {}, () => {}), /incomplete/);
    api.fetchApi = async () => ({ ok: false, text: async () => "refused" });
    await assert.rejects(work("/x", {}, () => {}), /refused/);
  });
});

describe("files", () => {
  test("a safetensors file is known by its first bytes", () => {
    assert.ok(isSafetensors(bytes(64, 0, 0, 0, 0, 0, 0, 0, 123)));
    assert.ok(!isSafetensors(bytes(64, 0, 0, 0, 0, 0, 0, 0, 91)));
    assert.ok(!isSafetensors(bytes(0x50, 0x4b, 3, 4, 0, 0, 0, 0, 123))); // a zip: its header would have 67 MB
    assert.ok(!isSafetensors(bytes(1, 0, 0, 0, 0, 0, 0, 1, 123)));
    assert.ok(!isSafetensors(bytes(64, 0)));
  });

  test("sizes", () => {
    assert.deepEqual([1500, 12345678, 2.5e9].map(fileSize), ["1.5 kB", "12.3 MB", "2.5 GB"]);
  });
});

describe("charts", () => {
  test("bars of double and single blocks; blocks without an update are empty", () => {
    const [double, single, ...others] = blockBars({ "double 2": 0.5, "single 0": 1, "outside blocks": 3 });
    assert.deepEqual(double.bars.map(({ size }) => size), [0, 0, 0.5]);
    assert.deepEqual([single.kind, single.bars.length, others.length], ["single", 1, 0]);
    assert.equal(drawBlocks({}), null);
    assert.equal(drawBlocks({ "double 0": 0 }), null);
  });

  test("the spectrum needs two ranks", () => {
    const point = (rank, share) => ({ rank, low: share, median: share, high: share });
    assert.equal(drawSpectrum([point(1, 1)], 1), null);
    const figure = drawSpectrum([point(1, 0.8), point(2, 1)], 2);
    const paths = figure.children[1].children[0].children.filter(({ name }) => name === "path");
    assert.deepEqual(paths.map((path) => path.getAttribute("d")).at(-1), "M0 19.999999999999996L100 0");
  });
});

describe("the family tree", () => {
  const person = (name, more = {}) => ({ kind: "file", name, sha256: "a".repeat(64), operation: "", steps: null, applied: "", run: "", file: "", is_changed: false, parents: [], ...more });

  test("what made a LoRA, and how it was used", () => {
    assert.equal(relativeText(person("a", { steps: 300 })), "trained, 300 steps");
    assert.equal(relativeText(person("a", { operation: "lora merge", applied: "strength 0.5" })), "merged · strength 0.5");
    assert.equal(relativeText(person("a", { operation: "of another tool" })), "of another tool");
    assert.equal(relativeText(person("a", { kind: "model" })), "model");
  });

  test("files at hand open, runs too, and what is missing is said", () => {
    const opened = [];
    const parents = [person("here", { file: "x/here", run: "here-1" }), person("gone"), person("other", { is_changed: true })];
    const figure = drawFamily(person("root", { operation: "lora merge", parents }), { open: (file) => opened.push(file), openRun: (run) => opened.push(run) });
    const buttons = [];
    const walk = (element) => {
      if (element.name?.startsWith("button")) buttons.push(element);
      element.children?.forEach(walk);
    };
    walk(figure);
    buttons.forEach((button) => button.dispatch("click"));
    assert.deepEqual(opened, ["x/here", "here-1"]);
    assert.match(textOf(figure), /gone.*not in the folders.*other.*another file/s);
    assert.equal(drawFamily(person("alone"), {}), null);
  });
});
