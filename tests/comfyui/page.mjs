// node page.mjs COMMAND URL WORKFLOW OUTPUT: ComfyUI's real page does something with a workflow file.
//   prompt      OUTPUT.json: {prompt: what the page would send to the server, workflow: what it would save}
//   prompts     the same for every *.json in the folder WORKFLOW but *.api.json, as {name: {prompt, workflow}}
//   run         OUTPUT.json: {end: the event that ended the run, detail, events: count of chroma_trainer.event}; OUTPUT.png beside it
//   screenshot  OUTPUT.png: the graph
//   colours     OUTPUT.json: {type of each connection in the graph: [colour of the link, of the slot, of the slot in Nodes 2.0]}
//   allBoxes    OUTPUT.json: {name: {boxes: as below, groups: {title: box}}} of every *.json in the folder WORKFLOW, while each of its trainers shows a run and each of its samplers images
//   boxes       OUTPUT.json: {scale: the zoom after opening it, boxes: {id: [left, top, right, bottom] of each node with its title}}
//   least       OUTPUT.json: {id: [least height on the canvas, least height with the title while a trainer shows a run]}
//   unfold      OUTPUT.json: {error: whether a wrong folder of images was told, prompt, workflow: of the unfolded graph}; OUTPUT.png beside it
//   drop        OUTPUT.json: what the page shows and would send after files of the folder WORKFLOW are dropped on it; OUTPUT.png: the report
//   rejected    OUTPUT.json: the texts of the page after a run that ComfyUI rejects; OUTPUT.png beside it
//   added       OUTPUT.json: {node type: {name: value} of a new node of this pack that has a seed}
//   fold        OUTPUT.json: {folded, open, again: {names: fields of the LoRATrainer that are shown, height}, same: whether open or not it is the same prompt and file}
import fs from "node:fs";
import path from "node:path";

import { load, promptOf, withPage } from "./browser.mjs";

const [command, url, workflow, output] = process.argv.slice(2);
const RUN_MS = 1_500_000;
const BARS = 160; // pixels at the edges that the page's own bars may cover

const [width, height] = (process.env.WINDOW || "2200x1300").split("x").map(Number);

await withPage(url, async (context, page) => {
  if (command === "prompts") return prompts(page);
  if (command === "allBoxes") return allBoxes(page);
  if (command === "drop") return drop(page);
  await load(page, workflow);
  await { prompt, run, screenshot, colours, fold, boxes, least, unfold, rejected, added }[command](page);
}, { width, height });

function write(value) {
  fs.writeFileSync(output, JSON.stringify(value, null, 2) + "\n");
}

async function prompt(page) {
  write(await promptOf(page));
}

function jsonFiles() {
  return fs.readdirSync(workflow).filter((name) => name.endsWith(".json") && !name.endsWith(".api.json")).sort();
}

async function prompts(page) {
  const found = {};
  for (const name of jsonFiles()) {
    await load(page, path.join(workflow, name));
    found[path.basename(name, ".json")] = await promptOf(page);
  }
  write(found);
}

async function run(page) {
  const found = await page.evaluate(async (limit) => {
    const { api } = await import("/scripts/api.js");
    let events = 0;
    api.addEventListener("chroma_trainer.event", () => events++);
    const ended = new Promise((resolve) => {
      for (const name of ["execution_success", "execution_error", "execution_interrupted"])
        api.addEventListener(name, ({ detail }) => resolve({ end: name, detail }));
      setTimeout(() => resolve({ end: "timeout", detail: null }), limit);
    });
    await window.app.queuePrompt(0, 1);
    return { ...(await ended), events };
  }, RUN_MS);
  write(found);
  await page.waitForTimeout(1500);
  await shoot(page, output.replace(/\.json$/, ".png"));
}

async function screenshot(page) {
  await shoot(page, output);
}

async function colours(page) {
  write(await page.evaluate(() => {
    const style = getComputedStyle(document.documentElement);
    const types = new Set([...window.app.graph.links.values()].map((link) => link.type));
    return Object.fromEntries([...types].map((type) => [type, [
      window.LGraphCanvas.link_type_colors[type], window.app.canvas.default_connection_color_byType[type],
      style.getPropertyValue(`--color-datatype-${type}`).trim(),
    ]]));
  }));
}

