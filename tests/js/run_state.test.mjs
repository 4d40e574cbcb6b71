// js/run_state.js: messages and the backlog become the state that the page shows.

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { load } from "./load.mjs";
import { random } from "./random.mjs";

const { RunState, ago, bytes, clock, heldOutText, leakText, scoreText, smoothed } = await load("run_state.js");

const range = (first, last) => Array.from({ length: last - first + 1 }, (_, i) => first + i);

// Columns for these steps. The values encode the step and the attempt.
function columns(steps, attempt = 0) {
  const values = (scale) => steps.map((step) => step * scale + attempt);
  return { step: [...steps], loss: values(0.5), learning_rate: values(0.01), grad_norm: values(2), seconds: values(1) };
}

const reports = (first, last, attempt = 0) => ({ kind: "StepReports", total: 100, steps: columns(range(first, last), attempt) });
const picture = (step, label = "64x64", url = `/view?step=${step}`) => ({ kind: "PreviewReady", step, label, url });
const saved = (step) => ({ kind: "CheckpointSaved", step });

function after(...messages) {
  const state = new RunState();
  for (const message of messages) state.take(message);
  return state;
}

function story(changes = {}) {
  return {
    summary: { run: "cat-1a2b3c4d", state: "running", message: "", total: 100, step: 20, phase: "train" },
    steps: columns(range(1, 20)), checkpoints: [10, 20], notices: [], crops: "/view?crops", plan: {}, lora: {}, phase: {},
    pictures: [{ step: 10, label: "64x64", url: "/view?step=10", changed: 7 }],
    settings: { rank: 4 }, prompt: { 5: {} }, ...changes,
  };
}

// What a page shows, without the timestamps in the URLs.
function shown(state) {
  const { steps, checkpoints, pictures, notices, state: name, total, phase, lora, message } = state;
  return structuredClone({
    steps, checkpoints, notices, name, total, phase, lora, message, pictures: pictures.map(({ step, label }) => [step, label]),
  });
}

describe("a run from its messages", () => {
  test("before the first message there is nothing", () => {
    const state = new RunState();
    assert.equal(state.doing, "Not run yet");
    assert.deepEqual([state.step, state.numPoints, state.pace, state.secondsLeft], [0, 0, 0, null]);
    assert.deepEqual(state.progress, [0, 0]);
  });

  test("a process that has begun no phase yet is starting", () => {
    const state = new RunState();
    state.take({ kind: "RunWaiting" });
    state.take({ kind: "Notice", level: "info", text: "training in the background" });
    assert.equal(state.doing, "Starting");
  });

  test("phases, steps, files and the end update the state", () => {
    const state = after({ kind: "RunOpened" }, { kind: "PhaseStarted", phase: "latents", total: 8, unit: "images" });
    assert.equal(state.doing, "Caching latents");
    assert.deepEqual(state.progress, [0, 8]);
    state.take({ kind: "PhaseProgress", phase: "latents", done: 3, total: 8 });
    assert.deepEqual(state.progress, [3, 8]);
    assert.equal(state.phase.unit, "images");

    state.take({ kind: "PhaseStarted", phase: "train", total: 100, unit: "steps" });
    assert.deepEqual(state.progress, [0, 100]);
    state.take(reports(1, 7));
    assert.equal(state.doing, "Training");
    assert.deepEqual(state.progress, [7, 100]);
    assert.deepEqual(state.steps, columns(range(1, 7)));

    state.take(saved(5));
    state.take(picture(5));
    state.take({ kind: "LoraSaved", lora: "cat.safetensors", applied: 12, num_keys: 12 });
    state.take({ kind: "MemoryPlanned", device_bytes: 3, ram_bytes: 4 });
    assert.deepEqual(state.checkpoints, [5]);
    assert.equal(state.pictures[0].step, 5);
    assert.match(state.pictures[0].url, /^\/view\?step=5&v=\d+$/);
    assert.deepEqual(state.lora, { lora: "cat.safetensors", applied: 12, num_keys: 12 });
    assert.equal(state.plan.ram_bytes, 4);

    state.take({ kind: "RunEnded", state: "finished", message: "" });
    assert.equal(state.doing, "Finished");
    assert.equal(state.numPoints, 7);
  });

  test("progress of another phase does not inherit the unit", () => {
    const state = after({ kind: "PhaseStarted", phase: "text", total: 4, unit: "captions" });
    state.take({ kind: "PhaseProgress", phase: "latents", done: 1, total: 2 });
    assert.deepEqual(state.phase, { phase: "latents", done: 1, total: 2, unit: "" });
  });

  test("any message may carry the memory usage", () => {
    const memory = { used: 1, total: 2, kind: "RAM" };
    const state = after({ kind: "RunOpened", memory });
    state.take(saved(1));
    assert.deepEqual(state.memory, memory);
  });

  test("a message of an unknown kind only marks the run as running", () => {
    const state = after(reports(1, 3), saved(2));
    const before = shown(state);
    state.take({ kind: "SomethingNew", step: 1, state: "failed" });
    assert.deepEqual(shown(state), before);
    assert.equal(state.state, "running");
  });
});

