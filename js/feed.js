// Where runs come from: messages of the server while one goes on, and the backlog for everything that was before.

import { api } from "../../scripts/api.js";
import { RunState } from "./run_state.js";

const ROOT = "/chroma_trainer/runs";
const states = new Map(); // "node|name" -> RunState
const watchers = new Set();

// call(node id as in a prompt, LoRA's name, RunState) after everything that happens.
export function watch(call) {
  watchers.add(call);
}

export function stateOf(node, name) {
  return states.get(`${node}|${name}`);
}

export async function listRuns() {
  return (await ask(ROOT)).runs;
}

export function tellRun(run, after = 0) {
  return ask(`${ROOT}/${encodeURIComponent(run)}${after ? `?after=${after}` : ""}`);
}

// pause, stop or resume.
export function command(run, name) {
  return ask(`${ROOT}/${encodeURIComponent(run)}/${name}`, { method: "POST" });
}

// The state of a run from its backlog, for a node of that id.
export async function openRun(run, node, name) {
  const state = new RunState();
  state.load(await tellRun(run));
  states.set(`${node}|${name}`, state);
  return state;
}

// The latest run of a node: of its LoRA's name, and by a node of its id where there are several.
export async function findRun(node, name) {
  const named = (await listRuns()).filter((run) => run.name === name);
  return (named.find((run) => run.node === node) ?? named[0])?.run;
}

async function ask(path, options) {
  const answer = await api.fetchApi(path, options);
  const body = await answer.text();
  if (answer.ok) return JSON.parse(body);
  let error = body;
  try {
    error = JSON.parse(body).error ?? body;
  } catch { /* no JSON: the text itself */ }
  throw new Error(error || `${answer.status} ${answer.statusText}`);
}

function take(message) {
  const key = `${message.node}|${message.name}`;
  let state = states.get(key);
  if (!state || (!message.run && state.run)) states.set(key, (state = new RunState())); // a start: what was before is over
  if (message.run && state.run !== message.run) join(state, message.run, key);
  if (state.waiting) state.waiting.push(message);
  else state.take(message);
  tell(key, state);
}

// A run that this page meets: resumed, or under way already. What it has missed comes first.
async function join(state, run, key) {
  state.run = run;
  state.waiting = [];
  let story = null;
  try {
    story = await tellRun(run);
  } catch (error) {
    console.warn("[ChromaTrainer] no backlog:", error);
  }
  const { waiting, memory } = state;
  state.waiting = null;
  if (story) state.load(story);
  state.memory ??= memory;
  for (const message of waiting) state.take(message);
  tell(key, state);
}

function tell(key, state) {
  const cut = key.indexOf("|");
  for (const call of watchers) call(key.slice(0, cut), key.slice(cut + 1), state);
}

api.addEventListener("chroma_trainer.event", ({ detail }) => take(detail));
