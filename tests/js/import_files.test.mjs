// js/import_files.js: which dropped files the importer takes, what it leaves to ComfyUI, and the report.

import assert from "node:assert/strict";
import { File } from "node:buffer"; // no global before Node 20
import { beforeEach, describe, test } from "node:test";

import { api, app } from "./comfyui_stub.mjs";
import "./dom_stub.mjs";
import { load } from "./load.mjs";

const opened = []; // by ComfyUI itself
const graphs = [];
const sent = [];
let answer = null;
let status = 200;

app.handleFile = async function (file, ...rest) {
  opened.push([file.name, this === app, ...rest]);
};
app.loadGraphData = async (...values) => graphs.push(values);
api.fetchApi = async (url, { body }) => {
  sent.push([url, JSON.parse(body).files.map(({ name }) => name)]);
  return { ok: status === 200, status, json: async () => answer };
};
await load("import_files.js");
app.extensions.at(-1).setup();

const REPORT = { taken: [{ option: "rank", text: "16 -> LoRATrainer.rank 16" }], equal: [], missing: [{ option: "ema", text: "on" }] };
const IMPORTED = { trainer: "SimpleTuner", file: "config.json", workflow: { nodes: [] }, report: REPORT };
const CONFIG = '{"model_family": "chroma"}';

const file = (name, content, type = "") => new File([content], name, { type });

async function drop(...files) {
  document.dispatch("drop", { dataTransfer: { files } });
  for (const each of files) await app.handleFile(each, "file_drop");
}

document.dispatch = (type, event) => document.listeners.get(type)(event);

function texts(element) {
  return typeof element === "string" ? element : element.children.map(texts).join("\n");
}

beforeEach(() => {
  for (const list of [opened, graphs, sent]) list.length = 0;
  document.body.children = [];
  answer = IMPORTED;
  status = 200;
});

describe("what is left to ComfyUI", () => {
  const untouched = {
    "a workflow": file("workflow.json", '{"last_node_id": 1, "nodes": [], "version": 0.4}', "application/json"),
    "an API export": file("api.json", '{"3": {"class_type": "KSampler", "inputs": {}}}', "application/json"),
    "templates": file("templates.json", '{"templates": []}', "application/json"),
    "an image": file("image.png", CONFIG, "image/png"),
    "a large file": file("large.json", " ".repeat((1 << 20) + 1)),
    "a text in another encoding": file("umlaut.yaml", new Uint8Array([0xfc])),
  };
  for (const [what, each] of Object.entries(untouched)) test(`${what}, without asking the server`, async () => {
    await drop(each);
    assert.deepEqual([sent, opened, graphs], [[], [[each.name, true, "file_drop"]], []]);
  });

  test("what the server does not recognize", async () => {
    answer = null;
    await drop(file("other.json", '{"a": 1}'));
    assert.deepEqual([sent.length, opened, document.body.children], [1, [["other.json", true, "file_drop"]], []]);
  });

  test("everything, while the server can't answer", async () => {
    status = 500;
    await drop(file("config.json", CONFIG));
    assert.equal(opened.length, 1);
  });
});

describe("a configuration", () => {
  test("opens under its name, with the report in three lists", async () => {
    await drop(file("config.json", CONFIG));
    assert.deepEqual([opened, graphs], [[], [[IMPORTED.workflow, true, true, "config"]]]);
    const [dialog] = document.body.children;
    const [heading, body, close] = dialog.children;
    assert.deepEqual(body.children.map((list) => list.getAttribute("data-list")), ["missing", "taken", "equal"]);
    assert.ok(texts(heading).includes("SimpleTuner") && texts(body).includes("LoRATrainer.rank 16"));
    assert.equal(dialog.getAttribute("open"), "");
    close.dispatch("click");
    assert.deepEqual(document.body.children, []);
  });

  test("is sent once with the files that were dropped with it, and not with those of an earlier drop", async () => {
    await drop(file("readme.png", "x", "image/png"), file("workflow.json", '{"nodes": []}'), file("multi.json", "[]"), file("config.json", CONFIG));
    assert.deepEqual(sent, [["/chroma_trainer/import", ["multi.json", "config.json"]]]);
    assert.deepEqual(opened.map(([name]) => name), ["readme.png", "workflow.json"]);
    assert.deepEqual(graphs.map(([, , , name]) => name), ["config"]);
    await app.handleFile(file("config.json", CONFIG), "file_button");
    assert.deepEqual(sent[1][1], ["config.json"]);
  });

  test("that can't be imported says why, and changes no graph", async () => {
    status = 409;
    answer = { error: "config.json: learning_rate: 'x' is not a number" };
    await drop(file("config.json", CONFIG));
    assert.deepEqual([opened, graphs], [[], []]);
    assert.ok(texts(document.body).includes("is not a number"));
  });
});
