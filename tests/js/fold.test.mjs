// js/fold.js: which advanced fields of a node are hidden on the canvas, and what the button says.

import assert from "node:assert/strict";
import { beforeEach, describe, mock, test } from "node:test";

import { app } from "./comfyui_stub.mjs";
import { load } from "./load.mjs";

const ROW = 24; // height of a widget

const timers = [];
globalThis.setTimeout = (call) => timers.push(call);
globalThis.window = { LiteGraph: { vueNodesMode: false } };
await load("fold.js");
const [extension] = app.extensions;
extension.setup();

const runTimers = () => timers.splice(0).forEach((call) => call());

beforeEach(() => {
  timers.length = 0;
  window.LiteGraph.vueNodesMode = false;
});

// A node as LiteGraph makes it: each field that is not hidden takes a row.
class Node {
  constructor(fields, { category = "ChromaTrainer/settings", panel = 0, onConfigure } = {}) {
    this.constructor = { nodeData: { category } };
    Object.assign(this, { properties: {}, inputs: [], size: [200, 0], onConfigure });
    this.widgets = Object.entries(fields).map(([name, advanced]) => ({ name, value: `default ${name}`, options: { advanced } }));
    if (panel) this.widgets.push({ name: "live", serialize: false, height: panel });
    this.size[1] = this.computeSize()[1];
    extension.nodeCreated(this);
  }

  isInputConnected(slot) {
    return this.inputs[slot].link != null;
  }

  addWidget(type, name, value, callback, options) {
    const widget = { type, name, value, callback, options };
    this.widgets.push(widget);
    return widget;
  }

  computeSize() {
    return [200, this.widgets.filter(({ hidden }) => !hidden).reduce((sum, { height = ROW }) => sum + height, 0)];
  }

  setSize(size) {
    this.size = size;
  }

  get button() {
    return this.widgets.find(({ type }) => type === "button");
  }

  widget(name) {
    return this.widgets.find((widget) => widget.name === name);
  }

  get shown() {
    return this.widgets.filter((widget) => !widget.hidden && widget !== this.button).map(({ name }) => name);
  }

  // LiteGraph sets properties and values of a saved node, then calls onConfigure.
  configure({ properties = {}, values = {}, size }) {
    Object.assign(this.properties, properties);
    for (const [name, value] of Object.entries(values)) this.widget(name).value = value;
    this.onConfigure({ properties, size });
  }
}

const FIELDS = { steps: false, rank: false, seed: true, warmup: true, tiles: true };

function wire(node, name) {
  node.inputs.push({ widget: { name }, link: 7 });
}

describe("a new node", () => {
  test("hides its advanced fields and counts them", () => {
    const node = new Node(FIELDS);
    assert.deepEqual(node.shown, ["steps", "rank"]);
    assert.equal(node.button.label, "3 more settings");
    assert.equal(node.button.name, node.button.label);
  });

  test("is resized to its visible rows, after other extensions have added theirs", () => {
    const node = new Node(FIELDS);
    runTimers();
    assert.equal(node.size[1], 3 * ROW);
  });

  test("keeps the order of its fields: workflows store values by position", () => {
    const node = new Node(FIELDS, { panel: 100 });
    assert.deepEqual(node.widgets.map(({ name }) => name), [...Object.keys(FIELDS), "3 more settings", "live"]);
    assert.equal(node.button.serialize, false);
    assert.equal(node.button.options.serialize, false);
  });

  test("without advanced fields gets no button", () => {
    const node = new Node({ steps: false });
    assert.equal(node.button, undefined);
    assert.deepEqual(node.properties, {});
  });

  test("of another pack is not changed", () => {
    for (const category of ["sampling", "", null]) {
      const node = new Node(FIELDS, { category });
      assert.equal(node.button, undefined);
      assert.deepEqual(node.shown, Object.keys(FIELDS));
    }
  });

  test("without widgets is not changed", () => {
    extension.nodeCreated({ constructor: { nodeData: { category: "ChromaTrainer" } }, properties: {} });
    extension.nodeCreated({ constructor: {}, properties: {} });
  });
});

describe("what stays visible", () => {
  const refold = (node) => {
    node.button.callback();
    node.button.callback();
    return node;
  };

  test("a wired field, and it is not counted", () => {
    const node = new Node(FIELDS);
    wire(node, "warmup");
    refold(node);
    assert.deepEqual(node.shown, ["steps", "rank", "warmup"]);
    assert.equal(node.button.label, "2 more settings");
  });

  test("a changed field, and it is not counted", () => {
    const node = new Node(FIELDS);
    node.widget("seed").value = 5;
    refold(node);
    assert.deepEqual(node.shown, ["steps", "rank", "seed"]);
    assert.equal(node.button.label, "2 more settings");
  });

  test("not a field that is back at its default, or no longer wired", () => {
    const node = new Node(FIELDS);
    node.widget("seed").value = 5;
    wire(node, "warmup");
    refold(node);
    node.widget("seed").value = "default seed";
    node.inputs[0].link = null;
    refold(node);
    assert.equal(node.button.label, "3 more settings");
  });

  test("not a field because another one is wired", () => {
    const node = new Node(FIELDS);
    wire(node, "rank");
    node.inputs.push({ name: "dataset", link: 8 });
    assert.deepEqual(refold(node).shown, ["steps", "rank"]);
  });

  test("a field that is wired by link 0", () => {
    const node = new Node(FIELDS);
    node.inputs.push({ widget: { name: "tiles" }, link: 0 });
    assert.deepEqual(refold(node).shown, ["steps", "rank", "tiles"]);
  });

  test("all fields, when each is wired or changed", () => {
    const node = new Node(FIELDS);
    for (const name of ["seed", "tiles"]) wire(node, name);
    node.widget("warmup").value = 0;
    assert.deepEqual(refold(node).shown, Object.keys(FIELDS));
    assert.equal(node.button.hidden, true);
  });

  test("and the count is right, for every combination of wires and changes", () => {
    for (let choice = 0; choice < 64; choice++) {
      const node = new Node(FIELDS);
      const open = ["seed", "warmup", "tiles"].filter((name, i) => {
        const [isWired, isChanged] = [choice & (1 << i), choice & (8 << i)];
        if (isWired) wire(node, name);
        if (isChanged) node.widget(name).value = 1;
        return isWired || isChanged;
      });
      refold(node);
      assert.deepEqual(node.shown, ["steps", "rank", ...open]);
      const num = 3 - open.length;
      assert.equal(node.button.hidden, num === 0);
      if (num) assert.equal(node.button.label, num === 1 ? "1 more setting" : `${num} more settings`);
    }
  });
});