async function fold(page) {
  write(await page.evaluate(async () => {
    const node = window.app.graph.nodes.find(({ type }) => type === "LoRATrainer");
    const button = node.widgets.find(({ type }) => type === "button");
    const look = () => ({ names: node.widgets.filter((widget) => !widget.hidden && widget.serialize !== false).map(({ name }) => name), height: node.size[1] });
    const sent = async () => {
      const { output, workflow } = await window.app.graphToPrompt();
      return JSON.stringify([output, workflow.nodes.map(({ widgets_values }) => widgets_values)]);
    };
    const [folded, before] = [look(), await sent()];
    button.callback();
    const [open, after] = [look(), await sent()];
    button.callback();
    return { folded, open, again: look(), same: before === after };
  }));
}

// Presses the button of QuickLora; with an empty folder of images first.
async function unfold(page) {
  const press = (images, ready) => page.evaluate(async ([folder, test]) => {
    const node = window.app.graph.nodes.find(({ type }) => type === "QuickLora");
    node.widgets.find(({ name }) => name === "images").value = folder;
    node.widgets.find(({ name }) => name === "unfold").callback();
    const done = new Function(`return ${test}`);
    for (let waits = 0; waits < 600 && !done(); waits++) await new Promise((again) => setTimeout(again, 100));
  }, [images, ready]);
  await press("nowhere-at-all", 'document.body.textContent.includes("nowhere-at-all")');
  const error = await page.evaluate(() => document.body.textContent.includes("'nowhere-at-all' is not a folder"));
  await press("neon-emoji", 'window.app.graph.nodes.some(({ type }) => type === "LoRATrainer")');
  await page.waitForTimeout(500);
  write({ error, ...(await promptOf(page)) });
  await page.screenshot({ path: output.replace(/\.json$/, ".png") });
}

async function added(page) {
  write(await page.evaluate(() => Object.fromEntries(["LoRATrainer", "ValidateSampler"].map((type) => {
    const node = window.LiteGraph.createNode(type);
    window.app.graph.add(node);
    return [type, Object.fromEntries(node.widgets.map(({ name, value }) => [name, value]))];
  }))));
}

async function rejected(page) {
  await page.evaluate(() => void window.app.queuePrompt(0, 1));
  await page.waitForTimeout(3000);
  write(await page.evaluate(() => document.body.innerText));
  await page.screenshot({ path: output.replace(/\.json$/, ".png") });
}

// A workflow of ComfyUI's own, another trainer's configuration in several files, and one that can't be read.
async function drop(page) {
  const dropAll = async (names, ready) => {
    const files = names.map((name) => [name, fs.readFileSync(path.join(workflow, name), "utf8")]);
    await page.evaluate((files) => {
      const dataTransfer = new DataTransfer();
      for (const [name, text] of files) dataTransfer.items.add(new File([text], name, { type: name.endsWith(".json") ? "application/json" : "" }));
      const target = window.app.canvas.canvas;
      target.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true, clientX: 600, clientY: 400 }));
    }, files);
    await page.waitForFunction(ready, null, { timeout: 60_000 });
    await page.waitForTimeout(700);
  };
  const types = () => page.evaluate(() => window.app.graph.nodes.map(({ type }) => type));
  const dialogs = () => page.locator("dialog.ct-import-report").allTextContents();
  const read = async () => ({ types: await types(), dialogs: await dialogs() });
  const isOpen = 'document.querySelector("dialog.ct-import-report[open]")';

  await dropAll(["first-lora.json"], 'window.app.graph.nodes.some(({ type }) => type === "LoRATrainer")');
  const own = await read();
  await dropAll(["user_prompt_library.json", "config.json", "multidatabackend.json"], isOpen);
  const imported = { ...(await read()), ...(await promptOf(page)) };
  imported.focus = await page.evaluate(() => document.activeElement?.textContent);
  await page.screenshot({ path: output.replace(/\.json$/, ".png") });
  await page.keyboard.press("Escape");
  await page.waitForTimeout(300);
  const closed = await read();
  await dropAll(["job.yaml"], isOpen);
  write({ own, imported, closed, failed: await read() });
}

