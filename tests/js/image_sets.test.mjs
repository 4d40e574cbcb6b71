// The blind vote and the strength slider: what comes next, what the votes say, what is shown between two strengths.

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import "./dom_stub.mjs";
import { load } from "./load.mjs";

const { VoteDialog, nextPlace, outcomeText } = await load("vote_dialog.js");
const { StrengthsDialog, mixAt, opacitiesOf, sharesAt } = await load("strengths_dialog.js");
const { ImageSets, setPrompt, versionsOf } = await load("image_sets.js");
const { api } = await import("./comfyui_stub.mjs");

const rows = (...choices) => choices.map((choice) => ({ choice, prompt: "a cat", seed: 0 }));
globalThis.Image = class {};

describe("the blind vote", () => {
  const OUTCOME = { first: "step 250", second: "step 500", wins: [4, 6], equal: 1, low: 0.313, high: 0.832, better: "", share: 0.6 };

  test("the next pair without a vote, from here on and then from the start", () => {
    assert.equal(nextPlace(rows("left", "", "equal", "")), 1);
    assert.equal(nextPlace(rows("left", "", "equal", ""), 2), 3);
    assert.equal(nextPlace(rows("", "left", "equal"), 2), 0);
    assert.equal(nextPlace(rows("left", "right")), 2);
  });

  test("the outcome in words", () => {
    assert.equal(outcomeText(OUTCOME), "step 500 against step 250: preferred in 6 of 10 pairs, 1 equal. Its share is 31 % to 83 % (95 % certainty). They can't be told apart yet.");
    assert.match(outcomeText({ ...OUTCOME, better: "step 500" }), /step 500 is better\.$/);
    assert.match(outcomeText({ ...OUTCOME, wins: [0, 0] }), /0 of 0 pairs, 1 equal\. They can't/);
  });

  // A dialog on a server that stores the votes.
  function opened(stored) {
    const sent = [];
    api.fetchApi = async (path, { body } = {}) => {
      const { place, choice } = body ? JSON.parse(body) : {};
      if (body) {
        sent.push([place, choice]);
        stored[place].choice = choice;
      }
      return { ok: true, text: async () => JSON.stringify({ rows: stored, outcome: stored.every((row) => row.choice) ? OUTCOME : null }) };
    };
    const dialog = new VoteDialog("/sets/vote-1", { notify: (...what) => sent.push(what), closed: () => {} });
    dialog.take({ rows: stored, outcome: null });
    dialog.show(nextPlace(stored));
    return { dialog, sent };
  }

  const press = async (dialog, key, more = {}) => {
    dialog.key({ key, preventDefault() {}, ...more });
    await new Promise((done) => setTimeout(done));
  };

  test("keys vote, undo takes back, and the end shows the result", async () => {
    const { dialog, sent } = opened(rows("equal", "", ""));
    assert.equal(dialog.place, 1);
    await press(dialog, "ArrowLeft");
    await press(dialog, "ArrowRight", { repeat: true }); // held down
    await press(dialog, "ArrowRight", { ctrlKey: true });
    await press(dialog, "x");
    assert.deepEqual([dialog.place, sent], [2, [[1, "left"]]]);
    await press(dialog, "Backspace");
    assert.deepEqual([dialog.place, sent.at(-1)], [1, [1, ""]]);
    await press(dialog, "ArrowDown");
    await press(dialog, "ArrowRight");
    assert.deepEqual(sent.slice(2), [[1, "equal"], [2, "right"]]);
    assert.deepEqual([dialog.page.getAttribute("data-over"), dialog.page.getAttribute("data-result"), dialog.pair.hidden], ["true", "undecided", true]);
    await press(dialog, "ArrowRight"); // after the end
    assert.equal(sent.length, 4);
  });

  test("a vote of an earlier visit can be taken back too, and a failure is shown", async () => {
    const { dialog, sent } = opened(rows("left", "", ""));
    await press(dialog, "Backspace");
    assert.deepEqual(sent, [[0, ""]]);
    api.fetchApi = async () => ({ ok: false, text: async () => '{"error": "disk full"}' });
    await press(dialog, "ArrowLeft");
    assert.deepEqual([dialog.place, sent.at(-1)[2]], [0, "disk full"]);
  });
});

describe("the slider", () => {
  test("between two strengths the upper image covers the lower in part", () => {
    const strengths = [0, 0.5, 1];
    assert.deepEqual(mixAt(strengths, 0.5), { below: 0, above: 1, opacity: 1, nearest: 1 });
    assert.deepEqual(mixAt(strengths, 0.6), { below: 1, above: 2, opacity: 0.19999999999999996, nearest: 1 });
    assert.equal(mixAt(strengths, 0.8).nearest, 2);
    assert.deepEqual([mixAt(strengths, 0).below, mixAt(strengths, -1).below, mixAt(strengths, 2).below], [0, 0, 2]);
  });
});

describe("the sliders of strengths and checkpoints", () => {
  // What is seen of each layer of a stack: its opacity, less what those above it cover.
  const seen = (opacities) => opacities.map((own, layer) => opacities.slice(layer + 1).reduce((rest, above) => rest * (1 - above), own));

  test("what is seen is the mix of the four images around a place", () => {
    const [steps, strengths] = [[100, 200, 400], [0, 1]];
    const shares = sharesAt(mixAt(steps, 250), mixAt(strengths, 0.6), 2);
    const expected = [0, 0, 0.75 * 0.4, 0.75 * 0.6, 0.25 * 0.4, 0.25 * 0.6];
    seen(opacitiesOf(shares, 6)).forEach((value, i) => assert.ok(Math.abs(value - expected[i]) < 1e-12, `${i}`));
    assert.deepEqual(opacitiesOf(sharesAt(mixAt([5], 5), mixAt([0, 1], 0.25), 2), 2), [1, 0.25]); // one checkpoint: as ever
  });

  test("the nearest image is saved, of its checkpoint", () => {
    const versions = [100, 200].flatMap((step) => [0, 0.5, 1].map((strength) => ({ label: `step ${step}, ${strength}`, strength, step })));
    const dialog = new StrengthsDialog("/sets/x", { versions, step: 200, rows: [{ name: "cat", seed: 0, size: [64, 64] }] }, { notify: () => {} });
    assert.deepEqual([dialog.steps, dialog.strengths], [[100, 200], [0, 0.5, 1]]);
    [dialog.slider.value, dialog.stepSlider.value] = ["0.6", "120"];
    dialog.mix();
    assert.equal(dialog.nearest, 1);
    assert.match(dialog.save.getAttribute("title"), /step 100 at strength 0\.5/);
    [dialog.slider.value, dialog.stepSlider.value] = ["0.1", "190"];
    dialog.mix();
    assert.deepEqual([dialog.nearest, dialog.save.disabled], [3, true]); // the base model
  });
});

describe("what is sampled", () => {
  test("versions of a vote, the newest first", () => {
    assert.deepEqual(versionsOf({ steps: [250, 500], loras: ["x/a.safetensors"] }).map(([value]) => value), ["500", "250", "base", "x/a.safetensors"]);
    const sets = new ImageSets("cat-12345678", { queue: () => {}, notify: () => {} });
    sets.fill(versionsOf({ steps: [250, 500], loras: [] }));
    assert.deepEqual([sets.first.value, sets.second.value], ["250", "500"]);
  });

  test("the prompt for the queue", () => {
    assert.deepEqual(setPrompt("cat-12345678", { prompts: "a cat\na dog" }), {
      1: { class_type: "SampleRun", inputs: { run: "cat-12345678", prompts: "a cat\na dog" } },
    });
    assert.equal(setPrompt("cat", { compare: "1, 2", num_seeds: 3 })[1].inputs.prompts, "");
  });
});
