// The dialog after an import: three lists of options, or what is wrong with the files.

import { el } from "./dom.js";
import { say } from "./texts.js";

const LISTS = ["missing", "taken", "equal"]; // what needs a look first

export class ReportDialog {
  // answer: {trainer, report} or {error}, as the server sends it.
  constructor(answer, name) {
    const title = answer.error ? say("import.failed", { name }) : say("import.done", { trainer: answer.trainer });
    const body = answer.error ? [el("p.ct-why", {}, answer.error)] : LISTS.map((list) => section(list, answer.report[list]));
    const close = el("button.ct-button", { type: "button", autofocus: "", onclick: () => this.element.close() }, say("import.close"));
    const heading = el("h3", { id: "ct-import-report-title" }, title);
    this.element = el("dialog.ct-import-report", { "aria-labelledby": "ct-import-report-title" }, heading, el("div.ct-import-report-body", {}, ...body), close);
    this.element.addEventListener("close", () => this.element.remove());
    this.element.addEventListener("keydown", (event) => event.stopPropagation()); // the graph's shortcuts
  }

  show() {
    document.body.append(this.element);
    this.element.showModal();
  }
}

function section(list, lines) {
  const attributes = list === "equal" || !lines.length ? {} : { open: "" };
  const rows = lines.map(({ option, text }) => el("li", {}, el("code", {}, option), ` ${text}`));
  const inside = rows.length ? el("ul", {}, ...rows) : el("p", {}, say("import.nothing"));
  return el("details", { ...attributes, "data-list": list }, el("summary", {}, say(`import.${list}`, { count: lines.length })), inside);
}
