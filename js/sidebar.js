// The sidebar's tab of runs: those that go on and those that were, wherever they were started.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addStyle, el, set, text } from "./dom.js";
import { command, listRuns, tellRun } from "./feed.js";
import { RunView } from "./run_view.js";
import { ago } from "./run_state.js";

const BUSY_MS = 1500; // between two looks while something goes on
const IDLE_MS = 5000;

class Runs {
  constructor(root) {
    this.list = el("div.ct-list");
    this.root = el("div.ct-runs", { "data-view": "list" }, this.list);
    root.replaceChildren(this.root);
    this.cards = new Map();
    this.view = null;
    this.look();
  }

  // Ask, draw, and ask again; more often while something goes on. One request at a time.
  async look() {
    clearTimeout(this.timer);
    const asked = (this.asked = {});
    let busy = false;
    try {
      busy = this.view ? await this.view.look() : await this.lookAtAll();
    } catch (error) {
      console.warn("[ChromaTrainer] no runs:", error);
    }
    if (asked === this.asked && !this.gone) this.timer = setTimeout(() => this.look(), busy ? BUSY_MS : IDLE_MS);
  }

  async lookAtAll() {
    const runs = await listRuns();
    set(this.root, { "data-count": runs.length });
    if (!runs.length) this.list.replaceChildren(el("p.ct-none", {}, "No runs yet. A LoRA Trainer's runs appear here, and those of chroma-trainer run that write to ComfyUI's output folder."));
    else {
      const cards = runs.map((run) => this.card(run));
      if (cards.some((card, i) => this.list.children[i] !== card) || this.list.children.length !== cards.length) this.list.replaceChildren(...cards);
    }
    return runs.some((run) => run.alive);
  }

  card(run) {
    const card = this.cards.get(run.run) ?? new Card(run.run, () => this.open(run.run));
    this.cards.set(run.run, card);
    card.draw(run);
    return card.element;
  }

  open(run) {
    this.view = new RunView(run, { back: () => this.close(), act: (name, state) => this.act(run, name, state) });
    set(this.root, { "data-view": "run" });
    this.root.replaceChildren(this.view.element);
    this.look();
  }

  close() {
    this.view?.remove();
    this.view = null;
    set(this.root, { "data-view": "list" });
    this.root.replaceChildren(this.list);
    this.look();
  }

  // pause and stop reach the job through its folder. A run that waits is told to go on; one that has ended is queued again.
  async act(run, name, state) {
    try {
      if (name !== "resume" || state.summary.alive) await command(run, name);
      else await queue((await tellRun(run)).prompt);
      notify("info", { pause: "Pauses after this step", stop: "Stops after this step", resume: "Goes on" }[name], state.summary.name);
    } catch (error) {
      notify("error", `Can't ${name}`, error.message);
    }
    this.look();
  }

  remove() {
    this.gone = true;
    clearTimeout(this.timer);
    this.view?.remove();
  }
}

class Card {
  constructor(run, open) {
    this.parts = { picture: el("img.ct-thumb", { alt: "", loading: "lazy" }), name: el("b"), state: el("span.ct-doing-soft"), bar: el("i") };
    const { picture, name, state, bar } = this.parts;
    this.element = el("button.ct-card", { type: "button", "data-run": run, onclick: open },
      el("span.ct-thumb-frame", {}, picture),
      el("span.ct-card-text", {}, el("span.ct-head", {}, el("span.ct-dot"), name), state, el("span.ct-bar", {}, bar)));
  }

  draw(run) {
    set(this.element, { "data-state": run.state, title: run.run });
    text(this.parts.name, run.name);
    const count = run.total ? `${run.step} / ${run.total}` : "";
    text(this.parts.state, [run.state === "died" ? "ended without a word" : run.state, count, ago(run.updated)].filter(Boolean).join(" · "));
    this.parts.bar.style.width = `${run.total ? (100 * run.step) / run.total : 0}%`;
    this.parts.picture.style.visibility = run.picture ? "" : "hidden";
    if (run.picture) set(this.parts.picture, { src: api.apiURL(`${run.picture}&preview=webp;70`) });
  }
}

// Run a recorded workflow again: it goes on from its newest checkpoint.
async function queue(prompt) {
  if (!Object.keys(prompt ?? {}).length) throw new Error("its workflow was not recorded; run it from the graph, or with chroma-trainer resume");
  const body = JSON.stringify({ prompt, client_id: api.clientId });
  const answer = await api.fetchApi("/prompt", { method: "POST", body, headers: { "Content-Type": "application/json" } });
  if (answer.ok) return;
  const { error, node_errors: faults } = await answer.json();
  const first = Object.values(faults ?? {})[0]?.errors?.[0];
  throw new Error([error?.message, first?.message, first?.details].filter(Boolean).join(": "));
}

function notify(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 12000 : 3000 });
}

let runs = null;

app.registerExtension({
  name: "ChromaTrainer.Sidebar",
  setup() {
    addStyle();
    app.extensionManager.registerSidebarTab({
      id: "chroma-trainer-runs",
      icon: "pi pi-chart-line",
      title: "Training",
      tooltip: "LoRA training: runs, pictures, pause and resume",
      type: "custom",
      render(root) {
        runs?.remove();
        runs = new Runs(root);
      },
      destroy() {
        runs?.remove();
        runs = null;
      },
    });
  },
});
