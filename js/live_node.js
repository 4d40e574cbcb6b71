// The live panel of a LoRATrainer node.

import { app } from "../../scripts/app.js";
import { addStyle, after } from "./dom.js";
import { findRun, openRun, stateOf, watch } from "./feed.js";
import { Panel } from "./panel.js";
import { RunState } from "./run_state.js";

const NODE = "LoRATrainer";
const panels = new WeakMap(); // node -> Panel

function rootGraph() {
  return app.rootGraph ?? app.graph?.rootGraph ?? app.graph;
}

// The node that a prompt calls "12:5": node 5 in the subgraph of node 12.
function nodeAt(id) {
  let [graph, node] = [rootGraph(), null];
  for (const part of id.split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

// Every id that a prompt may use for a node: one, or one per instance of its subgraph.
function idsOf(node, graph = rootGraph(), prefix = "") {
  if (node.graph === graph) return [`${prefix}${node.id}`];
  const outer = graph.nodes.filter((other) => other.subgraph);
  return outer.flatMap((other) => idsOf(node, other.subgraph, `${prefix}${other.id}:`));
}

function nameOf(node) {
  return String(node.widgets?.find(({ name }) => name === "name")?.value ?? "");
}

// Shows a state if the node and the run belong together: another workflow may use the same node ids.
function show(node, name, state) {
  const panel = node && panels.get(node);
  if (!panel) return;
  const linked = node.inputs?.find((input) => input.name === "name")?.link != null;
  if (panel.state !== state && name !== nameOf(node) && !linked) return;
  const before = panel.minHeight;
  panel.show(state);
  if (panel.minHeight !== before) node.setDirtyCanvas?.(true, true);
}

async function refill(node) {
  const name = nameOf(node);
  for (const id of idsOf(node)) {
    try {
      const run = stateOf(id, name) ? null : await findRun(id, name);
      const state = stateOf(id, name) ?? (run && (await openRun(run, id, name)));
      if (state) return show(node, name, state);
    } catch (error) {
      console.warn("[ChromaTrainer] could not load the history of a run:", error);
    }
  }
}

function addPanel(node) {
  const panel = new Panel();
  panel.show(new RunState());
  panels.set(node, panel);
  const widget = node.addDOMWidget("live", "chroma_trainer_live", panel.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => panel.minHeight,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // not in the saved workflow, where it would have no meaning
  after(node, "onConfigure", () => setTimeout(() => refill(node)));
  after(node, "onRemoved", () => panel.remove());
  after(node, "onExecuted", async (output) => {
    const run = output?.chroma_trainer_run?.[0]; // also set by a cached node
    if (run && panel.state.run !== run) show(node, nameOf(node), await openRun(run, idsOf(node)[0], nameOf(node)));
  });
}

watch((id, name, state) => show(nodeAt(id), name, state));

app.registerExtension({
  name: "ChromaTrainer.LiveNode",
  setup: addStyle,
  nodeCreated(node) {
    if (node.comfyClass === NODE) addPanel(node);
  },
});
