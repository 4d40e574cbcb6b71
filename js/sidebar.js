// The sidebar tab of runs: active and ended ones, wherever they were started.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addStyle, el, set, text } from "./dom.js";
import { command, fetchRun, listRuns } from "./feed.js";
import { RunView } from "./run_view.js";
import { ago } from "./run_state.js";

const BUSY_MS = 1500; // between two requests while a run is active
const IDLE_MS = 5000;
const NO_RUNS = "No runs yet. Runs of LoRA Trainer nodes appear here, "
  + "and runs of chroma-trainer run that write to ComfyUI's output folder.";

const PROGRESS = { pause: "Pausing after this step", stop: "Stopping after this step", resume: "Resuming" };

class Runs {
  constructor(root) {
    this.list = el("div.ct-list");
    this.root = el("div.ct-runs", { "data-view": "list" }, this.list);
    root.replaceChildren(this.root);
    this.cards = new Map();
    this.view = null;
    this.look();
  }

  // Fetches, draws, and schedules the next fetch; more often while a run is active. One request at a time.
  async look() {
    clearTimeout(this.timer);
    const asked = (this.asked = {});
    let busy = false;
    try {
      busy = this.view ? await this.view.look() : await this.lookAtAll();
    } catch (error) {
      console.warn("[ChromaTrainer] could not fetch the runs:", error);
    }
    if (asked === this.asked && !this.gone) this.timer = setTimeout(() => this.look(), busy ? BUSY_MS : IDLE_MS);
  }

  async lookAtAll() {
    const runs = await listRuns();
    set(this.root, { "data-count": runs.length });
    if (!runs.length) this.list.replaceChildren(el("p.ct-none", {}, NO_RUNS));
    else {
      const cards = runs.map((run) => this.card(run));
      const { children } = this.list;
      const isSame = children.length === cards.length && cards.every((card, i) => children[i] === card);
      if (!isSame) this.list.replaceChildren(...cards);
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

  // pause and stop reach the process through the run's folder. resume continues a waiting process; a run that has
  // ended is queued again.
  async act(run, name, state) {
    try {
      if (name !== "resume" || state.summary.alive) await command(run, name);
      else await queue((await fetchRun(run)).prompt);
      notify("info", PROGRESS[name], state.summary.name);
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
    this.parts = {
      picture: el("img.ct-thumb", { alt: "", loading: "lazy" }), name: el("b"), state: el("span.ct-doing-soft"),
      bar: el("i"),
    };
    const { picture, name, state, bar } = this.parts;
    this.element = el("button.ct-card", { type: "button", "data-run": run, onclick: open },
      el("span.ct-thumb-frame", {}, picture),
      el("span.ct-card-text", {}, el("span.ct-head", {}, el("span.ct-dot"), name), state, el("span.ct-bar", {}, bar)));
  }

  draw(run) {
    set(this.element, { "data-state": run.state, title: run.run });
    text(this.parts.name, run.name);
    const count = run.total ? `${run.step} / ${run.total}` : "";
    const label = run.state === "died" ? "ended unexpectedly" : run.state;
    text(this.parts.state, [label, count, ago(run.updated)].filter(Boolean).join(" · "));
    this.parts.bar.style.width = `${run.total ? (100 * run.step) / run.total : 0}%`;
    this.parts.picture.style.visibility = run.picture ? "" : "hidden";
    if (run.picture) set(this.parts.picture, { src: api.apiURL(`${run.picture}&preview=webp;70`) });
  }
}

// Queues a recorded workflow again: it resumes from its newest checkpoint.
async function queue(prompt) {
  if (!Object.keys(prompt ?? {}).length)
    throw new Error("the workflow of this run was not recorded; run it from the graph, or with chroma-trainer resume");
  const body = JSON.stringify({ prompt, client_id: api.clientId });
  const headers = { "Content-Type": "application/json" };
  const answer = await api.fetchApi("/prompt", { method: "POST", body, headers });
  if (answer.ok) return;
  const { error, node_errors: nodeErrors } = await answer.json();
  const first = Object.values(nodeErrors ?? {})[0]?.errors?.[0];
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
      tooltip: "LoRA training: runs, images, pause and resume",
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
