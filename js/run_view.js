// One run in the sidebar: its panel, its buttons, its images over the steps, its file and its settings.

import { api } from "../../scripts/api.js";
import { short } from "./chart.js";
import { Ask } from "./ask.js";
import { el, set, text } from "./dom.js";
import { fetchRun } from "./feed.js";
import { ImageSets } from "./image_sets.js";
import { Panel } from "./panel.js";
import { stepText } from "./pictures.js";
import { RunState, ago } from "./run_state.js";
import { SweepTable } from "./sweep_table.js";
import { has, say } from "./texts.js";

const ICONS = { pause: "pi-pause", stop: "pi-stop", resume: "pi-play" };

// The commands that a run accepts in its state.
function commandsOf({ state, alive }) {
  if (state === "running" && alive) return ["pause", "stop"];
  if (state === "paused" && alive) return ["resume", "stop"];
  return state === "finished" ? [] : ["resume"];
}

export class RunView {
  constructor(run, { back, act, check, notify, open }) {
    this.run = run;
    this.check = check;
    this.act = act;
    this.state = new RunState();
    this.panel = new Panel({ hasSweep: false });
    this.sweep = new SweepTable(open);
    this.ask = new Ask((prompts) => act("draw", this.state, { prompts: prompts.join("\n") }));
    this.sets = new ImageSets(run, { notify, queue: (values) => act("draw", this.state, values) });
    this.parts = {
      name: el("b.ct-title"), when: el("span.ct-doing-soft"), buttons: el("div.ct-buttons"),
      learned: el("table.ct-learned"), scores: el("table.ct-learned.ct-by-prompt"), grid: el("div.ct-grid-of-pictures"),
      file: el("div.ct-saved-file"), settings: el("div.ct-settings"),
    };
    const { name, when, buttons, learned, scores, grid, file, settings } = this.parts;
    this.element = el("div.ct-run", { "data-run": run },
      el("div.ct-run-head", {},
        el("button.ct-back.pi.pi-arrow-left", { type: "button", title: say("runs.all"), "aria-label": say("runs.all"), onclick: back }),
        el("span.ct-card-text", {}, name, when)),
      buttons, el("div.ct-run-panel", {}, this.panel.element), this.sweep.element, learned, scores, file, this.ask.element, this.sets.element, grid, settings);
  }

  // Fetches what is new and draws it. Returns whether the run is active.
  async look() {
    const step = this.state.run ? this.state.step : 0;
    const history = await fetchRun(this.run, step);
    if (step && history.summary.step >= step) this.state.follow(history);
    // The first fetch, or the run went back to a checkpoint.
    else this.state.load(step ? await fetchRun(this.run) : history);
    this.draw();
    await this.sets.look(this.state);
    return this.state.summary.alive;
  }

  draw() {
    const { state, parts } = this;
    const { summary } = state;
    set(this.element, { "data-state": summary.state, "data-alive": summary.alive });
    text(parts.name, summary.name);
    text(parts.when, `${summary.run} · ${ago(summary.updated)}`);
    this.panel.show(state);
    this.sweep.draw(state.sweep, state.run);
    this.drawButtons(commandsOf(summary));
    this.drawFile(state, summary);
    this.drawLearned(state.heldOut.at(-1));
    this.drawScores(state.shownScores);
    this.ask.draw(state);
    this.drawGrid(state.pictures);
    if (!parts.settings.children.length && state.settings) parts.settings.replaceChildren(...sections(state.settings));
  }

  drawButtons(names) {
    const { buttons } = this.parts;
    if (buttons.dataset.of === names.join()) return;
    buttons.dataset.of = names.join();
    buttons.replaceChildren(...names.map((name) => el("button.ct-button", {
      type: "button", "data-command": name, onclick: (event) => {
        event.currentTarget.disabled = true; // until the run has received the command
        buttons.dataset.of = "?";
        this.act(name, this.state);
      },
    }, el(`i.pi.${ICONS[name]}`), say(`run.${name}`))));
  }

