// Configurations of other trainers that are dropped on the page, or opened with its menu: the imported workflow opens,
// and a dialog shows what became of each option.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addStyle } from "./dom.js";
import { ReportDialog } from "./report_dialog.js";
import { post } from "./requests.js";
import { say } from "./texts.js";

const ENDINGS = /\.(json|jsonc|ya?ml|toml|env|sh|bat|ps1|txt)$/i;
const MAX_BYTES = 1 << 20; // as the server's; no configuration is larger
const HANDLED = new WeakSet(); // files of a drop that an earlier one of them took along

let dropped = []; // the files of the last drop, which ComfyUI hands over one by one

// Text of a file that may be a configuration; null for others, such as images and ComfyUI's own workflows.
export async function configText(file) {
  if (!ENDINGS.test(file.name) || file.size > MAX_BYTES) return null;
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    return isComfy(text) ? null : text;
  } catch {
    return null; // not UTF-8
  }
}

// Whether a text is a workflow, an API export or a template of ComfyUI.
function isComfy(text) {
  if (!/^\s*\{/.test(text)) return false;
  try {
    const value = JSON.parse(text);
    return "nodes" in value || "templates" in value || Object.values(value).some((node) => node?.class_type);
  } catch {
    return false; // an example with comments, perhaps
  }
}

// The files of one drop that may be configurations, the given one first.
async function entriesOf(file) {
  const files = dropped.includes(file) ? [file, ...dropped.filter((other) => other !== file)] : [file];
  const entries = await Promise.all(files.map(async (each) => ({ file: each, text: await configText(each) })));
  return entries.filter(({ text }) => text !== null);
}

// The server's answer; null if no trainer is recognized.
async function convert(entries) {
  const files = entries.map(({ file, text }) => ({ name: file.name, text }));
  const answer = await api.fetchApi("/chroma_trainer/import", post({ files }));
  if (!answer.ok && answer.status !== 409) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

// Returns whether a file was a configuration, and opens it.
export async function importFile(file) {
  if (HANDLED.has(file)) return true;
  const entries = await entriesOf(file);
  if (entries[0]?.file !== file) return false;
  const answer = await convert(entries);
  if (!answer) return false;
  for (const entry of entries) HANDLED.add(entry.file);
  const dialog = new ReportDialog(answer, file.name);
  if (answer.workflow) await app.loadGraphData(answer.workflow, true, true, answer.file.replace(/\.\w+$/, ""));
  dialog.show();
  return true;
}

app.registerExtension({
  name: "ChromaTrainer.ImportFiles",
  setup() {
    addStyle();
    document.addEventListener("drop", (event) => { dropped = [...(event.dataTransfer?.files ?? [])]; }, true);
    const open = app.handleFile;
    app.handleFile = async function (file, ...rest) {
      try {
        if (await importFile(file)) return;
      } catch (error) {
        console.warn(`[ChromaTrainer] ${say("import.title")}:`, error); // ComfyUI says what it makes of the file
      }
      return open.call(this, file, ...rest);
    };
  },
});
