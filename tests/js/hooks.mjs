// Module hooks: ComfyUI's front end, "../../scripts/app.js" and api.js as the server serves them, become comfyui_stub.mjs.
// js/ has no package.json, so its files are declared ES modules here: older versions of Node take them for CommonJS.

const PACK = new URL("../../js/", import.meta.url).href;
const STUB = new URL("comfyui_stub.mjs", import.meta.url).href;

export function resolve(specifier, context, next) {
  const isFrontEnd = /^(\.\.\/\.\.)?\/scripts\/ap[pi]\.js$/.test(specifier) && context.parentURL?.startsWith(PACK);
  return isFrontEnd ? { url: STUB, format: "module", shortCircuit: true } : next(specifier, context);
}

export function load(url, context, next) {
  return next(url, url.startsWith(PACK) ? { ...context, format: "module" } : context);
}