  drawFile(state, summary) {
    const lora = state.lora?.lora ?? summary.lora;
    const keys = state.lora ? say("panel.keys", { applied: state.lora.applied, count: state.lora.num_keys }) : "";
    const applied = keys ? [el("span.ct-doing-soft", {}, keys)] : [];
    const folder = state.lora?.folder ?? summary.folder ?? "loras"; // diffusion_models: a whole model
    const report = folder === "loras" ? [el("button.ct-link", {
      type: "button", title: say("lora.check.tip"), "data-command": "check", onclick: () => this.check(lora),
    }, say("lora.check"))] : [];
    const file = lora ? [el("i.pi.pi-file"), `${folder}/${lora}`, ...applied, ...report] : [];
    const link = (url, label) => (url ? [el("a", { href: api.apiURL(url), target: "_blank" }, label)] : []);
    const crops = link(state.crops, say("run.crops"));
    const pairs = link(state.pairs, say("run.pairs"));
    const key = `${lora}|${state.crops}|${state.pairs}|${state.lora?.applied}`;
    if (this.parts.file.dataset.of === key) return;
    this.parts.file.dataset.of = key;
    this.parts.file.replaceChildren(...file, ...crops, ...pairs);
  }

  // The gap between trained and held-out images at each noise level.
  drawLearned(newest) {
    const { learned } = this.parts;
    const key = newest?.gaps?.length ? `${newest.step}` : "";
    if (learned.dataset.of === key) return;
    learned.dataset.of = key;
    const rows = key ? newest.sigmas.map((sigma, i) => el("tr", {}, el("td", {}, say("gap.sigma", { sigma })),
      el("td", {}, `${short(newest.gaps[i])} ± ${short(newest.gap_errors[i])}`))) : [];
    const title = say(newest?.overfits ? "gap.title.overfits" : "gap.title", { step: newest?.step, since: newest?.gap_since });
    learned.replaceChildren(...(key ? [el("caption", { title: say("gap.tip") }, title)] : []), ...rows);
  }

  // The CLIP score of each prompt, beside that of the base model's image.
  drawScores(all) {
    const { scores } = this.parts;
    const [newest, base] = [all.at(-1), all.find(({ step }) => step === 0)];
    const key = newest ? `${newest.step} ${newest.clip}` : "";
    if (scores.dataset.of === key) return;
    scores.dataset.of = key;
    const rows = (newest?.prompts ?? []).map((prompt, i) => {
      const before = newest.step ? base?.by_prompt?.[i] : undefined;
      const value = short(newest.by_prompt[i]);
      const text = Number.isFinite(before) ? say("clip.from", { score: value, base: short(before) }) : value;
      return el("tr", {}, el("td", { title: prompt }, prompt), el("td", {}, text));
    });
    const caption = el("caption", { title: say("panel.clip.tip") }, say("clip.title", { step: newest?.step }));
    scores.replaceChildren(...(key ? [caption] : []), ...rows);
  }

  drawGrid(pictures) {
    const { grid } = this.parts;
    const key = pictures.map(({ url }) => url).join();
    if (grid.dataset.of === key) return;
    grid.dataset.of = key;
    grid.replaceChildren(...pictures.map(({ step, url, label }) =>
      el("a.ct-cell", { href: api.apiURL(url), target: "_blank", title: label },
        el("img", { src: api.apiURL(`${url}&preview=webp;75`), loading: "lazy", alt: "" }),
        el("span", {}, stepText(step)))));
  }

  remove() {
    this.panel.remove();
  }
}

// The request as collapsible tables, to look up what differs between runs.
function sections(settings) {
  return Object.entries(settings).filter(([, values]) => values && typeof values === "object").map(([name, values]) =>
    el("details", name === "training" ? { open: "" } : {}, el("summary", {}, has(`settings.${name}`) ? say(`settings.${name}`) : name), el("table", {}, ...rows(values))));
}

function rows(values, prefix = "") {
  return Object.entries(values).flatMap(([name, value]) => {
    if (value === null || value === "" || (Array.isArray(value) && !value.length)) return [];
    if (typeof value === "object" && !Array.isArray(value)) return rows(value, `${prefix}${name} `);
    if (Array.isArray(value) && typeof value[0] === "object")
      return value.flatMap((item, i) => rows(item, `${prefix}${value.length > 1 ? `${i + 1} ` : ""}`));
    return [el("tr", {}, el("td", {}, prefix + name), el("td", {}, String(value)))];
  });
}