describe("the button", () => {
  test("shows all fields, then hides them again, and resizes the node by their rows", () => {
    const node = new Node(FIELDS);
    runTimers();
    node.button.callback();
    assert.deepEqual(node.shown, Object.keys(FIELDS));
    assert.equal(node.button.label, "fewer settings");
    assert.equal(node.size[1], 6 * ROW);
    node.button.callback();
    assert.deepEqual(node.shown, ["steps", "rank"]);
    assert.equal(node.size[1], 3 * ROW);
  });

  test("keeps the height that the user gave to a panel", () => {
    const node = new Node(FIELDS, { panel: 100 });
    runTimers();
    node.setSize([200, node.size[1] + 77]);
    const before = node.size[1];
    node.button.callback();
    assert.equal(node.size[1], before + 3 * ROW);
    node.button.callback();
    assert.equal(node.size[1], before);
  });

  test("stores the state in the properties, which are saved", () => {
    const node = new Node(FIELDS);
    assert.equal(node.properties.folded, true);
    node.button.callback();
    assert.equal(node.properties.folded, false);
  });
});

describe("a saved node", () => {
  test("opens as it was saved", () => {
    for (const folded of [true, false]) {
      const node = new Node(FIELDS);
      node.configure({ properties: { folded } });
      assert.equal(node.shown.length, folded ? 2 : 5);
    }
  });

  test("shows the fields that were saved with another value", () => {
    const node = new Node(FIELDS);
    node.configure({ properties: { folded: true }, values: { warmup: 20 } });
    assert.deepEqual(node.shown, ["steps", "rank", "warmup"]);
    assert.equal(node.button.label, "2 more settings");
  });

  test("keeps its saved size", () => {
    const node = new Node(FIELDS);
    node.size = [200, 500];
    node.configure({ properties: { folded: true } });
    runTimers();
    assert.equal(node.size[1], 500);
  });

  test("of a version without folding is folded and shrinks by the hidden rows", () => {
    const node = new Node(FIELDS);
    node.size = [200, 500];
    node.configure({});
    assert.deepEqual(node.shown, ["steps", "rank"]);
    assert.equal(node.properties.folded, true);
    assert.equal(node.size[1], 500 - 3 * ROW);
  });

  test("still runs the onConfigure of other extensions", () => {
    const onConfigure = mock.fn(() => "theirs");
    const node = new Node(FIELDS, { onConfigure });
    assert.equal(node.onConfigure({ properties: {} }), "theirs");
    assert.equal(onConfigure.mock.callCount(), 1);
  });
});

describe("Nodes 2.0, which folds by itself", () => {
  const switchTo = (isNative) => {
    window.LiteGraph.vueNodesMode = isNative;
    app.ui.settings.dispatchEvent(new Event("Comfy.VueNodes.Enabled.change"));
  };

  test("hides no field, and hides the button", () => {
    window.LiteGraph.vueNodesMode = true;
    const node = new Node(FIELDS);
    assert.deepEqual(node.shown, Object.keys(FIELDS));
    assert.equal(node.button.hidden, true);
  });

  test("keep the saved height, without the rows of the fields that they hide if those were saved unfolded", () => {
    window.LiteGraph.vueNodesMode = true;
    for (const [properties, height] of [[{ folded: true }, 500], [{}, 500 - 3 * ROW]]) {
      const node = new Node(FIELDS);
      node.configure({ properties, size: [200, 500] });
      node.size = [200, 900]; // the page makes room for all fields
      runTimers();
      assert.equal(node.size[1], height);
    }
  });

  test("can be switched on and off", () => {
    const node = new Node(FIELDS);
    switchTo(true);
    assert.deepEqual(node.shown, Object.keys(FIELDS));
    assert.equal(node.button.hidden, true);
    switchTo(false);
    assert.deepEqual(node.shown, ["steps", "rank"]);
    assert.equal(node.button.hidden, false);
  });

  test("does not update nodes that were removed", () => {
    const node = new Node(FIELDS);
    node.onRemoved();
    switchTo(true);
    assert.deepEqual(node.shown, ["steps", "rank"]);
  });
});