// Every trainer shows a run with a curve, an image, many figures and a notice, and every Validate Sampler that samples its images, as the
// server's messages would have it: they need more room then.
async function showRuns(page) {
  await page.evaluate(async () => {
    const { api } = await import("/scripts/api.js");
    const steps = { step: [1, 2], loss: [1, 0.9], learning_rate: [1e-3, 1e-3], grad_norm: [1, 1], seconds: [0.1, 0.1] };
    const { graph } = window.app;
    for (const node of graph.nodes.filter(({ type }) => ["LoRATrainer", "QuickLora"].includes(type))) {
      const { value: name } = node.widgets.find((widget) => widget.name === "name");
      const image = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=#";
      for (const message of [
        { kind: "StepReports", steps, total: 2 }, { kind: "LeakMeasured", step: 2, leak: 0.917, standard_error: 0.0318 },
        { kind: "LoraSaved", lora: `${name}.safetensors`, applied: 88, num_keys: 88 }, { kind: "PreviewReady", step: 1, label: "", url: image },
        { kind: "Notice", level: "warning", text: "stopped at step 2 of 3; run it again to resume from there" },
      ]) api.dispatchEvent(new CustomEvent("chroma_trainer.event", { detail: { node: String(node.id), name, ...message } }));
    }
    const canvas = Object.assign(document.createElement("canvas"), { width: 341, height: 512 });
    const blob = await new Promise((done) => canvas.toBlob(done));
    for (const node of graph.nodes.filter(({ type, outputs }) => type === "ValidateSampler" && [0, 2].some((slot) => outputs[slot].links?.length))) {
      const id = String(node.id);
      api.dispatchEvent(new CustomEvent("b_preview_with_metadata", { detail: { blob, nodeId: id, displayNodeId: id, realNodeId: id, jobId: "job" } }));
    }
  });
  await page.waitForTimeout(1200);
}

function boxesOf() {
  const { graph, canvas } = window.app;
  const { x, y } = canvas.canvas.getBoundingClientRect();
  return Object.fromEntries(graph.nodes.map((node) => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    const { ds: { scale, offset } } = canvas;
    const [left, top, width, height] = drawn
      ? [(drawn.x - x) / scale - offset[0], (drawn.y - y) / scale - offset[1], drawn.width / scale, drawn.height / scale]
      : node.boundingRect;
    return [node.id, [left, top, left + width, top + height].map(Math.round)];
  }));
}

async function boxes(page) {
  await page.waitForTimeout(1500);
  write({ scale: await page.evaluate(() => window.app.canvas.ds.scale), boxes: await page.evaluate(boxesOf) });
}

// One page for all workflows: opening it takes several seconds.
async function allBoxes(page) {
  const found = {};
  for (const name of jsonFiles()) {
    await load(page, path.join(workflow, name));
    await page.waitForTimeout(1000);
    await showRuns(page);
    const groups = await page.evaluate(() => Object.fromEntries(window.app.graph.groups.map(({ title, pos: [x, y], size: [width, height] }) =>
      [title, [x, y, x + width, y + height].map(Math.round)])));
    found[path.basename(name, ".json")] = { boxes: await page.evaluate(boxesOf), groups };
  }
  write(found);
}

async function least(page) {
  await page.evaluate(async () => {
    const native = Boolean(window.LiteGraph.vueNodesMode);
    for (const node of window.app.graph.nodes) node.setSize([node.size[0], native ? 40 : node.computeSize()[1]]);
    await new Promise((done) => setTimeout(done, 1200));
  });
  const heights = await page.evaluate(() => Object.fromEntries(window.app.graph.nodes.map((node) => [node.id, node.size[1]])));
  await showRuns(page);
  const drawn = await page.evaluate(boxesOf);
  write(Object.fromEntries(Object.entries(heights).map(([id, height]) => [id, [Math.round(height), drawn[id][3] - drawn[id][1]]])));
}

async function shoot(page, file) {
  await page.addStyleTag({ content: ".graph-canvas-container ~ *, .splitter-overlay, .minimap-main-container { opacity: 0 !important }" });
  const clip = await page.evaluate(async ([scale, margin, bars]) => {
    const { graph, canvas } = window.app;
    const boxes = [...graph.nodes.map((node) => node.boundingRect), ...graph.groups.map((group) => group._bounding)];
    const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])) - margin);
    const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])) + margin);
    canvas.ds.scale = scale;
    canvas.ds.offset = [bars / scale - left, bars / scale - top];
    canvas.setDirty(true, true);
    await new Promise((done) => setTimeout(done, 1200));
    const { x, y } = canvas.canvas.getBoundingClientRect();
    return { x: x + bars, y: y + bars, width: (right - left) * scale, height: (bottom - top) * scale };
  }, [0.8, 20, BARS]); // smaller than about 0.6, the page leaves texts out
  await page.setViewportSize({ width: Math.ceil(clip.x + clip.width + BARS), height: Math.ceil(clip.y + clip.height + BARS) });
  await page.waitForTimeout(1200);
  await page.screenshot({ path: file, clip });
}