describe("order and duplicates", () => {
  test("the same steps make the same state, however they are split into messages", () => {
    const next = random(1);
    const whole = shown(after(reports(1, 60)));
    for (let attempt = 0; attempt < 50; attempt++) {
      const state = new RunState();
      for (let first = 1; first <= 60; ) {
        const last = Math.min(60, first + Math.floor(next() * 9));
        state.take(reports(first, last));
        first = last + 1;
      }
      assert.deepEqual(shown(state), whole);
    }
  });

  test("a repeated message counts once", () => {
    const messages = [reports(1, 10), saved(10), picture(10), reports(11, 20)];
    const once = shown(after(...messages));
    assert.deepEqual(shown(after(...messages.flatMap((message) => [message, message]))), once);
  });

  test("an empty message of steps changes no step", () => {
    const state = after(reports(1, 5), { kind: "StepReports", total: 100, steps: columns([]) });
    assert.deepEqual(state.steps, columns(range(1, 5)));
  });

  test("the columns are as long as each other and the steps increase, whatever comes", () => {
    const next = random(2);
    const state = new RunState();
    for (let i = 0; i < 500; i++) {
      const first = 1 + Math.floor(next() * 80);
      state.take(reports(first, first + Math.floor(next() * 6), i));
      const { step } = state.steps;
      for (const [name, values] of Object.entries(state.steps)) assert.equal(values.length, step.length, name);
      assert.ok(step.every((value, k) => k === 0 || value > step[k - 1]), `${step}`);
      assert.equal(state.step, step.at(-1));
    }
  });

  test("pictures are kept by step and label; the newest URL wins", () => {
    const state = after(picture(20), picture(10, "64x64", "/old"), picture(10, "32x32"), picture(10, "64x64", "/new"));
    assert.deepEqual(state.pictures.map(({ step }) => step), [10, 10, 20]);
    const [first] = state.pictures.filter(({ step, label }) => step === 10 && label === "64x64");
    assert.match(first.url, /^\/new&/);
    assert.equal(state.pictures.length, 3);
  });

  test("pictures without a URL or a step are ignored", () => {
    assert.deepEqual(after(picture(10, "64x64", ""), picture(-1)).pictures, []);
  });
});

describe("resume", () => {
  test("repeated steps replace those after the checkpoint", () => {
    const state = after(reports(1, 30), saved(10), saved(20), saved(30), picture(20), picture(30));
    state.take({ kind: "RunEnded", state: "stopped", message: "" });
    state.take({ kind: "RunOpened" });
    state.take(reports(21, 23, 0.25));

    assert.deepEqual(state.steps.step, range(1, 23));
    assert.deepEqual(state.steps.loss.slice(18), [9.5, 10, 10.75, 11.25, 11.75]);
    assert.deepEqual(state.checkpoints, [10, 20]);
    assert.deepEqual(state.pictures.map(({ step }) => step), [20]);
    assert.equal(state.state, "running");
  });

  test("a resume at the last step loses nothing", () => {
    const state = after(reports(1, 20), saved(20), picture(20), { kind: "RunOpened" }, reports(21, 25));
    assert.deepEqual(state.steps, columns(range(1, 25)));
    assert.deepEqual([state.checkpoints, state.pictures.length], [[20], 1]);
  });

  test("a new start clears the warnings of the earlier one", () => {
    const state = after({ kind: "Notice", text: "old", level: "warning" }, { kind: "RunOpened" });
    state.take({ kind: "Notice", text: "new", level: "warning" });
    assert.deepEqual(state.notices, [{ text: "new", level: "warning" }]);
  });
});

