// The texts of the page in the user's language. It uses neither DOM nor ComfyUI.

import english from "./texts/en.js";

let [texts, language] = [english, "en"];

// Loads the texts of a language. Without a translation they are English.
export async function speak(name) {
  try {
    if (name !== "en") [texts, language] = [(await import(`./texts/${name}.js`)).default, name];
  } catch { /* this language has no texts */ }
}

// A text with its {values}. The form of a text that depends on a number is chosen by values.count.
export function say(key, values = {}) {
  const entry = texts[key] ?? english[key] ?? key;
  const form = typeof entry === "string" ? entry : entry[plural(values.count)] ?? entry.other;
  return form.replace(/\{(\w+)\}/g, (mark, name) => (name in values ? String(values[name]) : mark));
}

export function has(key) {
  return key in english;
}

function plural(count) {
  return new Intl.PluralRules(language).select(count);
}
