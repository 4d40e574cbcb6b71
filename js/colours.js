// Colors of our connections, and of our nodes if the user has not chosen one.

import { app } from "../../scripts/app.js";

const LINKS = {
  TRAIN_MODEL: "#B39DDB", // like ComfyUI's MODEL, a little paler
  TRAIN_DATASET: "#8BC34A",
  TRAIN_ADAPTER: "#F48FB1",
  TRAIN_OPTIMIZER: "#FFB74D",
  TRAIN_MEMORY: "#80CBC4",
  TRAINED_LORA: "#4FC3F7",
  VALIDATION: "#FFD54F",
};
const NODES = {
  LoadChroma: "#3a3350",
  LoadFlux: "#3a3350",
  QuantizeModel: "#3a3350",
  DatasetBackend: "#33452a",
  SaveDataset: "#33452a",
  LoRATrainer: "#24425a",
  QuickLora: "#24425a",
  ValidateSampler: "#544a25",
  AdaptiveGuider: "#2f4a4a",
  AdapterSettings: "#3d3d45",
  OptimizerSettings: "#3d3d45",
  MemorySettings: "#3d3d45",
  PlanRun: "#3d3d45",
};

// The page clears the colors of all custom types when it loads a palette, so they are set before each graph is drawn.
function paintLinks() {
  Object.assign(app.canvas?.default_connection_color_byType ?? {}, LINKS);
  Object.assign(window.LGraphCanvas?.link_type_colors ?? {}, LINKS);
  const { style } = document.documentElement;
  for (const [type, color] of Object.entries(LINKS)) style.setProperty(`--color-datatype-${type}`, color); // Nodes 2.0
}

app.registerExtension({
  name: "chromaTrainer.colours",
  setup() {
    paintLinks();
    const repaint = () => setTimeout(paintLinks, 500); // after the palette is loaded
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", repaint);
  },
  beforeConfigureGraph: paintLinks,
  afterConfigureGraph: paintLinks,
  nodeCreated(node) {
    const color = NODES[node.comfyClass];
    if (color && !node.color) node.color = color; // the title only; the user's own color is in the workflow
  },
});
