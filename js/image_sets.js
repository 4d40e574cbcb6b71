// What a run's images can be looked at for: a blind vote on two versions, and one LoRA at several strengths. The images are
// sampled by the queue, as those of the prompts that a run is asked for.

import { api } from "../../scripts/api.js";
import { canDraw } from "./ask.js";
import { disabledDuring, el } from "./dom.js";
import { ask } from "./requests.js";
import { StrengthsDialog } from "./strengths_dialog.js";
import { say } from "./texts.js";
import { VoteDialog, outcomeText } from "./vote_dialog.js";

const LOOK_MS = 4000;
const STRENGTHS = "0, 0.25, 0.5, 0.75, 1, 1.25, 1.5";

// The prompt that ComfyUI's queue executes. values: fields of SampleRun.
export function setPrompt(run, values) {
  return { 1: { class_type: "SampleRun", inputs: { run, prompts: "", ...values } } };
}

// The versions that a vote can be on, [value, label], the newest checkpoint first.
export function versionsOf({ steps, loras }) {
  const ofSteps = [...steps].reverse().map((step) => [String(step), say("step", { step })]);
  return [...ofSteps, ["base", say("vote.base")], ...loras.map((name) => [name, name])];
}

export class ImageSets {
  // queue(values) queues SampleRun with these fields. notify(severity, summary, detail)
  constructor(run, { queue, notify }) {
    Object.assign(this, { run, queue, notify, root: `/chroma_trainer/runs/${encodeURIComponent(run)}/sets`, last: -Infinity });
    const select = (key) => el("select.ct-input", { "aria-label": say(key) });
    this.first = select("vote.first");
    this.second = select("vote.second");
    const prompts = () => el("textarea.ct-input", { rows: 2, placeholder: say("vote.prompts"), "aria-label": say("ask.prompts") });
    const seeds = (value) => el("input.ct-input", { type: "number", min: 1, max: 64, value, "aria-label": say("vote.seeds") });
    this.votePrompts = prompts();
    this.voteSeeds = seeds(8);
    this.strengths = el("input.ct-input", { value: STRENGTHS, "aria-label": say("strength.values") });
    this.checkpoints = el("input.ct-input", { value: "", placeholder: say("strength.checkpoints.newest"), "aria-label": say("strength.checkpoints") });
    this.strengthPrompts = prompts();
    const button = (key, name, call) => el("button.ct-button", {
      type: "button", "data-command": name, onclick: disabledDuring(call),
    }, el("i.pi.pi-image", { "aria-hidden": "true" }), say(key));
    this.voteForm = el("div.ct-set-form", {}, el("label.ct-field", {}, say("vote.first"), this.first), el("label.ct-field", {}, say("vote.second"), this.second),
      this.votePrompts, el("label.ct-field", {}, say("vote.seeds"), this.voteSeeds), button("vote.draw", "sample-vote", () => this.askVote()));
    this.strengthForm = el("div.ct-set-form", {}, el("label.ct-field.ct-wide", {}, say("strength.values"), this.strengths),
      el("label.ct-field.ct-wide", { title: say("strength.checkpoints.tip") }, say("strength.checkpoints"), this.checkpoints), this.strengthPrompts,
      button("vote.draw", "sample-strengths", () => this.askStrengths()));
    this.lists = { vote: el("div.ct-sets"), strengths: el("div.ct-sets") };
    const part = (key, form, list) => el("details.ct-part", { "data-part": key }, el("summary", {}, say(`${key}.title.short`)), list, form);
    this.element = el("div", {}, part("vote", this.voteForm, this.lists.vote), part("strength", this.strengthForm, this.lists.strengths));
  }

  // Fetches what there is, not more often than every few seconds.
  async look(state) {
    const isDrawable = canDraw(state);
    this.voteForm.hidden = this.strengthForm.hidden = !isDrawable;
    if (performance.now() - this.last < LOOK_MS) return;
    this.last = performance.now();
    const answer = await api.fetchApi(this.root);
    if (answer.ok) this.draw(await answer.json(), isDrawable);
  }

  draw(found, isDrawable) {
    this.element.hidden = !isDrawable && !found.sets.length;
    const key = JSON.stringify(found);
    if (this.element.dataset.of === key) return;
    this.element.dataset.of = key;
    this.fill(versionsOf(found));
    for (const [kind, list] of Object.entries(this.lists))
      list.replaceChildren(...found.sets.filter((one) => one.kind === kind).map((one) => this.drawSet(one)));
  }

  // Sets the choices of both versions; at first the newest checkpoint against the one before it, or the base model.
  fill(versions) {
    for (const [select, index] of [[this.first, Math.min(1, versions.length - 1)], [this.second, 0]]) {
      const { value } = select;
      select.replaceChildren(...versions.map(([name, label]) => el("option", { value: name }, label)));
      select.value = versions.some(([name]) => name === value) ? value : versions[index][0];
    }
  }

  drawSet({ set, kind, versions, rows, step, checkpoints = [], voted, outcome }) {
    const strengths = checkpoints.length > 1 ? say("strength.title.steps", { first: checkpoints[0], last: checkpoints.at(-1) }) : say("strength.title", { step });
    const title = kind === "vote" ? versions.join(" / ") : strengths;
    const count = kind === "vote" ? say("vote.progress", { voted, count: rows }) : say("strength.rows", { count: rows });
    const label = kind !== "vote" ? "strength.open" : !voted ? "vote.begin" : voted < rows ? "vote.continue" : "vote.look";
    return el("div.ct-row", { "data-set": set, "data-kind": kind },
      el("span.ct-card-text", {}, el("b", { title }, title), el("span.ct-doing-soft", {}, outcome ? outcomeText(outcome) : count)),
      el("button.ct-button", { type: "button", "data-command": "open-set", onclick: () => this.open(set, kind) }, say(label)));
  }

  async open(set, kind) {
    const root = `${this.root}/${set}`;
    const closed = () => {
      this.last = -Infinity;
    };
    try {
      if (kind === "vote") await new VoteDialog(root, { notify: this.notify, closed }).open();
      else new StrengthsDialog(root, await ask(root), { notify: this.notify }).open();
    } catch (error) {
      this.notify("error", say("vote.failed"), error.message);
    }
  }

  askVote() {
    const compare = `${this.first.value}, ${this.second.value}`;
    return this.queue({ compare, prompts: this.votePrompts.value, num_seeds: Number(this.voteSeeds.value) });
  }

  askStrengths() {
    return this.queue({ strengths: this.strengths.value, checkpoints: this.checkpoints.value, prompts: this.strengthPrompts.value });
  }
}
