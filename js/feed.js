// The source of runs: the server's messages while one is active, and the run history for everything before.

import { api } from "../../scripts/api.js";
import { isNamed, isOfSweep } from "./names.js";
import { ask } from "./requests.js";
import { RunState } from "./run_state.js";

const ROOT = "/chroma_trainer";
const states = new Map(); // "node|name" -> RunState
const watchers = new Set();

// Calls call(node id as in a prompt, LoRA's name, RunState) after every event.
export function watch(call) {
  watchers.add(call);
}

export function stateOf(node, name) {
  return states.get(`${node}|${name}`);
}

// {runs, queue}: the runs that have a folder, and those of the background that have none yet.
export function listRuns() {
  return ask(`${ROOT}/runs`);
}

export function fetchRun(run, after = 0) {
  return ask(`${ROOT}/runs/${encodeURIComponent(run)}${after ? `?after=${after}` : ""}`);
}

// pause, stop or resume.
export function command(run, name) {
  return ask(`${ROOT}/runs/${encodeURIComponent(run)}/${name}`, { method: "POST" });
}

// up or remove, for a run that waits.
export function order(id, action) {
  return ask(`${ROOT}/queue/${encodeURIComponent(id)}/${action}`, { method: "POST" });
}

// Loads the state of a run from its history, for a node of that id.
export async function openRun(run, node, name) {
  const state = new RunState();
  state.load(await fetchRun(run));
  states.set(`${node}|${name}`, state);
  return state;
}

// Finds the latest run of a node: by its LoRA's name as typed, and by the node's id if there are several. waits: it is in
// the queue, and has not started.
export async function findRun(node, name) {
  const { runs, queue = [] } = await listRuns();
  const named = runs.filter((run) => isNamed(name, run.name) || (run.node === node && isOfSweep(name, run.name)));
  const waits = queue.some((entry) => entry.state === "waiting" && entry.node === node && (isNamed(name, entry.name) || isOfSweep(name, entry.name)));
  return { run: (named.find((run) => run.node === node) ?? named[0])?.run, waits };
}

// A state that says that a node's run waits.
export function waitingState(node, name) {
  const state = new RunState();
  state.take({ kind: "RunWaiting" });
  states.set(`${node}|${name}`, state);
  return state;
}

function take(message) {
  const key = `${message.node}|${message.name}`;
  let state = states.get(key);
  const isNewStart = !state || (!message.run && state.run); // the previous run is over
  if (isNewStart) states.set(key, (state = new RunState()));
  if (message.run && state.run !== message.run) join(state, message.run, key);
  if (state.waiting) state.waiting.push(message);
  else state.take(message);
  notifyWatchers(key, state);
}

// Joins a run that this page has not seen from its start: resumed, or already active. What the page has missed is
// loaded first.
async function join(state, run, key) {
  state.run = run;
  state.waiting = [];
  let history = null;
  try {
    history = await fetchRun(run);
  } catch (error) {
    console.warn("[ChromaTrainer] could not load the history of a run:", error);
  }
  const { waiting, memory } = state;
  state.waiting = null;
  if (history) state.load(history);
  state.memory ??= memory;
  for (const message of waiting) state.take(message);
  notifyWatchers(key, state);
}

function notifyWatchers(key, state) {
  const cut = key.indexOf("|");
  for (const call of watchers) call(key.slice(0, cut), key.slice(cut + 1), state);
}

api.addEventListener("chroma_trainer.event", ({ detail }) => take(detail));
