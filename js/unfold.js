// The button of a QuickLora node: opens the full graph that the node runs, in a tab of its own.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { isConnected, widgetValues } from "./graph.js";
import { post } from "./requests.js";
import { say } from "./texts.js";

const NODE = "QuickLora";

function toast(severity, detail) {
  app.extensionManager?.toast?.add?.({ severity, summary: say("unfold.title"), detail, life: severity === "error" ? 15000 : 5000 });
}

async function unfold(node) {
  const connected = Object.keys(widgetValues(node)).filter((name) => isConnected(node, name));
  if (connected.length) return toast("error", say("unfold.connected", { names: connected.join(", ") }));
  const answer = await api.fetchApi("/chroma_trainer/unfold", post(widgetValues(node)));
  const { workflow, error } = await answer.json();
  if (error) return toast("error", error);
  await app.loadGraphData(workflow, true, true, null); // null: a new tab, so that this workflow stays as it is
}

app.registerExtension({
  name: "ChromaTrainer.Unfold",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const call = () => unfold(node).catch((error) => toast("error", String(error)));
    const button = node.addWidget("button", "unfold", null, call, { serialize: false });
    button.label = say("unfold.button");
    button.serialize = false;
  },
});