describe("ends", () => {
  for (const [name, words] of [
    ["finished", "Finished"], ["paused", "Paused"], ["stopped", "Stopped"], ["failed", "Failed"], ["new-name", "new-name"],
  ])
    test(`${name} is shown as ${words}`, () => {
      assert.equal(after(reports(1, 2), { kind: "RunEnded", state: name, message: "" }).doing, words);
    });

  test("a failure keeps the curve, the checkpoints and its message", () => {
    const state = after(reports(1, 9), saved(5), { kind: "RunEnded", state: "failed", message: "out of memory" });
    assert.deepEqual([state.state, state.message, state.numPoints, state.checkpoints], ["failed", "out of memory", 9, [5]]);
    assert.equal(state.secondsLeft, null);
  });

  test("the progress is that of the steps, whatever phase was interrupted", () => {
    const state = after(reports(1, 9), { kind: "PhaseStarted", phase: "validate", total: 4, unit: "images" });
    assert.deepEqual(state.progress, [0, 4]);
    state.take({ kind: "RunEnded", state: "stopped", message: "" });
    assert.deepEqual(state.progress, [9, 100]);
  });

  test("a failure before the first step shows its message", () => {
    const state = after({ kind: "RunEnded", state: "failed", message: "no images" });
    assert.deepEqual([state.state, state.message, state.step], ["failed", "no images", 0]);
  });
});

describe("the backlog", () => {
  test("loading replaces the whole state", () => {
    const state = after(reports(1, 90), saved(50), picture(50));
    state.load(story());
    assert.equal(state.run, "cat-1a2b3c4d");
    assert.deepEqual(state.steps, columns(range(1, 20)));
    assert.deepEqual(state.checkpoints, [10, 20]);
    assert.deepEqual(state.pictures, [{ step: 10, label: "64x64", url: "/view?step=10&v=7" }]);
    assert.deepEqual([state.settings, state.prompt], [{ rank: 4 }, { 5: {} }]);
    assert.deepEqual([state.doing, state.total, state.lora], ["Training", 100, null]);
  });

  test("loading and messages give the same curve", () => {
    const [loaded, live] = [new RunState(), after(reports(1, 20), reports(21, 25))];
    loaded.load(story());
    loaded.take(reports(21, 25));
    assert.deepEqual(loaded.steps, live.steps);
  });

  test("following adds what is new and keeps the settings", () => {
    const state = new RunState();
    state.load(story());
    const { settings, prompt, ...rest } = story({ steps: columns(range(21, 30)), checkpoints: [10, 20, 30] });
    state.follow({ ...rest, lora: { lora: "cat.safetensors", applied: 1, num_keys: 1 } });
    assert.deepEqual(state.steps, columns(range(1, 30)));
    assert.deepEqual(state.checkpoints, [10, 20, 30]);
    assert.deepEqual([state.settings, state.prompt], [settings, prompt]);
    assert.equal(state.lora.lora, "cat.safetensors");
    assert.equal(state.pictures.length, 1);
    state.follow({ ...rest, steps: columns([]), pictures: [] });
    assert.deepEqual(state.pictures, []);
  });

  test("without steps, the step is the summary's", () => {
    const state = new RunState();
    state.load(story({ steps: columns([]) }));
    assert.deepEqual(state.progress, [20, 100]);
  });

  test("a process that died is shown as such", () => {
    const state = new RunState();
    state.load(story({ summary: { ...story().summary, state: "died" } }));
    assert.equal(state.doing, "Ended unexpectedly");
  });
});

