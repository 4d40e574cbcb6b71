// The validation images of a run, with a slider over its steps. It stays at the newest step until the user moves it. While
// an image is sampled its preview is shown instead, unless the user looks at an earlier step.

import { el, set, text } from "./dom.js";
import { say } from "./texts.js";
import { api } from "../../scripts/api.js";

export class Pictures {
  constructor() {
    this.image = el("img.ct-image", { draggable: "false", alt: "" });
    this.link = el("a.ct-frame", { target: "_blank", title: say("image.open") }, this.image);
    this.slider = el("input.ct-slider", {
      type: "range", min: 0, max: 0, step: 1, "aria-label": say("step.slider"), oninput: () => this.moved(),
    });
    this.step = el("span.ct-step");
    this.sizes = el("span.ct-sizes");
    const stop = (event) => event.stopPropagation(); // otherwise the canvas would drag the node
    this.row = el("div.ct-slide", { onpointerdown: stop, onmousedown: stop }, this.step, this.slider, this.sizes);
    this.element = el("div.ct-pictures", { hidden: "" }, this.link, this.row);
    this.follows = true;
    this.label = "";
  }

  draw(pictures, sampling = null) {
    this.pictures = pictures;
    this.steps = [...new Set(pictures.map((picture) => picture.step))];
    this.element.hidden = !pictures.length && !sampling;
    if (sampling && (this.follows || !pictures.length)) {
      this.showSampling(sampling);
      return;
    }
    if (!pictures.length) return;
    const last = this.steps.length - 1;
    set(this.slider, { max: last });
    this.slider.style.visibility = last ? "" : "hidden";
    if (this.follows || Number(this.slider.value) > last) this.slider.value = last;
    this.show();
  }

  showSampling({ step, total, url }) {
    set(this.link, { href: api.apiURL(url) });
    set(this.image, { src: api.apiURL(url) });
    set(this.element, { "data-step": "sampling" });
    text(this.step, say("step.sampling", { step, total }));
    this.slider.style.visibility = this.steps.length > 1 ? "" : "hidden";
    this.sizes.dataset.of = "";
    this.sizes.replaceChildren();
  }

  moved() {
    this.follows = Number(this.slider.value) === this.steps.length - 1;
    this.show();
  }

  show() {
    const step = this.steps[Number(this.slider.value)];
    const here = this.pictures.filter((picture) => picture.step === step);
    const picture = here.find(({ label }) => label === this.label) ?? here[0];
    if (!picture) return;
    set(this.link, { href: api.apiURL(picture.url) });
    set(this.image, { src: api.apiURL(`${picture.url}&preview=webp;85`) });
    set(this.element, { "data-step": step });
    text(this.step, stepText(step));
    const others = here.length > 1 ? here.map(({ label }) => label) : [];
    if (this.sizes.dataset.of !== others.join() + picture.label) {
      this.sizes.dataset.of = others.join() + picture.label;
      const button = (label) => el(`button.ct-size${label === picture.label ? ".ct-on" : ""}`, {
        type: "button", onclick: () => { this.label = label; this.show(); },
      }, label.replace("x", " × "));
      this.sizes.replaceChildren(...others.map(button));
    }
  }
}

// Step 0 shows the base model's images.
export function stepText(step) {
  return step ? say("step", { step }) : say("step.before");
}
