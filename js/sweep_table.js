// What the runs of a sweep have reached, as a table; and as a grid of held-out losses where two fields are swept.

import { pace, short } from "./chart.js";
import { el } from "./dom.js";
import { say } from "./texts.js";

const estimate = ({ mean, standard_error: error }, sign = "") => `${sign}${short(mean)} ± ${short(error)}`;

// How a run compares: best, worse with 95 % certainty, or not told apart.
export function verdictOf(row) {
  if (row.is_best) return "best";
  return row.is_worse ? "worse" : row.difference ? "close" : "";
}

// The held-out loss above that of the best run, in words.
export function aboveText(row) {
  if (row.is_best) return say("sweep.best");
  return row.difference ? estimate(row.difference, row.difference.mean < 0 ? "" : "+") : "-";
}

// The rows of a sweep with those of planned runs that have not ended: {values, run, name, row}.
export function entriesOf(sweep) {
  const rows = new Map(sweep.runs.map((row) => [row.run, row]));
  const plans = sweep.plans ?? sweep.runs.map(({ values, run, name }) => ({ values, run, name }));
  return plans.map((plan) => ({ ...plan, row: rows.get(plan.run) }));
}

// The fields of the grid with their values; null where none is drawn.
function gridOf(axes, entries) {
  if (axes.length !== 2) return null;
  const values = axes.map((axis) => [...new Set(entries.map((entry) => entry.values[axis]))]);
  return values.every(({ length }) => length > 1) ? values : null;
}

// How many lines the table and the grid have.
export function rowsOf(sweep) {
  const entries = entriesOf(sweep);
  const grid = gridOf(sweep.axes, entries);
  return 1 + Math.max(entries.length, sweep.planned) + (grid ? 1.5 + grid[0].length : 0);
}

export class SweepTable {
  // open(run) shows a run; without it, rows are no buttons.
  constructor(open) {
    this.open = open;
    this.element = el("div.ct-sweep", { hidden: "" });
  }

  draw(sweep, current) {
    const key = sweep ? JSON.stringify([sweep.sweep, sweep.planned, sweep.runs, current]) : "";
    if (this.element.dataset.of === key) return;
    this.element.dataset.of = key;
    this.element.hidden = !sweep;
    if (!sweep) return this.element.replaceChildren();
    const title = say("sweep.title", { name: sweep.sweep, done: sweep.runs.length, count: sweep.planned });
    const entries = entriesOf(sweep);
    this.element.replaceChildren(el("div.ct-soft", {}, title), ...this.grid(sweep.axes, entries), this.table(sweep.axes, entries, current));
  }

  table(axes, entries, current) {
    const heads = [...axes.map((name) => name.split(".").at(-1)), say("panel.held"), say("sweep.above"), say("panel.leak"), say("sweep.pace"), say("sweep.steps")];
    return el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ...entries.map((entry) => this.row(axes, entry, current))));
  }

  row(axes, { values, run, row }, current) {
    const [first, ...others] = axes.map((axis) => values[axis]);
    const opens = this.open && row && run !== current;
    const head = opens ? el("button.ct-link", { type: "button", onclick: () => this.open(run) }, first) : first;
    const cells = row ? [
      row.loss === null ? "-" : say("sweep.loss", { loss: short(row.loss), step: row.step }), aboveText(row), row.leak ? estimate(row.leak) : "-",
      pace(row.seconds_per_step), row.stopped ? say("sweep.stopped", { step: row.steps }) : String(row.steps),
    ] : [run === current ? say("sweep.now") : "", "", "", "", ""];
    return el("tr", {
      "data-verdict": row ? verdictOf(row) : "", "data-run": run, title: row?.stopped ?? "", ...(run === current ? { "aria-current": "true" } : {}),
    }, el("th", { scope: "row" }, head), ...[...others, ...cells].map((cell) => el("td", {}, cell)));
  }

  // Two fields: the values of the first as rows, of the second as columns.
  grid(axes, entries) {
    const values = gridOf(axes, entries);
    if (!values) return [];
    const [down, across] = values;
    const find = (a, b) => entries.find(({ values }) => values[axes[0]] === a && values[axes[1]] === b)?.row;
    const cell = (row) => el("td", { "data-verdict": row ? verdictOf(row) : "" }, row ? aboveText(row) : "");
    const corner = el("th", { scope: "col" }, axes.map((name) => name.split(".").at(-1)).join(" \\ "));
    return [el("table.ct-sweep-grid", { "aria-label": say("sweep.above") },
      el("thead", {}, el("tr", {}, corner, ...across.map((b) => el("th", { scope: "col" }, b)))),
      el("tbody", {}, ...down.map((a) => el("tr", {}, el("th", { scope: "row" }, a), ...across.map((b) => cell(find(a, b)))))))];
  }
}