describe("pace", () => {
  const timed = (seconds) => {
    const steps = { ...columns(range(1, seconds.length)), seconds };
    return after({ kind: "StepReports", total: 1000, steps });
  };

  test("is the median: one slow step does not change it", () => {
    assert.equal(timed([2, 2, 900, 2, 2]).pace, 2);
  });

  test("is taken from the last 50 steps", () => {
    assert.equal(timed([...Array(500).fill(9), ...Array(50).fill(3)]).pace, 3);
  });

  test("ignores steps without a time", () => {
    assert.equal(timed([null, 4, null, null]).pace, 4);
    assert.equal(timed([null, null]).pace, 0);
  });

  test("gives the seconds left", () => {
    const state = timed([2, 2, 2, 2]);
    assert.equal(state.secondsLeft, 2 * 996);
    state.take({ kind: "RunEnded", state: "paused", message: "" });
    assert.equal(state.secondsLeft, null);
  });
});

describe("the smoothed loss", () => {
  const curve = (loss, step = range(1, loss.length)) => smoothed({ step, loss }, 1000);
  const near = (found, wanted) => assert.ok(Math.abs(found - wanted) < 1e-9, `${found}, not ${wanted}`);

  test("of a constant is the constant from the first step on", () => {
    for (const value of curve(Array(300).fill(0.7))) near(value, 0.7);
  });

  test("has one value per step, stays within the losses so far and varies less", () => {
    const next = random(3);
    const loss = range(1, 2000).map(() => 1 + next());
    const found = curve(loss);
    assert.equal(found.length, loss.length);
    let [low, high] = [Infinity, -Infinity];
    found.forEach((value, i) => {
      [low, high] = [Math.min(low, loss[i]), Math.max(high, loss[i])];
      assert.ok(value >= low - 1e-9 && value <= high + 1e-9, `${i}: ${value}`);
    });
    const spread = (values) => Math.max(...values) - Math.min(...values);
    assert.ok(spread(found.slice(500)) < 0.5 * spread(loss));
  });

  test("follows a lasting change", () => {
    near(Math.round(curve([...Array(100).fill(4), ...Array(3000).fill(1)]).at(-1) * 1000), 1000);
  });

  test("weights a step by the gap before it: a thinned point counts for the steps it replaces", () => {
    const dense = curve([5, ...Array(10).fill(2), ...Array(20).fill(3)]);
    const thin = curve([5, 2, 3], [1, 11, 31]);
    near(thin[1], dense[10]);
    near(thin[2], dense[30]);
  });

  test("skips missing losses, and is missing before the first one", () => {
    for (const missing of [null, NaN, Infinity]) {
      const found = curve([missing, missing, 3, missing, 3]);
      assert.deepEqual(found.slice(0, 2), [null, null]);
      for (const value of found.slice(2)) near(value, 3);
    }
  });

  test("adapts faster in a short run than in a long one", () => {
    const columns = { step: range(1, 60), loss: [...Array(30).fill(1), ...Array(30).fill(0)] };
    assert.ok(smoothed(columns, 100).at(-1) < 0.1);
    assert.ok(smoothed(columns, 100000).at(-1) > 0.4);
    near(smoothed({ step: range(1, 201), loss: [...Array(200).fill(1), 0] }, 1).at(-1), 0.9); // a step moves it by a tenth at most
  });

  test("of nothing is nothing", () => assert.deepEqual(curve([]), []));
});

describe("formatting", () => {
  test("clock", () => {
    assert.deepEqual([0, 59.6, 61, 3599, 3661, 360000].map(clock), ["0:00", "1:00", "1:01", "59:59", "1:01:01", "100:00:00"]);
  });

  test("bytes", () => {
    assert.deepEqual([0, 1.5 * 2 ** 30, 24 * 2 ** 30].map(bytes), ["0.0 GB", "1.5 GB", "24 GB"]);
  });

  test("ago", () => {
    const now = Date.now() / 1000;
    const found = [0, now + 100, now - 5, now - 61, now - 3601, now - 3 * 86400 - 1].map(ago);
    assert.deepEqual(found, ["", "just now", "just now", "1 minute ago", "1 hour ago", "3 days ago"]);
  });
});

