// load("fold.js"): a module of js/, with ComfyUI's front end replaced by comfyui_stub.mjs.

import module from "node:module";

import * as hooks from "./hooks.mjs";

if (module.registerHooks) module.registerHooks(hooks);
else module.register("./hooks.mjs", import.meta.url); // before Node 22.15

export function load(name) {
  return import(new URL(`../../js/${name}`, import.meta.url).href);
}
