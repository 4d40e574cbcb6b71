// The sidebar tab: runs, active and ended ones, wherever they were started; what a LoRA file is; and what is wrong with a dataset.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { DatasetView } from "./dataset_view.js";
import { addStyle, el, set, text } from "./dom.js";
import { command, fetchRun, listRuns, order } from "./feed.js";
import { setPrompt } from "./image_sets.js";
import { LoraView } from "./lora_view.js";
import { post } from "./requests.js";
import { RunView } from "./run_view.js";
import { ago, stateText } from "./run_state.js";
import { say } from "./texts.js";

const BUSY_MS = 1500; // between two requests while a run is active
const IDLE_MS = 5000;

// The views of the sidebar as tabs. One is shown, and fetches what is new; more often while a run is active.
class Sidebar {
  constructor(root) {
    this.views = {
      runs: new Runs({ refresh: () => this.look(), check: (lora) => this.check(lora) }),
      loras: new LoraView({ notify, openRun: (run) => this.openRun(run) }),
      datasets: new DatasetView({ notify }),
    };
    this.tabs = Object.fromEntries(Object.keys(this.views).map((name) => [name, this.tab(name)]));
    this.page = el("div.ct-page", { role: "tabpanel" });
    const bar = el("div.ct-tabs", { role: "tablist", "aria-label": say("runs.title"), onkeydown: (event) => this.moved(event) },
      ...Object.values(this.tabs));
    this.element = el("div.ct-side", {
      ondragover: (event) => this.dragged(event), ondragleave: () => this.mark(false), ondrop: (event) => this.dropped(event),
    }, bar, this.page);
    root.replaceChildren(this.element);
    this.show("runs");
  }

  tab(name) {
    return el("button.ct-tab", { type: "button", role: "tab", "data-tab": name, onclick: () => this.show(name) }, say(`tab.${name}`));
  }

  show(name) {
    this.name = name;
    for (const [other, tab] of Object.entries(this.tabs)) set(tab, { "aria-selected": other === name, tabindex: other === name ? 0 : -1 });
    this.page.replaceChildren(this.views[name].element);
    this.look();
  }

  // The arrow keys go from tab to tab, as in every list of tabs.
  moved(event) {
    const names = Object.keys(this.tabs);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    this.show(names.at((names.indexOf(this.name) + step) % names.length));
    this.tabs[this.name].focus();
  }

  // One request at a time.
  async look() {
    clearTimeout(this.timer);
    const asked = (this.asked = {});
    let busy = false;
    try {
      busy = await this.views[this.name].look();
    } catch (error) {
      console.warn("[ChromaTrainer] could not fetch what the sidebar shows:", error);
    }
    if (asked === this.asked && !this.gone) this.timer = setTimeout(() => this.look(), busy ? BUSY_MS : IDLE_MS);
  }

  check(lora) {
    this.show("loras");
    this.views.loras.open(lora);
  }

  openRun(run) {
    this.show("runs");
    this.views.runs.open(run);
  }

  dragged(event) {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    event.stopPropagation(); // the page would load it as a workflow
    this.mark(true);
  }

  dropped(event) {
    this.mark(false);
    const file = event.dataTransfer?.files[0];
    if (!file) return;
    event.preventDefault();
    event.stopPropagation();
    this.show("loras");
    this.views.loras.take(file);
  }

  mark(isDragged) {
    set(this.element, { "data-drag": isDragged });
  }

  remove() {
    this.gone = true;
    clearTimeout(this.timer);
    for (const view of Object.values(this.views)) view.remove();
  }
}

class Runs {
  // refresh() fetches again; check(lora) shows the report of a LoRA file.
  constructor({ refresh, check }) {
    Object.assign(this, { refresh, check });
    this.list = el("div.ct-list");
    this.queue = el("div.ct-queue");
    this.element = el("div.ct-runs", { "data-view": "list" }, this.queue, this.list);
    this.cards = new Map();
    this.view = null;
  }

  look() {
    return this.view ? this.view.look() : this.lookAtAll();
  }

  async lookAtAll() {
    const { runs, queue = [] } = await listRuns();
    const noFolder = queue.filter((entry) => !entry.run);
    set(this.element, { "data-count": runs.length, "data-queued": noFolder.length });
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
    this.refresh();
  }

  card(run) {
    const card = this.cards.get(run.run) ?? new Card(run.run, () => this.open(run.run));
    this.cards.set(run.run, card);
    card.draw(run);
    return card.element;
  }

  open(run) {
    this.view?.remove();
    this.view = new RunView(run, { back: () => this.close(), act: (...what) => this.act(run, ...what), check: this.check, notify, open: (other) => this.open(other) });
    set(this.element, { "data-view": "run" });
    this.element.replaceChildren(this.view.element);
    this.element.querySelector(".ct-back")?.focus({ preventScroll: true }); // what had the focus is gone
    this.refresh();
  }

  close() {
    const card = this.cards.get(this.view?.run)?.element;
    this.view?.remove();
    this.view = null;
    set(this.element, { "data-view": "list" });
    this.element.replaceChildren(this.queue, this.list);
    card?.focus({ preventScroll: true });
    this.refresh();
  }

  // pause and stop reach the process through the run's folder. resume continues a waiting process; a run that has
  // ended is queued again. draw queues images of a run that is not active.
  async act(run, name, state, values) {
    try {
      if (name === "draw") await queue(setPrompt(run, values));
      else if (name !== "resume" || state.summary.alive) await command(run, name);
      else await queue((await fetchRun(run)).prompt);
      notify("info", say(`run.${name}.sent`), state.summary.name);
    } catch (error) {
      notify("error", say(`run.${name}.failed`), error.message);
    }
    this.refresh();
  }

  remove() {
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
  const answer = await api.fetchApi("/prompt", post({ prompt, client_id: api.clientId }));
  if (answer.ok) return;
  const { error, node_errors: nodeErrors } = await answer.json();
  const first = Object.values(nodeErrors ?? {})[0]?.errors?.[0];
  throw new Error([error?.message, first?.message, first?.details].filter(Boolean).join(": "));
}

function notify(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 12000 : 3000 });
}

let sidebar = null;

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
        sidebar?.remove();
        sidebar = new Sidebar(root);
      },
      destroy() {
        sidebar?.remove();
        sidebar = null;
      },
    });
  },
});
