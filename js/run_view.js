// One run in the sidebar: its panel, what can be done with it, its pictures over the steps, its file and its settings.

import { api } from "../../scripts/api.js";
import { el, set, text } from "./dom.js";
import { tellRun } from "./feed.js";
import { Panel } from "./panel.js";
import { RunState, ago } from "./run_state.js";

const LABELS = { pause: "Pause", stop: "Stop", resume: "Resume" };
const ICONS = { pause: "pi-pause", stop: "pi-stop", resume: "pi-play" };

// Which commands a run can take.
function commandsOf({ state, alive }) {
  if (state === "running" && alive) return ["pause", "stop"];
  if (state === "paused" && alive) return ["resume", "stop"];
  return state === "finished" ? [] : ["resume"];
}

export class RunView {
  constructor(run, { back, act }) {
    this.run = run;
    this.act = act;
    this.state = new RunState();
    this.panel = new Panel();
    this.parts = {
      name: el("b.ct-title"), when: el("span.ct-doing-soft"), buttons: el("div.ct-buttons"), grid: el("div.ct-grid-of-pictures"),
      file: el("div.ct-saved-file"), settings: el("div.ct-settings"),
    };
    const { name, when, buttons, grid, file, settings } = this.parts;
    this.element = el("div.ct-run", { "data-run": run },
      el("div.ct-run-head", {}, el("button.ct-back.pi.pi-arrow-left", { type: "button", title: "All runs", onclick: back }),
        el("span.ct-card-text", {}, name, when)),
      buttons, el("div.ct-run-panel", {}, this.panel.element), file, grid, settings);
  }

  // Ask what is new and draw it. Returns whether something goes on.
  async look() {
    const known = this.state.run ? this.state.step : 0;
    const story = await tellRun(this.run, known);
    if (known && story.summary.step >= known) this.state.follow(story);
    else this.state.load(known ? await tellRun(this.run) : story); // the first look, or the run went back to a checkpoint
    this.draw();
    return this.state.summary.alive;
  }

  draw() {
    const { state, parts } = this;
    const { summary } = state;
    set(this.element, { "data-state": summary.state, "data-alive": summary.alive });
    text(parts.name, summary.name);
    text(parts.when, `${summary.run} · ${ago(summary.updated)}`);
    this.panel.show(state);
    this.drawButtons(commandsOf(summary));
    this.drawFile(state, summary);
    this.drawGrid(state.pictures);
    if (!parts.settings.children.length && state.settings) parts.settings.replaceChildren(...sections(state.settings));
  }

  drawButtons(names) {
    const { buttons } = this.parts;
    if (buttons.dataset.of === names.join()) return;
    buttons.dataset.of = names.join();
    buttons.replaceChildren(...names.map((name) => el("button.ct-button", {
      type: "button", "data-command": name, onclick: (event) => {
        event.currentTarget.disabled = true; // until the run has heard of it
        buttons.dataset.of = "?";
        this.act(name, this.state);
      },
    }, el(`i.pi.${ICONS[name]}`), LABELS[name])));
  }

  drawFile(state, summary) {
    const lora = state.lora?.lora ?? summary.lora;
    const file = lora ? [el("i.pi.pi-file"), `loras/${lora}`, ...(state.lora ? [el("span.ct-doing-soft", {}, `${state.lora.applied} of ${state.lora.num_keys} keys apply`)] : [])] : [];
    const crops = state.crops ? [el("a", { href: api.apiURL(state.crops), target: "_blank" }, "how the images are cropped")] : [];
    const pairs = state.pairs ? [el("a", { href: api.apiURL(state.pairs), target: "_blank" }, "what they start from")] : [];
    const key = `${lora}|${state.crops}|${state.pairs}|${state.lora?.applied}`;
    if (this.parts.file.dataset.of === key) return;
    this.parts.file.dataset.of = key;
    this.parts.file.replaceChildren(...file, ...crops, ...pairs);
  }

  drawGrid(pictures) {
    const { grid } = this.parts;
    const key = pictures.map(({ url }) => url).join();
    if (grid.dataset.of === key) return;
    grid.dataset.of = key;
    grid.replaceChildren(...pictures.map(({ step, url, label }) => el("a.ct-cell", { href: api.apiURL(url), target: "_blank", title: label },
      el("img", { src: api.apiURL(`${url}&preview=webp;75`), loading: "lazy", alt: "" }), el("span", {}, step ? `step ${step}` : "before"))));
  }

  remove() {
    this.panel.remove();
  }
}

// The request as tables that open: what differs between runs is looked up here.
function sections(settings) {
  return Object.entries(settings).filter(([, values]) => values && typeof values === "object").map(([name, values]) =>
    el("details", name === "training" ? { open: "" } : {}, el("summary", {}, name), el("table", {}, ...rows(values))));
}

function rows(values, prefix = "") {
  return Object.entries(values).flatMap(([name, value]) => {
    if (value === null || value === "" || (Array.isArray(value) && !value.length)) return [];
    if (typeof value === "object" && !Array.isArray(value)) return rows(value, `${prefix}${name} `);
    if (Array.isArray(value) && typeof value[0] === "object") return value.flatMap((item, i) => rows(item, `${prefix}${value.length > 1 ? `${i + 1} ` : ""}`));
    return [el("tr", {}, el("td", {}, prefix + name), el("td", {}, String(value)))];
  });
}
