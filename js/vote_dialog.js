// The blind vote: two images of one prompt and seed beside each other, without names. The server decides the sides.

import { api } from "../../scripts/api.js";
import { openDialog } from "./dialog.js";
import { el, set, text } from "./dom.js";
import { ask, post } from "./requests.js";
import { say } from "./texts.js";

const SIDES = ["left", "right"];
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "equal", Backspace: "undo" };
const percent = (share) => `${Math.round(100 * share)} %`;

// The place of the first pair without a vote, from one on; their number if there is none.
export function nextPlace(rows, from = 0) {
  const place = rows.findIndex(({ choice }, at) => at >= from && !choice);
  if (place >= 0) return place;
  const first = rows.findIndex(({ choice }) => !choice);
  return first >= 0 ? first : rows.length;
}

// The outcome in one sentence.
export function outcomeText({ first, second, wins, equal, low, high, better }) {
  const decided = wins[0] + wins[1];
  const counts = say("vote.counts", { second, first, wins: wins[1], decided, equal });
  if (!decided) return `${counts} ${say("vote.undecided")}`;
  const range = say("vote.range", { low: percent(low), high: percent(high) });
  return `${counts} ${range} ${better ? say("vote.better", { better }) : say("vote.undecided")}`;
}

// The share of the second version with its interval, on a line from the first to the second.
export function drawOutcome({ first, second, share, low, high }) {
  const label = say("vote.bar", { second, share: share === null ? "-" : percent(share), low: percent(low), high: percent(high) });
  return el("div.ct-outcome", { role: "img", "aria-label": label },
    el("div.ct-outcome-bar", {}, el("i.ct-interval", { style: `left: ${100 * low}%; width: ${100 * (high - low)}%` }),
      el("i.ct-half"), ...(share === null ? [] : [el("i.ct-share", { style: `left: ${100 * share}%` })])),
    el("div.ct-axis", {}, el("span", {}, first), el("span", {}, "50 %"), el("span", {}, second)));
}

export class VoteDialog {
  // root: the path of the set on the server. notify(severity, summary, detail). closed() is called at the end.
  constructor(root, { notify, closed }) {
    Object.assign(this, { root, notify, closed, rows: [], last: [] });
    this.images = Object.fromEntries(SIDES.map((side) => [side, el("img", { alt: "", draggable: "false" })]));
    this.buttons = Object.fromEntries(SIDES.map((side) => [side, el("button.ct-candidate", {
      type: "button", "data-side": side, "aria-label": say(`vote.${side}`), onclick: () => this.choose(side),
    }, this.images[side])]));
    this.prompt = el("p.ct-vote-prompt");
    this.count = el("span.ct-count", { "aria-live": "polite" });
    this.bar = el("i");
    const button = (name, key, call) => el("button.ct-button", { type: "button", "data-choice": name, onclick: call }, say(`vote.${name}`), el("kbd", {}, key));
    this.controls = el("div.ct-buttons", {}, button("left", "←", () => this.choose("left")), button("equal", "↓", () => this.choose("equal")),
      button("right", "→", () => this.choose("right")), button("undo", "⌫", () => this.undo()), button("finish", "", () => this.finish()));
    this.pair = el("div.ct-pair", {}, this.buttons.left, this.buttons.right);
    this.result = el("div.ct-view", { hidden: "", "aria-live": "polite" });
    this.page = el("div.ct-vote-page", {}, el("div.ct-head", {}, this.count), el("div.ct-bar", {}, this.bar), this.prompt, this.pair, this.controls, this.result);
  }

  async open() {
    this.take(await ask(this.root));
    this.dialog = openDialog(say("vote.title"), [this.page], { onkey: (event) => this.key(event), onclose: this.closed });
    this.show(nextPlace(this.rows));
    return this;
  }

  take({ rows, outcome }) {
    Object.assign(this, { rows, outcome });
  }

  show(place) {
    this.place = place;
    const voted = this.rows.filter(({ choice }) => choice).length;
    text(this.count, say("vote.progress", { voted, count: this.rows.length }));
    this.bar.style.width = `${(100 * voted) / Math.max(1, this.rows.length)}%`;
    const isOver = place >= this.rows.length;
    set(this.page, { "data-place": place, "data-voted": voted, "data-over": isOver });
    this.pair.hidden = isOver;
    if (isOver) {
      this.showResult(this.outcome);
      return;
    }
    const { prompt, seed } = this.rows[place];
    this.result.hidden = true;
    text(this.prompt, `${prompt} · ${say("vote.seed", { seed })}`);
    for (const side of SIDES) set(this.images[side], { src: this.url(place, side) });
    const next = nextPlace(this.rows, place + 1);
    if (next < this.rows.length && next !== place) for (const side of SIDES) new Image().src = this.url(next, side);
  }

  url(place, side) {
    return api.apiURL(`${this.root}/${place}/${side}`);
  }

  key(event) {
    const name = KEYS[event.key];
    if (!name || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (event.repeat) return; // a key that is held down is one vote
    if (name === "undo") this.undo();
    else this.choose(name);
  }

  async choose(choice) {
    const { place } = this;
    if (this.isBusy || place >= this.rows.length) return;
    await this.send(place, choice, () => {
      this.last.push(place);
      this.show(nextPlace(this.rows, place + 1));
    });
  }

  // Takes the last vote back, and shows its pair again.
  async undo() {
    const place = this.last.at(-1) ?? this.rows.findLastIndex(({ choice }) => choice);
    if (this.isBusy || place < 0) return;
    await this.send(place, "", () => {
      this.last.pop();
      this.show(place);
    });
  }

  async send(place, choice, then) {
    this.isBusy = true;
    try {
      this.take(await ask(this.root, post({ place, choice })));
      then();
    } catch (error) {
      this.notify("error", say("vote.failed"), error.message);
    } finally {
      this.isBusy = false;
    }
  }

  // Shows what the votes so far say. From then on it is not blind, so it asks the server for it on purpose.
  async finish() {
    try {
      const { outcome } = await ask(`${this.root}?result=1`);
      this.showResult(outcome);
    } catch (error) {
      this.notify("error", say("vote.failed"), error.message);
    }
  }

  showResult(outcome) {
    this.result.hidden = false;
    this.result.replaceChildren(...(outcome ? [el("p.ct-verdict", {}, outcomeText(outcome)), drawOutcome(outcome)] : [el("p", {}, say("vote.none"))]));
    set(this.page, { "data-result": outcome ? outcome.better || "undecided" : "none" });
  }
}
