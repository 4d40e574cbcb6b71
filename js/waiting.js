// A bar for work that takes long, with a button that ends it.

import { el, text } from "./dom.js";
import { say } from "./texts.js";

export class Waiting {
  constructor() {
    this.parts = { what: el("span", { "aria-live": "polite" }), count: el("span.ct-count"), bar: el("i") };
    const { what, count, bar } = this.parts;
    const cancel = el("button.ct-button", { type: "button", onclick: () => this.control?.abort() }, say("waiting.cancel"));
    this.element = el("div.ct-waiting", { hidden: "", role: "status" },
      el("div.ct-head", {}, what, count), el("div.ct-bar", {}, bar), cancel);
  }

  // Shows the bar while call(signal, onProgress) runs, and returns its result; undefined if the user ended it. A new
  // call ends the one before.
  async during(title, call) {
    this.control?.abort();
    const control = (this.control = new AbortController());
    const { what, count, bar } = this.parts;
    text(what, title);
    text(count, "");
    bar.style.width = "0%";
    this.element.hidden = false;
    try {
      return await call(control.signal, (done, total) => {
        text(count, `${done} / ${total}`);
        bar.style.width = `${total ? (100 * done) / total : 0}%`;
      });
    } catch (error) {
      if (!control.signal.aborted) throw error;
      return undefined;
    } finally {
      if (this.control === control) this.element.hidden = true;
    }
  }

  remove() {
    this.control?.abort();
  }
}
