// Nodes and their places in a graph with subgraphs.

import { app } from "../../scripts/app.js";

const CATEGORY = "ChromaTrainer";

// Whether a node is one of this pack.
export function isOurs(node) {
  return String(node.constructor.nodeData?.category ?? "").startsWith(CATEGORY);
}

// Whether a node trains, and thus has a name of its LoRA and a panel.
export function isTrainer(node) {
  return ["LoRATrainer", "QuickLora"].includes(node.comfyClass);
}

export function rootGraph() {
  return app.rootGraph ?? app.graph?.rootGraph ?? app.graph;
}

// The nodes that a prompt calls "12:5": the subgraph's node 12, and node 5 in it. Empty if one is missing.
export function nodesAt(id) {
  const nodes = [];
  let graph = rootGraph();
  for (const part of id.split(":")) {
    const node = graph?.getNodeById(Number(part));
    if (!node) return [];
    nodes.push(node);
    graph = node.subgraph;
  }
  return nodes;
}

// Every id that a prompt may use for a node: one, or one per instance of its subgraph.
export function idsOf(node, graph = rootGraph(), prefix = "") {
  if (node.graph === graph) return [`${prefix}${node.id}`];
  const outer = graph.nodes.filter((other) => other.subgraph);
  return outer.flatMap((other) => idsOf(node, other.subgraph, `${prefix}${other.id}:`));
}

// [id, node] of every node in a graph and in its subgraphs.
export function allNodes(graph = rootGraph(), prefix = "") {
  return (graph?.nodes ?? []).flatMap((node) => [
    [`${prefix}${node.id}`, node],
    ...(node.subgraph ? allNodes(node.subgraph, `${prefix}${node.id}:`) : []),
  ]);
}

// Whether an input of this name is connected. Front end 1.58 warns when input.link is read.
export function isConnected(node, name) {
  const slot = node.inputs?.findIndex((input) => (input.widget?.name ?? input.name) === name) ?? -1;
  return slot >= 0 && node.isInputConnected(slot);
}

// The values of a node's widgets as a workflow stores them, also of those that a connection replaces.
export function widgetValues(node) {
  const saved = (node.widgets ?? []).filter(({ type, name, serialize }) => type !== "button" && name && serialize !== false);
  return Object.fromEntries(saved.map(({ name, value }) => [name, value]));
}
