// A new node keeps its seed. By ComfyUI's default it would change with each Run: a training that was stopped would begin anew with another
// seed instead of going on.

import { app } from "../../scripts/app.js";
import { isOurs } from "./graph.js";

const CONTROL = "control_after_generate";

app.registerExtension({
  name: "ChromaTrainer.FixedSeed",
  nodeCreated(node) {
    if (!isOurs(node)) return;
    // A saved node gets its own value afterwards.
    for (const widget of node.widgets ?? []) if (widget.name === CONTROL) widget.value = "fixed";
  },
});
