// Gives a copied or added trainer a name of its own, so that its LoRA does not replace that of the other.

import { app } from "../../scripts/app.js";
import { allNodes, isConnected, isTrainer } from "./graph.js";
import { uniqueName } from "./names.js";
import { say } from "./texts.js";

let isLoading = false;

const widgetOf = (node) => node.widgets?.find(({ name }) => name === "name");

function rename(node) {
  const widget = widgetOf(node);
  const trainers = allNodes().map(([, other]) => other).filter(isTrainer);
  if (!widget || isConnected(node, "name") || !trainers.includes(node)) return;
  const others = trainers.filter((other) => other !== node && !isConnected(other, "name"));
  const name = uniqueName(String(widget.value), others.map((other) => String(widgetOf(other)?.value ?? "")));
  if (name === widget.value) return;
  widget.value = name;
  widget.callback?.(name);
  app.extensionManager?.toast?.add?.({ severity: "info", summary: say("copy.renamed", { name }), life: 5000 });
}

app.registerExtension({
  name: "ChromaTrainer.UniqueName",
  beforeConfigureGraph() {
    isLoading = true;
  },
  afterConfigureGraph() {
    isLoading = false;
  },
  nodeCreated(node) {
    // Later: a copied node gets its values, and its graph, after it is created. A loaded graph stays as it was saved.
    if (isTrainer(node) && !isLoading) setTimeout(() => rename(node));
  },
});
