// The sidebar's view of datasets: what it sends of a node, what it shows of a report, and what is left out.

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import "./dom_stub.mjs";
import { load } from "./load.mjs";

const { DatasetView, findingsOf, shareOfSquare, valuesOf } = await load("dataset_view.js");
const { api, app } = await import("./comfyui_stub.mjs");

function node(values, connected = []) {
  const names = Object.keys(values);
  return {
    id: 3, comfyClass: "DatasetBackend", title: "Anna", inputs: names.map((name) => ({ name, widget: { name } })),
    widgets: [...names.map((name) => ({ name, value: values[name] })), { name: "button", type: "button" }, { name: "live", serialize: false }],
    isInputConnected: (slot) => connected.includes(names[slot]),
  };
}

const image = (number, more = {}) => ({ number, name: `${number}.png`, value: "", ...more });
const REPORT = {
  report: "token", folders: ["anna"], images: 4, usable: 3, buckets: { "64x64": 3 }, remarks: ["a remark"], leave_out: [2, 4],
  findings: [
    { kind: "copies", severity: "warning", text: "equal", count: 2, images: [image(1, { group: 1 }), image(2, { group: 1 })] },
    { kind: "blurry", severity: "warning", text: "blurry", count: 1, images: [image(2)] },
  ],
};

function all(element, test) {
  const children = (element.children ?? []).flatMap((child) => all(child, test));
  return element.attributes && test(element) ? [element, ...children] : children;
}

describe("what a node names", () => {
  test("its own values, without buttons and connected fields", () => {
    assert.deepEqual(valuesOf(node({ folder: "anna", resolution: 512 })), { folder: "anna", resolution: 512 });
    assert.deepEqual(valuesOf(node({ folder: "anna", resolution: 512 }, ["folder"])), { resolution: 512 });
  });

  test("a part of an image in its square", () => {
    assert.deepEqual(shareOfSquare(200, 100, [0, 0, 1, 1]), [0, 0.25, 1, 0.75]);
    assert.deepEqual(shareOfSquare(100, 200, [0.5, 0, 1, 0.5]), [0.5, 0, 0.75, 0.5]);
  });
});

describe("a report", () => {
  function shown() {
    const view = new DatasetView({ notify: () => {} });
    view.draw(structuredClone(REPORT), node({ folder: "anna" }));
    view.list.querySelectorAll = (selector) => {
      const number = /"(\d+)"/.exec(selector)[1];
      return all(view.list, (element) => element.getAttribute("data-number") === number);
    };
    return view;
  }

  test("kinds are filtered", () => {
    assert.deepEqual(findingsOf(REPORT, "").map(({ kind }) => kind), ["copies", "blurry"]);
    const view = shown();
    const chips = all(view.report, (element) => element.getAttribute("data-kind") !== null && element.name === "button");
    assert.deepEqual(chips.map((chip) => chip.getAttribute("aria-pressed")), ["true", "false", "false"]);
    chips[2].dispatch("click");
    assert.deepEqual(chips.map((chip) => chip.getAttribute("aria-pressed")), ["false", "false", "true"]);
    assert.equal(view.list.children.length, 1);
  });

  test("an image of several findings is left out once, and stays where it is chosen", () => {
    const view = shown();
    const boxes = () => all(view.list, (element) => element.getAttribute("data-number") === "2");
    assert.deepEqual([boxes().length, boxes().map(({ checked }) => checked)], [2, [true, true]]);
    boxes()[0].checked = false;
    boxes()[0].dispatch("change");
    assert.deepEqual([boxes()[1].checked, [...view.leftOut], view.copy.disabled], [false, [4], false]);
    view.mark(4, false);
    assert.equal(view.copy.disabled, true);
  });

  test("the copy is named in the node", async () => {
    const view = shown();
    const sent = [];
    const bodies = [{ result: { folder: "anna-clean", images: 2, path: "/x" } }];
    api.fetchApi = async (path, { body }) => {
      sent.push([path, JSON.parse(body)]);
      return { ok: true, body: new ReadableStream({
        start(controller) {
          controller.enqueue(new TextEncoder().encode(`${JSON.stringify(bodies.shift())}\n`));
          controller.close();
        },
      }) };
    };
    app.graph = { nodes: [view.node], rootGraph: null };
    await view.write();
    assert.deepEqual(sent, [["/chroma_trainer/datasets/copy", { report: "token", leave_out: [2, 4] }]]);
    all(view.result, (element) => element.getAttribute("data-command") === "use")[0].dispatch("click");
    assert.equal(view.node.widgets[0].value, "anna-clean");
  });
});
