// js/ask.js: when a run can be asked for images, and the images of the answers.

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import "./dom_stub.mjs";
import { load } from "./load.mjs";

const { Ask, canDraw } = await load("ask.js");
const state = (values = {}) => ({ state: "paused", checkpoints: [250], drawn: [], ...values });

describe("asking a run for images", () => {
  test("a run that is not running and has a checkpoint", () => {
    for (const name of ["paused", "stopped", "finished", "failed", "died"]) assert.ok(canDraw(state({ state: name })), name);
    for (const values of [{ state: "running" }, { state: "unreadable" }, { checkpoints: [] }])
      assert.ok(!canDraw(state(values)), JSON.stringify(values));
  });

  test("lines are sent, and nothing else", async () => {
    const sent = [];
    const ask = new Ask(async (lines) => sent.push(lines));
    for (const value of ["", " \n ", " a cat \n\na dog"]) {
      ask.box.value = value;
      await ask.button.listeners.get("click")();
    }
    assert.deepEqual(sent, [["a cat", "a dog"]]);
    assert.equal(ask.button.disabled, false);
  });

  test("the form hides while the run is active, and the images stay", () => {
    const ask = new Ask(async () => {});
    ask.draw(state({ drawn: [{ step: 250, url: "/view?filename=a.png&v=1" }] }));
    assert.equal(ask.form.style.display, "");
    assert.equal(ask.images.children.length, 1);
    ask.draw(state({ state: "running", drawn: [{ step: 250, url: "/view?filename=a.png&v=1" }] }));
    assert.equal(ask.form.style.display, "none");
    assert.equal(ask.images.children.length, 1);
  });
});
