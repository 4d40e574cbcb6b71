// The sidebar's view of LoRA files: pick one of ComfyUI's folders or drop one, read what it is, write a repaired file.

import { api } from "../../scripts/api.js";
import { disabledDuring, el, text } from "./dom.js";
import { drawFamily } from "./family_tree.js";
import { work } from "./long_work.js";
import { drawBlocks, drawSpectrum } from "./lora_charts.js";
import { ask, post } from "./requests.js";
import { has, say } from "./texts.js";
import { Waiting } from "./waiting.js";

const ROOT = "/chroma_trainer/loras";
const MAX_HEADER = 24_000_000; // bytes, as the server's limit
const MARKS = { error: "pi-times-circle", warning: "pi-exclamation-triangle", note: "pi-info-circle" };

// Whether the first nine bytes are those of a safetensors file: the size of its header, and a JSON object.
export function isSafetensors(start) {
  if (start.length < 9) return false;
  const size = new DataView(start.buffer, start.byteOffset).getBigUint64(0, true);
  return size >= 2n && size <= BigInt(MAX_HEADER) && start[8] === "{".charCodeAt(0);
}

export function fileSize(bytes) {
  const [unit, name] = bytes < 1e6 ? [1e3, "kB"] : bytes < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
  return `${Number((bytes / unit).toPrecision(3))} ${name}`;
}

export class LoraView {
  // notify(severity, summary, detail); openRun(run) shows a run.
  constructor({ notify, openRun }) {
    Object.assign(this, { notify, openRun, asked: null });
    this.list = el("datalist", { id: "chroma-trainer-loras" });
    this.box = el("input.ct-input", {
      type: "search", list: "chroma-trainer-loras", placeholder: say("lora.pick"), "aria-label": say("lora.pick"),
      spellcheck: "false", onchange: () => this.picked(), onfocus: () => this.fetchNames(),
    });
    this.file = el("input", { type: "file", accept: ".safetensors", hidden: "", onchange: () => this.chosen() });
    this.drop = el("button.ct-drop", { type: "button", onclick: () => this.file.click() },
      el("i.pi.pi-upload", { "aria-hidden": "true" }), el("span", {}, say("lora.drop")));
    this.waiting = new Waiting();
    this.report = el("div.ct-report");
    this.element = el("div.ct-view", { "data-lora": "" }, this.box, this.list, this.drop, this.file, this.waiting.element, this.report);
    this.names = [];
  }

  async look() {
    if (!this.names.length) await this.fetchNames();
    return false;
  }

  async fetchNames() {
    const { loras } = await (await api.fetchApi(ROOT)).json();
    if (loras.join("\n") === this.names.join("\n")) return;
    this.names = loras;
    this.list.replaceChildren(...loras.map((value) => el("option", { value })));
  }

  picked() {
    const name = this.box.value.trim();
    if (name) this.open(name);
  }

  chosen() {
    const [file] = this.file.files;
    this.file.value = "";
    if (file) this.take(file);
  }

  // Shows the report of a file in ComfyUI's folders.
  open(lora) {
    this.box.value = lora;
    return this.examine({ lora });
  }

  // Sends a file that was dropped, and shows its report.
  async take(file) {
    this.box.value = "";
    const start = new Uint8Array(await file.slice(0, 9).arrayBuffer());
    if (!isSafetensors(start)) return this.notify("error", say("lora.failed"), say("lora.notone", { name: file.name }));
    try {
      const path = `${ROOT}/upload?name=${encodeURIComponent(file.name)}`;
      const sent = await this.waiting.during(say("lora.sending", { name: file.name }), (signal) => ask(path, { method: "POST", body: file, signal }));
      if (sent) await this.examine({ upload: sent.upload });
    } catch (error) {
      this.notify("error", say("lora.failed"), error.message);
    }
  }

  async examine(asked) {
    this.forget();
    this.asked = asked;
    this.report.replaceChildren();
    this.element.dataset.lora = "";
    const result = await this.during("lora.reading", "report");
    if (result && this.asked === asked) this.draw(result);
  }

