// The family tree of a LoRA: its parents below it, down to the base model.

import { el } from "./dom.js";
import { has, say } from "./texts.js";

// A line about a relative: what made it, and what of it was used.
export function relativeText({ operation, steps, applied, kind }) {
  const key = `family.${operation}`;
  const made = operation ? (has(key) ? say(key) : operation) : steps !== null ? say("family.trained", { count: steps }) : "";
  return [kind === "model" ? say("family.model") : made, applied].filter(Boolean).join(" · ");
}

// open(file): shows the report of a file; openRun(run): shows a run.
export function drawFamily(root, { open, openRun }) {
  if (!root.parents.length && !root.run && !root.operation) return null;
  return el("figure.ct-figure", {}, el("figcaption", {}, say("family")),
    el("ul.ct-family", {}, relative(root, { open, openRun }, true)));
}

function relative(item, actions, isRoot = false) {
  const { name, file, run, sha256, parents } = item;
  const title = sha256 ? `SHA-256 ${sha256}` : name;
  const label = !isRoot && file
    ? el("button.ct-link", { type: "button", title, onclick: () => actions.open(file) }, name)
    : el(isRoot ? "b" : "span", { title }, name);
  const notes = [relativeText(item)];
  if (!isRoot && item.kind === "file") {
    if (item.is_changed) notes.push(say("family.changed"));
    else if (!file) notes.push(say("family.missing"));
  }
  const runLink = run ? [el("button.ct-link", { type: "button", title: run, onclick: () => actions.openRun(run) },
    say("family.run"))] : [];
  return el("li", {}, el("div.ct-relative", {}, el(`i.pi.${item.kind === "model" ? "pi-box" : "pi-file"}`, { "aria-hidden": "true" }),
    el("span", {}, label, el("span.ct-doing-soft", {}, notes.filter(Boolean).join(" · ")), ...runLink)),
  ...(parents.length ? [el("ul", {}, ...parents.map((parent) => relative(parent, actions)))] : []));
}
