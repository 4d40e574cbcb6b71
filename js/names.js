// Names of LoRAs as people type them. It uses neither DOM nor ComfyUI.

const ENDING = /\.safetensors$/i;

// Whether a run of this name comes from a typed one: with its ending, or with a date such as %date:yyyy-MM-dd%.
export function isNamed(typed, name) {
  const parts = typed.replaceAll("\\", "/").replace(ENDING, "").split(/%[A-Za-z][^%/]*%/);
  const pattern = parts.map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join(".+");
  return new RegExp(`^${pattern}$`).test(name);
}

// Whether a run belongs to a sweep of this name: its LoRA is in the subfolder of the sweep.
export function isOfSweep(typed, name) {
  return name.includes("/") && isNamed(typed, name.slice(0, name.lastIndexOf("/")));
}

// The name, or the first of name-2, name-3 and so on that is not taken. File names differ in more than their case.
export function uniqueName(name, taken) {
  const used = new Set(taken.map((other) => other.replace(ENDING, "").toLowerCase()));
  const base = name.replace(ENDING, "");
  if (!used.has(base.toLowerCase())) return name;
  const [, stem, number] = /^(.*?)(?:-(\d{1,4}))?$/s.exec(base);
  for (let i = Number(number ?? 1) + 1; ; i++)
    if (!used.has(`${stem}-${i}`.toLowerCase())) return `${stem}-${i}`;
}
