// Hides the fields that few runs need, as Nodes 2.0 does by itself; a button at the end of the node shows them.

import { app } from "../../scripts/app.js";
import { after } from "./dom.js";
import { isConnected, isOurs } from "./graph.js";
import { say } from "./texts.js";

const ROW = 24; // pixels: height of a field on the canvas
const STATE = "folded"; // in the node's properties, so that the saved workflow keeps its look
const folds = new Set();

class Fold {
  constructor(node, advanced) {
    [this.node, this.advanced] = [node, advanced];
    this.defaults = new Map(advanced.map((widget) => [widget, widget.value]));
    this.button = node.addWidget("button", "", null, () => this.turn(), { serialize: false, canvasOnly: true });
    this.button.serialize = false;
    // After the fields, before a panel that already exists.
    const last = node.widgets.findLastIndex((widget) => widget.serialize !== false);
    node.widgets.splice(last + 1, 0, ...node.widgets.splice(node.widgets.indexOf(this.button), 1));
    this.node.properties[STATE] = true;
    this.apply();
    // After other extensions have added their widgets.
    setTimeout(() => this.isConfigured || node.setSize([node.size[0], this.isNative ? 0 : node.computeSize()[1]]));
  }

  get isNative() {
    return Boolean(window.LiteGraph?.vueNodesMode);
  }

  // A field that is connected or not at its default is shown: nothing that changes the run is hidden.
  hides(widget) {
    if (this.isNative || !this.node.properties[STATE]) return false;
    return !isConnected(this.node, widget.name) && widget.value === this.defaults.get(widget);
  }

  apply() {
    for (const widget of this.advanced) widget.hidden = this.hides(widget);
    const hidden = this.advanced.filter((widget) => widget.hidden).length;
    this.button.hidden = this.isNative || (this.node.properties[STATE] && !hidden);
    const label = this.node.properties[STATE] ? say("fold.more", { count: hidden }) : say("fold.fewer");
    this.button.name = this.button.label = label;
    this.node.setDirtyCanvas?.(true, true);
  }

  // The node grows or shrinks by the height of the rows; everything else in it, such as a panel, keeps its height.
  turn(folded = !this.node.properties[STATE]) {
    const before = this.node.computeSize()[1];
    this.node.properties[STATE] = folded;
    this.apply();
    const least = this.node.computeSize()[1];
    this.node.setSize([this.node.size[0], Math.max(least, this.node.size[1] + least - before)]);
  }

  // A workflow saved before folding existed has the height of all fields.
  configured(saved) {
    this.isConfigured = true;
    const wasFolded = saved?.properties?.[STATE];
    if (this.isNative) setTimeout(() => this.keepHeight(saved, wasFolded === undefined ? this.advanced.length * ROW : 0));
    if (wasFolded !== undefined) return this.apply();
    this.node.properties[STATE] = false;
    this.apply();
    this.turn(true);
  }

  // Nodes 2.0 draw a node as high as its content, or higher. When it loads, the page makes room for the fields that
  // Nodes 2.0 hide; they need none. hidden: the part of the saved height that those fields had.
  keepHeight(saved, hidden) {
    if (saved?.size) this.node.setSize([this.node.size[0], Math.max(0, saved.size[1] - hidden)]);
  }
}

app.registerExtension({
  name: "ChromaTrainer.Fold",
  setup() {
    app.ui?.settings?.addEventListener?.("Comfy.VueNodes.Enabled.change", () => folds.forEach((fold) => fold.apply()));
  },
  nodeCreated(node) {
    const advanced = isOurs(node) ? (node.widgets ?? []).filter((widget) => widget.options?.advanced) : [];
    if (!advanced.length) return;
    const fold = new Fold(node, advanced);
    folds.add(fold);
    after(node, "onConfigure", (saved) => fold.configured(saved));
    after(node, "onRemoved", () => folds.delete(fold));
  },
});
