// Colours of our connections, and of our nodes where nobody has chosen one.

import { app } from "../../scripts/app.js";

const LINKS = {
  TRAIN_MODEL: "#B39DDB", // as ComfyUI's MODEL, a little paler
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
  LoRATrainer: "#24425a",
  ValidateSampler: "#544a25",
  AdaptiveGuider: "#2f4a4a",
  AdapterSettings: "#3d3d45",
  OptimizerSettings: "#3d3d45",
  MemorySettings: "#3d3d45",
  PlanRun: "#3d3d45",
};

// The page empties the colours of all types of packs whenever it loads a palette, so they are set before each graph is drawn.
function paintLinks() {
  Object.assign(app.canvas?.default_connection_color_byType ?? {}, LINKS);
  Object.assign(window.LGraphCanvas?.link_type_colors ?? {}, LINKS);
  for (const [type, colour] of Object.entries(LINKS)) document.documentElement.style.setProperty(`--color-datatype-${type}`, colour); // Nodes 2.0
}

app.registerExtension({
  name: "chromaTrainer.colours",
  setup() {
    paintLinks();
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(paintLinks, 500)); // after the palette is in
  },
  beforeConfigureGraph: paintLinks,
  afterConfigureGraph: paintLinks,
  nodeCreated(node) {
    const colour = NODES[node.comfyClass];
    if (colour && !node.color) node.color = colour; // the title alone; a colour of the user's own comes with the workflow
  },
});
