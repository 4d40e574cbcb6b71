// The live panel of a node that trains, and of the nodes of the subgraphs around it.

import { app } from "../../scripts/app.js";
import { addStyle, after } from "./dom.js";
import { findRun, openRun, stateOf, waitingState, watch } from "./feed.js";
import { idsOf, isConnected, isTrainer, nodesAt } from "./graph.js";
import { isOfSweep } from "./names.js";
import { Panel } from "./panel.js";
import { RunState } from "./run_state.js";

const ADDED_MS = 500;
const SUBGRAPH_WIDTH = 300; // pixels, for a panel that can be read
const panels = new WeakMap(); // node -> Panel

function nameOf(node) {
  return String(node.widgets?.find(({ name }) => name === "name")?.value ?? "");
}

// Shows a state if the node of that id and the run belong together: another workflow may use the same node ids.
function show(id, name, state) {
  const nodes = nodesAt(id);
  const node = nodes.at(-1);
  const panel = node && panels.get(node);
  if (!panel) return;
  const own = nameOf(node);
  if (panel.state !== state && name !== own && !isOfSweep(own, name) && !isConnected(node, "name")) return;
  for (const shown of nodes) showOn(shown, state);
}

function showOn(node, state) {
  const panel = panels.get(node) ?? addPanel(node);
  panel.show(state);
  if (panel.minHeight === panel.room) return; // not compared with before show(): it may be the same state, which has changed
  panel.room = panel.minHeight;
  makeRoom(node);
}

// A node on the canvas grows with its panel. Nodes 2.0 are as high as their content: the least height keeps the node from
// growing and shrinking with each line of text.
function makeRoom(node) {
  const { element, minHeight } = panels.get(node);
  element.style.minHeight = window.LiteGraph?.vueNodesMode ? `${minHeight}px` : "";
  if (!window.LiteGraph?.vueNodesMode) {
    const least = node.computeSize();
    const width = Math.max(node.size[0], node.subgraph ? SUBGRAPH_WIDTH : 0);
    if (width > node.size[0] || least[1] > node.size[1]) node.setSize([width, Math.max(node.size[1], least[1])]);
  }
  node.setDirtyCanvas?.(true, true);
}

async function refill(node) {
  const name = nameOf(node);
  for (const id of idsOf(node)) {
    for (const outer of nodesAt(id).slice(0, -1)) if (!panels.has(outer)) makeRoom(addPanel(outer).node);
    try {
      const state = stateOf(id, name) ?? (await findState(id, name));
      if (state) show(id, name, state);
    } catch (error) {
      console.warn("[ChromaTrainer] could not load the history of a run:", error);
    }
  }
}

async function findState(id, name) {
  const { run, waits } = await findRun(id, name);
  if (waits) return waitingState(id, name);
  return run && openRun(run, id, name);
}

function addPanel(node) {
  const panel = Object.assign(new Panel(), { node });
  panel.show(new RunState());
  panels.set(node, panel);
  const widget = node.addDOMWidget("live", "chroma_trainer_live", panel.element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true, // the page's panel of properties would show an empty field
    getMinHeight: () => panel.minHeight,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // not in the saved workflow, where it would have no meaning
  after(node, "onRemoved", () => panel.remove());
  return panel;
}

function follow(node) {
  const panel = addPanel(node);
  let isConfigured = false;
  after(node, "onConfigure", () => {
    isConfigured = true;
    setTimeout(() => refill(node));
  });
  // A node that is added, or read from the prompt in a LoRA or an image, is not configured: it gets its values after it is created.
  setTimeout(() => isConfigured || !node.graph || refill(node), ADDED_MS);
  after(node, "onExecuted", async (output) => {
    const run = output?.chroma_trainer_run?.[0]; // also set by a cached node
    const [id] = idsOf(node);
    if (run && panel.state.run !== run) show(id, nameOf(node), await openRun(run, id, nameOf(node)));
  });
}

watch(show);

app.registerExtension({
  name: "ChromaTrainer.LiveNode",
  setup: addStyle,
  nodeCreated(node) {
    if (isTrainer(node)) follow(node);
  },
});
