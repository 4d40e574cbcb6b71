// The sidebar tab of runs: active and ended ones, wherever they were started.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { samplePrompt } from "./ask.js";
import { addStyle, el, set, text } from "./dom.js";
import { command, fetchRun, listRuns, order } from "./feed.js";
import { RunView } from "./run_view.js";
import { ago, stateText } from "./run_state.js";
import { say } from "./texts.js";

const BUSY_MS = 1500; // between two requests while a run is active
const IDLE_MS = 5000;

class Runs {
  constructor(root) {
    this.list = el("div.ct-list");
    this.queue = el("div.ct-queue");
    this.root = el("div.ct-runs", { "data-view": "list" }, this.queue, this.list);
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
    const { runs, queue = [] } = await listRuns();
    const noFolder = queue.filter((entry) => !entry.run);
    set(this.root, { "data-count": runs.length, "data-queued": noFolder.length });
    this.drawQueue(noFolder, runs.length > 0);
    if (!runs.length && noFolder.length) this.list.replaceChildren();
    else if (!runs.length) this.list.replaceChildren(el("p.ct-none", {}, say("runs.none")));
    else {
      const cards = runs.map((run) => this.card(run));
      const { children } = this.list;
      for (const run of this.cards.keys()) if (!runs.some((other) => other.run === run)) this.cards.delete(run);
      const isSame = children.length === cards.length && cards.every((card, i) => children[i] === card);
      if (!isSame) this.list.replaceChildren(...cards);
    }
    return noFolder.length > 0 || runs.some((run) => run.alive);
  }

  // The runs of the background that have no folder yet. Rows are replaced only if they changed: one may have the focus.
  drawQueue(entries, hasRuns) {
    const key = JSON.stringify([entries.map((entry) => [entry, ago(entry.added)]), hasRuns]);
    if (this.queue.dataset.of === key) return;
    this.queue.dataset.of = key;
    const rows = entries.map((entry) => queueRow(entry, (action) => this.order(entry, action)));
    const title = (key) => el("h4", {}, say(key));
    const below = hasRuns ? [title("runs.all")] : [];
    this.queue.replaceChildren(...(rows.length ? [title("queue.title"), ...rows, ...below] : []));
  }

  async order(entry, action) {
    try {
      await order(entry.id, action);
    } catch (error) {
      notify("error", say("queue.failed"), error.message);
    }
    this.look();
  }

  card(run) {
    const card = this.cards.get(run.run) ?? new Card(run.run, () => this.open(run.run));
    this.cards.set(run.run, card);
    card.draw(run);
    return card.element;
  }

  open(run) {
    this.view = new RunView(run, { back: () => this.close(), act: (...what) => this.act(run, ...what) });
    set(this.root, { "data-view": "run" });
    this.root.replaceChildren(this.view.element);
    this.root.querySelector(".ct-back")?.focus({ preventScroll: true }); // what had the focus is gone
    this.look();
  }

  close() {
    const card = this.cards.get(this.view?.run)?.element;
    this.view?.remove();
    this.view = null;
    set(this.root, { "data-view": "list" });
    this.root.replaceChildren(this.queue, this.list);
    card?.focus({ preventScroll: true });
    this.look();
  }

  // pause and stop reach the process through the run's folder. resume continues a waiting process; a run that has
  // ended is queued again. draw queues images of a run that is not active.
  async act(run, name, state, prompts) {
    try {
      if (name === "draw") await queue(samplePrompt(run, prompts));
      else if (name !== "resume" || state.summary.alive) await command(run, name);
      else await queue((await fetchRun(run)).prompt);
      notify("info", say(`run.${name}.sent`), state.summary.name);
    } catch (error) {
      notify("error", say(`run.${name}.failed`), error.message);
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
    text(this.parts.state, [stateText(run.state), count, ago(run.updated)].filter(Boolean).join(" · "));
    this.parts.bar.style.width = `${run.total ? (100 * run.step) / run.total : 0}%`;
    this.parts.picture.style.visibility = run.picture ? "" : "hidden";
    if (run.picture) set(this.parts.picture, { src: api.apiURL(`${run.picture}&preview=webp;70`) });
  }
}

// A run of the background without a folder: it waits, is being started, or failed before it had one.
function queueRow(entry, act) {
  const state = { waiting: say("queue.place", { place: entry.place }), training: say("queue.starting") }[entry.state];
  const button = (action, icon) => el(`button.ct-back.pi.${icon}`, {
    type: "button", title: say(action === "up" ? "queue.up" : `queue.remove.${entry.state}`), "data-action": action,
    onclick: (event) => {
      event.currentTarget.disabled = true;
      act(action);
    },
  });
  const kind = entry.is_detached ? say("queue.detached") : "";
  return el("div.ct-row", { "data-state": entry.state, "data-id": entry.id, "data-name": entry.name },
    el("span.ct-card-text", {}, el("span.ct-head", {}, el("span.ct-dot"), el("b", { title: entry.name }, entry.name)),
      el(`span.${entry.state === "failed" ? "ct-why" : "ct-doing-soft"}`, {},
        [state ?? entry.message, kind, ago(entry.added)].filter(Boolean).join(" · "))),
    ...(entry.place > 1 ? [button("up", "pi-arrow-up")] : []), button("remove", "pi-times"));
}

// Queues a recorded workflow again: it resumes from its newest checkpoint.
async function queue(prompt) {
  if (!Object.keys(prompt ?? {}).length)
    throw new Error(say("run.no.workflow"));
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
      title: say("runs.title"),
      tooltip: say("runs.tip"),
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
