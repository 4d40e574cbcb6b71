// Says why ComfyUI rejected a prompt. Its newer front ends show that a node was rejected, at the node's first field, and
// the reason only after two clicks.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodesAt } from "./graph.js";

const WAIT_MS = 800; // until the page has shown what it shows by itself
const LIFE_MS = 30000;

// Tells the problems of a node, unless the page shows them already: in the dialog of an older front end, or told before.
export function tell({ node, problems }, shown = document.body.textContent) {
  const untold = problems.filter(([, message]) => !shown.includes(message));
  if (!untold.length) return;
  app.extensionManager.toast.add({
    severity: "error", summary: nodesAt(node).at(-1)?.title ?? node,
    detail: untold.map(([field, message]) => `${field}: ${message}`).join("\n"), life: LIFE_MS,
  });
}

api.addEventListener("chroma_trainer.problems", ({ detail }) => setTimeout(() => tell(detail), WAIT_MS));
