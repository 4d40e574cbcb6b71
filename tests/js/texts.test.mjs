// js/texts.js: texts by key, with numbers in the right form, in English where there is no translation.

import assert from "node:assert/strict";
import { test } from "node:test";

import { load } from "./load.mjs";

const { say, speak, has } = await load("texts.js");
const english = (await load("texts/en.js")).default;

test("plurals and values", () => {
  assert.equal(say("fold.more", { count: 1 }), "1 more setting");
  assert.equal(say("fold.more", { count: 15 }), "15 more settings");
  assert.equal(say("panel.keys", { applied: 3, count: 1 }), "3 of 1 keys apply");
  assert.equal(say("no such key"), "no such key");
  assert.ok(has("state.died") && !has("state.unknown"));
});

for (const language of ["ja", "zh"]) {
  test(`every text is there in ${language}, with the same values`, async () => {
    const texts = (await load(`texts/${language}.js`)).default;
    assert.deepEqual(Object.keys(texts), Object.keys(english));
    const marks = (entry) => [...new Set(JSON.stringify(entry).match(/\{\w+\}/g))].sort();
    for (const [key, entry] of Object.entries(texts)) {
      assert.deepEqual(marks(entry), marks(english[key]), key);
      assert.notDeepEqual(entry, english[key], key);
    }
  });
}

test("a language, and then one without texts", async () => {
  await speak("zh");
  assert.match(say("fold.more", { count: 1 }), /^[^a-z]*1[^a-z]*$/);
  await speak("fr");
  assert.match(say("state.paused"), /\p{Script=Han}/u);
});
