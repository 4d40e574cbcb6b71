// Loads the texts of ComfyUI's language before any node is created.

import { app } from "../../scripts/app.js";
import { speak } from "./texts.js";

await speak(app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en");