describe("held-out images", () => {
  const report = (step, loss, more = {}) => ({ kind: "EvalReport", step, loss, standard_error: 0.1, held_out: true, ...more });
  const compared = (step, values) => ({ kind: "EvalCompared", node: "5", run: "cat", step, trained: 0.4, overfits: false, ...values });

  test("an evaluation and what it says beside the others are one", () => {
    const state = after(report(0, 0.5), report(10, 0.4), compared(10, { best: 10, waiting: 0 }));
    assert.deepEqual(state.evals, [
      { step: 0, loss: 0.5, standard_error: 0.1, held_out: true },
      { step: 10, loss: 0.4, standard_error: 0.1, held_out: true, trained: 0.4, overfits: false, best: 10, waiting: 0 },
    ]);
    assert.equal(heldOutText(state, String), "0.4");
  });

  test("its change since the lowest is shown", () => {
    const worse = compared(20, { best: 10, waiting: 1, change: 0.02, change_error: 0.01 });
    const state = after(report(10, 0.4), report(20, 0.42), worse);
    assert.equal(heldOutText(state, String), "0.42 (+0.02 ± 0.01 since step 10)");
    assert.equal(heldOutText(after(report(0, 0.5, { held_out: false })), String), "");
  });

  test("a resume takes back what was lost, and a history brings it", () => {
    const state = after(report(10, 0.4), report(20, 0.42), reports(1, 20), reports(16, 17));
    assert.deepEqual(state.heldOut.map(({ step }) => step), [10]);
    state.load(story({ evals: [{ step: 5, loss: 0.3, held_out: true }, { step: 6, loss: null, held_out: true }] }));
    assert.deepEqual(state.heldOut.map(({ step }) => step), [5]);
    state.load(story());
    assert.deepEqual(state.evals, []);
  });
});

describe("the leak without the trigger", () => {
  const measured = (step, leak) => ({ kind: "LeakMeasured", node: "5", run: "cat", step, leak, standard_error: 0.05, sigmas: [0.125], by_sigma: [leak] });

  test("the newest is shown; a resume takes back what was lost, and a history brings it", () => {
    assert.equal(leakText(after(), String), "");
    assert.equal(leakText(after(measured(10, 0.3), measured(20, 0.4)), String), "0.4 ± 0.05");
    assert.deepEqual(after(measured(10, 0.3), measured(20, 0.4), reports(1, 20), reports(16, 17)).leaks.map(({ step }) => step), [10]);
    const state = after(measured(10, 0.3));
    state.load(story({ leaks: [{ step: 5, leak: 0.2, standard_error: 0.1 }] }));
    assert.equal(leakText(state, String), "0.2 ± 0.1");
    state.load(story());
    assert.deepEqual(state.leaks, []);
  });
});

describe("scores of images", () => {
  const scored = (step, clip, strength = 1, is_shown = true, likeness = null) => ({
    kind: "ImagesScored", node: "5", run: "cat", step, strength, is_shown, clip, clip_error: 0.5, clip_change: step ? clip - 20 : null, clip_change_error: 0.25,
    likeness, likeness_error: 0.01, likeness_change: null, likeness_change_error: null, prompts: ["a cat"], by_prompt: [clip],
  });

  test("the newest of the strength that is shown, with its change from the base model", () => {
    assert.equal(scoreText(after(), "clip", String), "");
    assert.equal(scoreText(after(scored(0, 20, 0)), "clip", String), "20 ± 0.5");
    const state = after(scored(0, 20, 0), scored(10, 25, 0.5, false), scored(10, 19, 1, true, 0.75));
    assert.equal(scoreText(state, "clip", String), "19 ± 0.5 (\u22121 ± 0.25)");
    assert.equal(scoreText(state, "likeness", String), "0.75 ± 0.01");
    assert.deepEqual([state.scores.length, state.shownScores.map(({ step }) => step)], [3, [0, 10]]);
  });

  test("a history brings them, and a resume takes back what was lost", () => {
    const state = after(scored(0, 20, 0), scored(10, 25), scored(20, 26), reports(1, 20), reports(16, 17));
    assert.deepEqual(state.scores.map(({ step }) => step), [0, 10]);
    state.load(story({ scores: [scored(5, 21)] }));
    assert.equal(state.shownScores.at(-1).step, 5);
  });
});

