// Prompts that a run is asked for while it is paused or has ended, and the images of the answers.

import { api } from "../../scripts/api.js";
import { el } from "./dom.js";
import { stepText } from "./pictures.js";
import { say } from "./texts.js";

// A running model fills the memory, and without a checkpoint there are no weights.
export function canDraw({ state, checkpoints }) {
  return state !== "running" && state !== "unreadable" && checkpoints.length > 0;
}

export class Ask {
  constructor(send) {
    this.box = el("textarea.ct-prompts", { rows: 2, placeholder: say("ask.prompts"), "aria-label": say("ask.prompts"), title: say("ask.tip") });
    this.button = el("button.ct-button", { type: "button", onclick: () => this.send(send) },
      el("i.pi.pi-image"), say("ask.draw"));
    this.form = el("div.ct-ask", {}, this.box, this.button);
    this.images = el("div.ct-grid-of-pictures");
    this.element = el("div", {}, this.form, this.images);
  }

  async send(send) {
    const lines = this.box.value.split("\n").map((line) => line.trim()).filter(Boolean);
    if (!lines.length) return;
    this.button.disabled = true;
    await send(lines);
    this.button.disabled = false;
  }

  draw(state) {
    this.form.style.display = canDraw(state) ? "" : "none";
    const key = state.drawn.map(({ url }) => url).join();
    if (this.images.dataset.of === key) return;
    this.images.dataset.of = key;
    this.images.replaceChildren(...state.drawn.map(({ step, url }) =>
      el("a.ct-cell", { href: api.apiURL(url), target: "_blank", title: say("image.open") },
        el("img", { src: api.apiURL(`${url}&preview=webp;75`), loading: "lazy", alt: "" }),
        el("span", {}, stepText(step)))));
  }
}
