// js/names.js and js/numbers.js: what belongs to a typed name, what a copy is named, and how a number is written.

import assert from "node:assert/strict";
import { test } from "node:test";

import { load } from "./load.mjs";

const { isNamed, isOfSweep, uniqueName } = await load("names.js");
const { decimalsOf } = await load("numbers.js");

test("a run belongs to the name as it was typed", () => {
  for (const [typed, name] of [
    ["mine", "mine"], ["mine.safetensors", "mine"], ["a\\b.SafeTensors", "a/b"], ["x (v1.5)+[2]", "x (v1.5)+[2]"],
    ["mine-%date%", "mine-2031-02-03"], ["%date:yyyy%/mine_%hour%%minute%", "2031/mine_0405"],
  ]) assert.ok(isNamed(typed, name), `${typed} ${name}`);
  for (const [typed, name] of [["mine", "mine-2"], ["m.ne", "mine"], ["mine-%date%", "other-2031-02-03"], ["mine-%date%", "mine-"]])
    assert.ok(!isNamed(typed, name), `${typed} ${name}`);
});

test("a copy gets the next free name", () => {
  for (const [name, taken, unique] of [
    ["mine", [], "mine"], ["mine", ["other"], "mine"], ["mine", ["mine"], "mine-2"], ["mine", ["MINE.safetensors"], "mine-2"],
    ["mine-2", ["mine", "mine-2"], "mine-3"], ["mine", ["mine", "mine-2"], "mine-3"], ["mine-2", ["mine-2"], "mine-3"],
    ["mine.safetensors", ["mine"], "mine-2"], ["v-2031", ["v-2031"], "v-2032"], ["styles/a", ["styles/a"], "styles/a-2"],
  ]) assert.equal(uniqueName(name, taken), unique);
});

test("numbers have no needless zeros", () => {
  const cases = [[64, 2, 0], [64.5, 2, 1], [0.0001, 6, 4], [0.000001, 6, 6], [1 / 3, 2, 2], [-1.10, 3, 1], [0, 2, 0], [1e7, 2, 0], ["16", 2, 0]];
  for (const [value, most, decimals] of cases) assert.equal(decimalsOf(value, most), decimals, String(value));
});

test("runs of a sweep are in the subfolder of its name", () => {
  assert.ok(isOfSweep("styles/cat", "styles/cat/rank-8") && isOfSweep("cat%date%", "cat2026-11-27/rank-8"));
  assert.ok(!isOfSweep("cat", "cat") && !isOfSweep("cat", "dog/rank-8"));
});
