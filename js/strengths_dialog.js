// The sliders of a LoRA's strength and, where several were sampled, of its checkpoint: all images are from the same noise,
// and the nearest ones are crossfaded.

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

// The share of each image of a grid at a place between its rows and columns: {index: share}, 4 at most. columns: of a row.
export function sharesAt(row, column, columns) {
  const shares = {};
  for (const [r, down] of [[row.below, 1 - row.opacity], [row.above, row.opacity]])
    for (const [c, across] of [[column.below, 1 - column.opacity], [column.above, column.opacity]])
      if (down * across) shares[r * columns + c] = (shares[r * columns + c] ?? 0) + down * across;
  return shares;
}

// The opacities of layers that lie on each other, so that each has its share of what is seen: a layer covers those below it.
export function opacitiesOf(shares, count) {
  let sum = 0;
  return Array.from({ length: count }, (_, layer) => {
    sum += shares[layer] ?? 0;
    return shares[layer] ? shares[layer] / sum : 0;
  });
}

export class StrengthsDialog {
  // root: the path of the set on the server. set: what the server says of it. notify(severity, summary, detail)
  constructor(root, images, { notify }) {
    Object.assign(this, { root, images, notify, row: 0 });
    const { versions } = images;
    this.steps = [...new Set(versions.map(({ step }) => step ?? images.step))]; // each has all strengths
    this.strengths = versions.slice(0, versions.length / this.steps.length).map(({ strength }) => strength);
    this.layers = versions.map(({ label }) => el("img", { alt: say("strength.alt", { strength: label }), draggable: "false" }));
    const range = (values, step, label) => el("input.ct-slider", {
      type: "range", min: values[0], max: values.at(-1), step, "aria-label": label, oninput: () => this.mix(),
    });
    this.slider = range(this.strengths, 0.01, say("strength"));
    this.stepSlider = range(this.steps, 1, say("strength.checkpoint"));
    this.rows = el("select.ct-input", { "aria-label": say("strength.prompt"), onchange: () => this.show(Number(this.rows.value)) },
      ...images.rows.map(({ name, seed }, row) => el("option", { value: row }, `${name} · ${say("vote.seed", { seed })}`)));
    this.value = el("b", { "aria-live": "polite" });
    this.result = el("p.ct-result", { "aria-live": "polite" });
    this.save = el("button.ct-button", { type: "button", "data-command": "save-strength", onclick: () => this.write() },
      el("i.pi.pi-save", { "aria-hidden": "true" }), say("strength.save"));
    const slide = (slider, values, title) => el("div.ct-slide", { title }, el("span", {}, short(values[0])), slider, el("span", {}, short(values.at(-1))));
    const slides = [
      ...(this.strengths.length > 1 ? [slide(this.slider, this.strengths, say("strength"))] : []),
      ...(this.steps.length > 1 ? [slide(this.stepSlider, this.steps, say("strength.checkpoint"))] : []),
    ];
    this.page = el("div.ct-vote-page", {}, this.rows, el("div.ct-stack", {}, ...this.layers), ...slides,
      el("div.ct-buttons", {}, el("span.ct-strength", {}, say("strength"), " ", this.value), this.save), this.result);
  }

  open() {
    const title = this.steps.length > 1 ? say("strength.title.steps", { first: this.steps[0], last: this.steps.at(-1) }) : say("strength.title", { step: this.images.step });
    this.dialog = openDialog(title, [this.page]);
    this.slider.value = this.strengths.includes(1) ? 1 : this.strengths.at(-1);
    this.stepSlider.value = this.steps.at(-1);
    this.show(0);
    (this.strengths.length > 1 ? this.slider : this.stepSlider).focus();
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
    const strength = mixAt(this.strengths, Number(this.slider.value));
    const step = mixAt(this.steps, Number(this.stepSlider.value));
    const opacities = opacitiesOf(sharesAt(step, strength, this.strengths.length), this.layers.length);
    this.layers.forEach((layer, version) => {
      layer.style.opacity = opacities[version];
    });
    const value = short(Number(this.slider.value));
    text(this.value, this.steps.length > 1 ? say("strength.at", { strength: value, step: Math.round(this.stepSlider.value) }) : value);
    this.nearest = step.nearest * this.strengths.length + strength.nearest;
    const [nearest, at] = [this.strengths[strength.nearest], this.steps[step.nearest]];
    this.save.disabled = !nearest;
    const tip = this.steps.length > 1 ? say("strength.save.tip.step", { strength: short(nearest), step: at }) : say("strength.save.tip", { strength: short(nearest) });
    set(this.save, { title: tip });
    set(this.page, { "data-nearest": nearest, "data-step": at, "data-value": this.slider.value });
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
