// The slider of a LoRA's strength: the images of each strength were sampled from the same noise, and are crossfaded.

import { api } from "../../scripts/api.js";
import { openDialog } from "./dialog.js";
import { el, set, text } from "./dom.js";
import { work } from "./long_work.js";
import { short } from "./chart.js";
import { say } from "./texts.js";

// What is shown at a strength: the image below, the one above and how far it covers the other; and the nearest one.
export function mixAt(strengths, value) {
  const above = strengths.findIndex((strength) => strength >= value);
  if (above < 0) return { below: strengths.length - 1, above: strengths.length - 1, opacity: 1, nearest: strengths.length - 1 };
  if (above === 0) return { below: 0, above: 0, opacity: 1, nearest: 0 };
  const opacity = (value - strengths[above - 1]) / (strengths[above] - strengths[above - 1]);
  return { below: above - 1, above, opacity, nearest: opacity < 0.5 ? above - 1 : above };
}

export class StrengthsDialog {
  // root: the path of the set on the server. set: what the server says of it. notify(severity, summary, detail)
  constructor(root, images, { notify }) {
    Object.assign(this, { root, images, notify, row: 0 });
    this.strengths = images.versions.map(({ strength }) => strength);
    this.layers = this.strengths.map((strength) => el("img", { alt: say("strength.alt", { strength: short(strength) }), draggable: "false" }));
    this.slider = el("input.ct-slider", {
      type: "range", min: this.strengths[0], max: this.strengths.at(-1), step: 0.01, "aria-label": say("strength"), oninput: () => this.mix(),
    });
    this.rows = el("select.ct-input", { "aria-label": say("strength.prompt"), onchange: () => this.show(Number(this.rows.value)) },
      ...images.rows.map(({ name, seed }, row) => el("option", { value: row }, `${name} · ${say("vote.seed", { seed })}`)));
    this.value = el("b", { "aria-live": "polite" });
    this.result = el("p.ct-result", { "aria-live": "polite" });
    this.save = el("button.ct-button", { type: "button", "data-command": "save-strength", onclick: () => this.write() },
      el("i.pi.pi-save", { "aria-hidden": "true" }), say("strength.save"));
    this.page = el("div.ct-vote-page", {}, this.rows, el("div.ct-stack", {}, ...this.layers),
      el("div.ct-slide", {}, el("span", {}, short(this.strengths[0])), this.slider, el("span", {}, short(this.strengths.at(-1)))),
      el("div.ct-buttons", {}, el("span.ct-strength", {}, say("strength"), " ", this.value), this.save), this.result);
  }

  open() {
    this.dialog = openDialog(say("strength.title", { step: this.images.step }), [this.page]);
    this.slider.value = this.strengths.includes(1) ? 1 : this.strengths.at(-1);
    this.show(0);
    this.slider.focus();
    return this;
  }

  show(row) {
    this.row = row;
    const [width, height] = this.images.rows[row].size;
    this.page.style.setProperty("--ct-aspect", `${width} / ${height}`);
    this.layers.forEach((layer, version) => set(layer, { src: api.apiURL(`${this.root}/${row}/${version}`) }));
    this.mix();
  }

  mix() {
    const { below, above, opacity, nearest } = mixAt(this.strengths, Number(this.slider.value));
    this.layers.forEach((layer, version) => {
      layer.style.opacity = version === below ? 1 : version === above ? opacity : 0;
    });
    text(this.value, short(Number(this.slider.value)));
    this.nearest = nearest;
    this.save.disabled = !this.strengths[nearest];
    set(this.save, { title: say("strength.save.tip", { strength: short(this.strengths[nearest]) }) });
    set(this.page, { "data-nearest": this.strengths[nearest], "data-value": this.slider.value });
  }

  async write() {
    this.save.disabled = true;
    try {
      const { lora } = await work(`${this.root}/save`, { version: this.nearest }, () => {});
      text(this.result, say("lora.saved", { name: lora }));
    } catch (error) {
      this.notify("error", say("strength.failed"), error.message);
    }
    this.mix();
  }
}