  // The result of a request about the file that is shown; undefined if it failed or was ended.
  async during(title, path) {
    try {
      return await this.waiting.during(say(title), (signal, progress) => work(`${ROOT}/${path}`, this.asked, progress, signal));
    } catch (error) {
      this.notify("error", say("lora.failed"), error.message);
      return undefined;
    }
  }

  draw(report) {
    const figures = [drawBlocks(report.block_norms), drawSpectrum(report.spectrum, report.needed_rank),
      drawFamily(report.family, { open: (file) => this.open(file), openRun: this.openRun })];
    this.result = el("p.ct-result", { "aria-live": "polite" });
    this.report.replaceChildren(el("h3.ct-title", {}, report.file), facts(report), this.buttons(report), this.result,
      findings(report.findings), ...figures.filter(Boolean));
    this.element.dataset.lora = report.file;
  }

  buttons(report) {
    const button = (key, icon, call) => el("button.ct-button", {
      type: "button", title: say(`${key}.tip`), "data-command": key, onclick: disabledDuring(call),
    }, el(`i.pi.${icon}`, { "aria-hidden": "true" }), say(key));
    return el("div.ct-buttons", {},
      ...(report.can_repair ? [button("lora.repair", "pi-wrench", () => this.repair())] : []),
      ...(this.asked.upload ? [button("lora.save", "pi-save", () => this.save())] : []));
  }

  async repair() {
    const written = await this.during("lora.repairing", "repair");
    if (!written) return;
    const open = el("button.ct-link", { type: "button", onclick: () => this.open(written.lora) }, written.lora);
    this.result.replaceChildren(`${say("lora.repaired")} `, open, `. ${written.text}`);
  }

  async save() {
    try {
      const { lora } = await ask(`${ROOT}/save`, post(this.asked));
      text(this.result, say("lora.saved", { name: lora }));
    } catch (error) {
      this.notify("error", say("lora.failed"), error.message);
    }
  }

  // The server removes a file that was sent as soon as it is no longer shown.
  forget() {
    if (this.asked?.upload) api.fetchApi(`${ROOT}/forget`, { ...post(this.asked), keepalive: true }).catch(() => {});
    this.asked = null;
  }

  remove() {
    this.waiting.remove();
    this.forget();
  }
}

function facts(report) {
  const { tool, base, kinds, ranks, loaded, keys } = report;
  const kindText = Object.entries(kinds).map(([kind, count]) => say("lora.layers", { count, kind })).join(", ");
  const rankText = Object.keys(ranks).length ? say("lora.rank", { rank: [...new Set([Object.keys(ranks)[0], Object.keys(ranks).at(-1)])].join("-") }) : "";
  const rows = [
    ["lora.tool", tool.name, tool.evidence], ["lora.kind", [kindText, rankText].filter(Boolean).join(", ")],
    ["lora.base", base.name, base.reason], ["lora.trigger", report.trigger],
    ...Object.entries(loaded).map(([program, count]) => ["lora.loads", say("panel.keys", { applied: count, count: keys }), "", program]),
    ["lora.size", [fileSize(report.bytes), ...Object.keys(report.dtypes)].join(", ")],
  ];
  return el("table.ct-facts-table", {}, ...rows.filter(([, value]) => value).map(([key, value, title = "", program = ""]) =>
    el("tr", {}, el("th", { scope: "row" }, say(key, { program })), el("td", title ? { title } : {}, value))));
}

function findings(list) {
  if (!list.length) return el("p.ct-sound", {}, el("i.pi.pi-check-circle", { "aria-hidden": "true" }), say("lora.sound"));
  return el("ul.ct-findings", {}, ...list.map(({ severity, text: words, repaired }) =>
    el("li", { "data-severity": severity }, el(`i.pi.${MARKS[severity]}`, { role: "img", "aria-label": has(`severity.${severity}`) ? say(`severity.${severity}`) : severity }),
      el("span", {}, words, ...(repaired ? [el("span.ct-doing-soft", {}, ` (${say("lora.repairs")})`)] : [])))));
}
