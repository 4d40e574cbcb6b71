// The sidebar's view of datasets: examine the folder that a Dataset Backend on the canvas names, look at what was found image
// by image, and have a copy written without some of them. The folder itself stays as it is.

import { api } from "../../scripts/api.js";
import { el, set, text } from "./dom.js";
import { listRuns } from "./feed.js";
import { allNodes, isConnected, widgetValues } from "./graph.js";
import { work } from "./long_work.js";
import { say } from "./texts.js";
import { Waiting } from "./waiting.js";

const ROOT = "/chroma_trainer/datasets";
const NODE = "DatasetBackend";
const FEW = 24; // images of a finding that are shown at first
const MARKS = { warning: "pi-exclamation-triangle", note: "pi-info-circle" };

// The values of a node's widgets that its own connections do not replace, as the server takes them.
export function valuesOf(node) {
  return Object.fromEntries(Object.entries(widgetValues(node)).filter(([name]) => !isConnected(node, name)));
}

// The images whose findings are of a kind that is shown, finding by finding. "": all kinds.
export function findingsOf(report, kind) {
  return report.findings.filter((finding) => !kind || finding.kind === kind);
}

export class DatasetView {
  // notify(severity, summary, detail)
  constructor({ notify }) {
    this.notify = notify;
    this.nodes = new Map(); // id -> node
    this.leftOut = new Set();
    this.folders = el("select.ct-input", { "aria-label": say("dataset.folder"), onfocus: () => this.listNodes() });
    this.runs = el("select.ct-input", { "aria-label": say("dataset.run"), title: say("dataset.run.tip") });
    this.button = el("button.ct-button", { type: "button", "data-command": "examine", onclick: () => this.examine() },
      el("i.pi.pi-search", { "aria-hidden": "true" }), say("dataset.examine"));
    this.none = el("p.ct-none", { hidden: "" }, say("dataset.none"));
    this.waiting = new Waiting();
    this.report = el("div.ct-report");
    this.form = el("div.ct-view", {}, el("label.ct-field", {}, say("dataset.folder"), this.folders),
      el("label.ct-field", {}, say("dataset.run"), this.runs), el("div.ct-buttons", {}, this.button));
    this.element = el("div.ct-view", { "data-dataset": "" }, this.none, this.form, this.waiting.element, this.report);
  }

  async look() {
    this.listNodes();
    const { runs } = await listRuns();
    options(this.runs, [["", say("dataset.run.none")], ...runs.map(({ run }) => [run, run])]);
    return false;
  }

  listNodes() {
    this.nodes = new Map(allNodes().filter(([, node]) => (node.comfyClass ?? node.type) === NODE));
    options(this.folders, [...this.nodes].map(([id, node]) => [id, titleOf(id, node)]));
    this.none.hidden = this.nodes.size > 0;
    this.form.hidden = !this.nodes.size;
  }

  async examine() {
    const node = this.nodes.get(this.folders.value);
    if (!node) return;
    const inputs = valuesOf(node);
    if (!("folder" in inputs)) {
      this.notify("error", say("dataset.failed"), say("dataset.connected"));
      return;
    }
    this.report.replaceChildren();
    this.element.dataset.dataset = "";
    const result = await this.during("dataset.looking", "report", { inputs, run: this.runs.value });
    if (result) this.draw(result, node);
  }

  // The result of a request; undefined if it failed or was ended.
  async during(title, path, body) {
    this.button.disabled = true;
    try {
      return await this.waiting.during(say(title), (signal, progress) => work(`${ROOT}/${path}`, body, progress, signal));
    } catch (error) {
      this.notify("error", say("dataset.failed"), error.message);
      return undefined;
    } finally {
      this.button.disabled = false;
    }
  }

  draw(report, node) {
    Object.assign(this, { current: report, node, kind: "" });
    this.leftOut = new Set(report.leave_out);
    this.result = el("p.ct-result", { "aria-live": "polite" });
    this.list = el("div.ct-view");
    this.copyLabel = el("span");
    this.copy = el("button.ct-button", { type: "button", "data-command": "copy", title: say("dataset.copy.tip"), onclick: () => this.write() },
      el("i.pi.pi-copy", { "aria-hidden": "true" }), this.copyLabel);
    const link = (path, key, icon, more) => el("a.ct-button", { href: api.apiURL(`${ROOT}/${report.report}/${path}`), title: say(`${key}.tip`), ...more },
      el(`i.pi.${icon}`, { "aria-hidden": "true" }), say(key));
    this.report.replaceChildren(
      el("h3.ct-title", {}, report.folders.join(", ")),
      el("p.ct-result", {}, say("dataset.usable", { usable: report.usable, count: report.images })),
      drawSizes(report.buckets),
      el("div.ct-buttons", {}, link("sheet", "dataset.sheet", "pi-images", { target: "_blank" }),
        link("captions", "dataset.captions", "pi-download", { download: "captions.jsonl" }), this.copy),
      this.result, ...this.filters(), this.list,
      ...report.remarks.map((remark) => el("p.ct-remark", {}, remark)));
    this.drawList();
    this.count();
    this.element.dataset.dataset = report.folders.join();
    this.element.dataset.findings = report.findings.length;
  }

  // A button for each kind of finding, and one for all.
  filters() {
    const { findings } = this.current;
    if (findings.length < 2) return [];
    const kinds = ["", ...new Set(findings.map(({ kind }) => kind))];
    const buttons = kinds.map((kind) => el("button.ct-chip", {
      type: "button", "aria-pressed": kind === this.kind, "data-kind": kind, onclick: () => {
        this.kind = kind;
        for (const button of buttons) set(button, { "aria-pressed": button.getAttribute("data-kind") === kind });
        this.drawList();
      },
    }, say(`dataset.kind.${kind || "all"}`)));
    return [el("div.ct-chips", { role: "group", "aria-label": say("dataset.filter") }, ...buttons)];
  }