test("a resumed run measures step 0 again, and what was measured later stays", () => {
  const evaluated = (step) => ({ kind: "EvalReport", step, loss: 1, standard_error: 0.1, held_out: true });
  const leak = (step) => ({ kind: "LeakMeasured", step, leak: 0.1, standard_error: 0.01 });
  const state = after(evaluated(0), evaluated(10), leak(10), evaluated(0), leak(20));
  assert.deepEqual([state.evals, state.leaks].map((items) => items.map(({ step }) => step)), [[0, 10], [10, 20]]);
});

describe("previews while sampling", () => {
  const preview = (step, url = "/view?filename=preview.jpg") => ({ kind: "SamplingPreview", step, total: 26, url });

  test("the newest is shown until the image is there, or the phase or the run ends", () => {
    assert.deepEqual([after(preview(3)).sampling.step, after(preview(3), preview(4)).sampling.step], [3, 4]);
    assert.match(after(preview(3)).sampling.url, /preview\.jpg&v=\d+$/); // not the one in the browser's cache
    const ends = [picture(10), { kind: "PhaseStarted", phase: "train", total: 9 }, { kind: "RunEnded", state: "finished" }];
    for (const end of ends) assert.equal(after(preview(3), end).sampling, null, end.kind);
    assert.equal(after(preview(3, "")).sampling, null); // outside of ComfyUI's output folder
  });
});

describe("a run of 50,000 steps", () => {
  const LAST = 50_000;
  const loss = (step) => 1 / (1 + step / 5000) + 0.1 * Math.sin(step);
  const one = (step) => ({ step: [step], loss: [loss(step)], learning_rate: [1e-4], grad_norm: [1], seconds: [step % 7 ? 0.5 : null] });
  const state = new RunState();
  const every = { step: [], loss: [] };
  let largest = 0;
  for (let step = 1; step <= LAST; step++) {
    state.take({ kind: "StepReports", total: LAST, steps: one(step) });
    every.step.push(step);
    every.loss.push(loss(step));
    if (step % 10) continue;
    state.take(picture(step));
    state.take(saved(step));
    state.take({ kind: "EvalReport", step, loss: loss(step), standard_error: 0.01, held_out: true });
    state.take({ kind: "LeakMeasured", step, leak: 0.1, standard_error: 0.01 });
    state.take({ kind: "Notice", text: `notice ${step}`, level: "warning" });
    state.take({ kind: "SamplingPreview", step, total: LAST, url: `/view?sampling=${step}` });
    if (!(step % 1000)) largest = Math.max(largest, JSON.stringify(state).length);
  }

  test("what the page holds of it is bounded", () => {
    assert.ok(state.numPoints <= 8000);
    for (const name of ["pictures", "checkpoints", "evals", "leaks"]) assert.ok(state[name].length <= 1000, name);
    assert.equal(state.notices.length, 20);
    assert.ok(largest < 1_500_000, `${largest} characters of JSON`);
  });

  test("its newest values are as they came, and its curve is the same", () => {
    assert.deepEqual([state.step, state.total, state.pace], [LAST, LAST, 0.5]);
    assert.deepEqual(state.steps.step.slice(-2000), range(LAST - 1999, LAST));
    assert.ok(state.steps.step.every((step, i) => !i || step > state.steps.step[i - 1]));
    for (const name of ["pictures", "evals", "leaks"]) assert.equal(state[name].at(-1).step, LAST);
    assert.ok(state.steps.step[0] < 100);
    const [thin, whole] = [smoothed(state.steps, LAST), smoothed(every, LAST)];
    state.steps.step.forEach((step, i) => assert.ok(step < 100 || Math.abs(thin[i] - whole[step - 1]) < 0.01, `step ${step}`));
  });

  test("it can still be rewound by a resume", () => {
    state.take({ kind: "StepReports", total: LAST, steps: one(25_001) });
    assert.equal(state.step, 25_001);
    assert.ok(state.steps.step.at(-2) <= 25_000 && state.checkpoints.at(-1) <= 25_000);
  });
});
