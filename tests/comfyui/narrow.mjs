// node narrow.mjs: the sidebar in a real browser, without ComfyUI: its modules are served from js/, and a server of two answers.
// Prints {width: {beyond: what is wider than the sidebar, unnamed: controls without a name}, focus: what has it after opening and closing a run by keyboard}.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

const { chromium } = createRequire(import.meta.url)(process.env.PLAYWRIGHT_CORE);
const JS = path.resolve(import.meta.dirname ?? path.dirname(new URL(import.meta.url).pathname), "../../js");
const RUN = "a-rather-long-name-of-a-lora-that-somebody-chose-1a2b3c4d";
const summary = {
  run: RUN, name: RUN.slice(0, -9), node: "5", state: "paused", alive: false, step: 900, total: 4000, phase: "train", updated: 1, message: "",
  picture: "", lora: "styles/a-rather-long-name-of-a-lora-that-somebody-chose.safetensors",
};
const range = Array.from({ length: 900 }, (_, i) => i + 1);
const history = {
  summary, steps: { step: range, loss: range.map((i) => 1 / i), learning_rate: range.map(() => 1e-4), grad_norm: range.map(() => 1), seconds: range.map(() => 1) },
  checkpoints: [300, 600, 900], evals: [{ step: 900, loss: 0.4, standard_error: 0.01, held_out: true }], leaks: [], drawn: [], phase: {}, plan: {}, crops: "", pairs: "/view?pairs",
  pictures: [300, 600, 900].map((step) => ({ step, url: `/view?step=${step}`, label: "1024x1024", changed: 1 })),
  lora: { lora: summary.lora, applied: 304, num_keys: 304 }, notices: [{ text: "a notice that is a long sentence about memory", level: "warning" }],
  settings: { training: { name: summary.name, learning_rate: 0.0001, targets: "single_transformer_blocks.*.attn.to_q" } }, prompt: { 5: {} },
};
const STUBS = {
  "/scripts/app.js": "export const app = window.app = { extensions: [], registerExtension(one) { this.extensions.push(one); }, graph: { nodes: [] }, extensionManager: { registerSidebarTab(tab) { window.tab = tab; } }, ui: { settings: new EventTarget() } };",
  "/scripts/api.js": "export const api = Object.assign(new EventTarget(), { apiURL: (url) => url, fetchApi: (url, options) => fetch(url, options) });",
  "/chroma_trainer/runs": JSON.stringify({ runs: [summary, { ...summary, run: "other-1", name: "other", state: "finished" }], queue: [] }),
  [`/chroma_trainer/runs/${RUN}`]: JSON.stringify(history),
  "/": '<!doctype html><div id="place"></div>',
};
const TYPES = { ".js": "text/javascript", ".css": "text/css" };

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, headless: true, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 420, height: 900 } });
const faults = [];
page.on("pageerror", (error) => faults.push(String(error)));
await page.route("**/*", (route) => {
  const { pathname } = new URL(route.request().url());
  const file = path.join(JS, pathname.replace("/extensions/pack", ""));
  if (pathname in STUBS) return route.fulfill({ body: STUBS[pathname], contentType: pathname.endsWith(".js") ? TYPES[".js"] : pathname === "/" ? "text/html" : "application/json" });
  if (pathname.startsWith("/extensions/pack/") && fs.existsSync(file)) return route.fulfill({ path: file, contentType: TYPES[path.extname(file)] });
  return route.fulfill({ status: 404, body: "" });
});
await page.goto("http://page.test/");
await page.evaluate(async () => {
  await import("/extensions/pack/sidebar.js");
  for (const extension of window.app.extensions) await extension.setup?.();
  const place = document.querySelector("#place");
  place.style.height = "880px";
  window.tab.render(place);
});
await page.waitForSelector(".ct-card");

const look = (width) => page.evaluate(async (width) => {
  const root = document.querySelector(".ct-side");
  root.style.width = `${width}px`;
  await new Promise((done) => setTimeout(done, 600));
  const right = root.getBoundingClientRect().left + root.clientWidth;
  const beyond = [...root.querySelectorAll("button, a, img, td, b, span, textarea, input, .ct-panel")]
    .filter((element) => element.getBoundingClientRect().right > right + 1 && !element.closest(".ct-doing, b, .ct-card"))
    .map((element) => `${element.localName}.${element.className}`);
  const controls = [...root.querySelectorAll("button, a, input, textarea, summary")].filter((element) => element.offsetParent);
  const unnamed = controls.filter((element) => !(element.ariaLabel || element.title || element.textContent.trim()));
  return { beyond, controls: controls.length, unnamed: unnamed.map(({ outerHTML }) => outerHTML.slice(0, 120)) };
}, width);

const seen = { list: { 300: await look(300), 360: await look(360) } };
const focused = () => page.evaluate(() => document.activeElement?.className.split(" ")[0]);
for (let presses = 0; presses < 8 && (await focused()) !== "ct-card"; presses++) await page.keyboard.press("Tab"); // past the tabs
seen.focus = [await focused()];
await page.keyboard.press("Enter");
await page.waitForSelector(".ct-run .ct-settings td");
seen.focus.push(await focused());
seen.run = { 300: await look(300), 360: await look(360) };
if (process.argv[2]) await page.screenshot({ path: process.argv[2] });
await page.focus(".ct-back");
await page.keyboard.press("Enter");
await page.waitForSelector(".ct-card");
seen.focus.push(await focused());
console.log(JSON.stringify({ ...seen, faults }));
await browser.close();