  drawList() {
    const shown = findingsOf(this.current, this.kind);
    this.list.replaceChildren(...(shown.length ? shown.map((finding) => this.drawFinding(finding))
      : [el("p.ct-sound", {}, el("i.pi.pi-check-circle", { "aria-hidden": "true" }), say("dataset.sound"))]));
  }

  drawFinding(finding) {
    const grid = el("div.ct-found");
    const more = el("button.ct-link", { type: "button", onclick: () => fill(finding.images.length) }, say("dataset.more", { count: finding.images.length - FEW }));
    const fill = (count) => {
      grid.replaceChildren(...finding.images.slice(0, count).map((image) => this.drawImage(image, finding.kind !== "unreadable")));
      more.hidden = count >= finding.images.length;
    };
    fill(FEW);
    const severity = say(`severity.${finding.severity}`);
    return el("section.ct-finding", { "data-severity": finding.severity, "data-kind": finding.kind },
      el("h4", {}, el(`i.pi.${MARKS[finding.severity]}`, { role: "img", "aria-label": severity }), el("span", {}, finding.text)), grid, more);
  }

  drawImage({ number, name, value, group, box }, isReadable) {
    const mark = el("input", {
      type: "checkbox", "data-number": number, "aria-label": say("dataset.leave.image", { name }), onchange: () => this.mark(number, mark.checked),
    });
    mark.checked = this.leftOut.has(number);
    mark.disabled = !isReadable; // it is in no copy
    const image = isReadable ? this.drawThumbnail(`${ROOT}/${this.current.report}/${number}`, name, box)
      : el("span.ct-no-image", {}, el("i.pi.pi-image", { "aria-hidden": "true" }));
    return el("div.ct-found-image", group ? { "data-group": group % 6 } : {}, image,
      el("span.ct-name", { title: name }, name), ...(value ? [el("span.ct-doing-soft", {}, value)] : []),
      el("label", {}, mark, say("dataset.leave")));
  }

  // box: the part that is meant, [left, top, right, bottom] as shares of the image's edges.
  drawThumbnail(url, name, box) {
    const frame = el("span.ct-meant", { hidden: "" });
    const image = el("img", { loading: "lazy", alt: name, onload: () => box && place(frame, image, box) });
    const link = el("a", { href: api.apiURL(`${url}?size=full`), target: "_blank", title: say("image.open") }, image, frame);
    set(image, { src: api.apiURL(url) });
    return link;
  }

  // An image may be part of several findings.
  mark(number, isLeftOut) {
    if (isLeftOut) this.leftOut.add(number);
    else this.leftOut.delete(number);
    for (const box of this.list.querySelectorAll(`[data-number="${number}"]`)) box.checked = isLeftOut;
    this.count();
  }

  count() {
    text(this.copyLabel, say("dataset.copy", { count: this.leftOut.size }));
    this.copy.disabled = !this.leftOut.size;
  }

  async write() {
    const body = { report: this.current.report, leave_out: [...this.leftOut] };
    const written = await this.during("dataset.copying", "copy", body);
    if (!written) return;
    const use = el("button.ct-link", { type: "button", "data-command": "use", onclick: () => this.use(written.folder) }, say("dataset.use"));
    this.result.replaceChildren(`${say("dataset.copied", { count: written.images, folder: written.folder })} `, use);
  }

  // Names the copy in the node, as if it were typed.
  use(folder) {
    const widget = this.node.widgets.find(({ name }) => name === "folder");
    widget.value = folder;
    widget.callback?.(folder);
    this.node.setDirtyCanvas?.(true, true);
    this.listNodes();
  }

  remove() {
    this.waiting.remove();
  }
}

// Puts a frame on a part of an image, which fills a square as far as its shape allows.
function place(frame, { naturalWidth: width, naturalHeight: height }, box) {
  const [left, top, right, bottom] = shareOfSquare(width, height, box);
  frame.style.cssText = `left: ${100 * left}%; top: ${100 * top}%; width: ${100 * (right - left)}%; height: ${100 * (bottom - top)}%`;
  frame.hidden = false;
}

// A box of an image, in shares of the square that the image is centered in.
export function shareOfSquare(width, height, box) {
  const sizes = [width / Math.max(width, height), height / Math.max(width, height)];
  return box.map((share, edge) => (1 - sizes[edge % 2]) / 2 + share * sizes[edge % 2]);
}

// Sets the options of a select, [[value, label]], and keeps what is chosen.
function options(select, entries) {
  const key = JSON.stringify(entries);
  if (select.dataset.of === key) return;
  select.dataset.of = key;
  const { value } = select;
  select.replaceChildren(...entries.map(([value, label]) => el("option", { value }, label)));
  if (entries.some(([other]) => other === value)) select.value = value;
}

function titleOf(id, node) {
  const folder = String(valuesOf(node).folder ?? say("dataset.from.node"));
  return [node.title, folder].filter(Boolean).join(": ") + (id.includes(":") ? ` (${id})` : "");
}

function drawSizes(buckets) {
  const most = Math.max(1, ...Object.values(buckets));
  return el("table.ct-sizes-table", { "aria-label": say("dataset.sizes") }, ...Object.entries(buckets).map(([size, count]) =>
    el("tr", {}, el("th", { scope: "row" }, size.replace("x", " × ")), el("td", {}, String(count)),
      el("td", {}, el("i", { style: `width: ${(100 * count) / most}%` })))));
}
