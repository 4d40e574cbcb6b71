// node live.mjs SCENARIO URL WORKFLOW OUTPUT.json: what a person sees of a training, told as {observation: value}.
// The panel says what it shows in its data attributes. Screenshots go beside OUTPUT.
import fs from "node:fs";
import path from "node:path";

import { load, open, promptOf, withPage } from "./browser.mjs";

const [scenario, url, workflow, output] = process.argv.slice(2);
const WAIT_MS = 150_000;
const VIEWED = {
  heart: "neonglow style, heart", cactus: "neonglow style, cactus", car: "neonglow style, automobile", "apple, no trigger": "red apple",
};
const seen = {};

const panel = (page) => page.evaluate(() => ({ ...document.querySelector(".ct-panel")?.dataset }));

// The data attributes of the panel, or of another element, once the condition on them holds. It is given as text: the page evaluates it.
async function until(page, condition, what = ".ct-panel") {
  await page.waitForFunction(
    ([what, condition]) => {
      const found = document.querySelector(what)?.dataset;
      return found && new Function("d", `const n = Number; return ${condition}`)(found);
    },
    [what, condition],
    { timeout: WAIT_MS },
  ).catch(async (error) => {
    await shoot(page, "timeout");
    throw new Error(`never: ${condition}; ${JSON.stringify(await panel(page))}: ${error.message}`);
  });
  return page.evaluate((what) => ({ ...document.querySelector(what).dataset }), what);
}

async function setWidget(page, type, values) {
  await page.evaluate(([type, values]) => {
    for (const node of window.app.graph.nodes.filter((node) => node.type === type))
      for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((widget) => widget.name === name);
        widget.value = value;
        widget.callback?.(value);
      }
  }, [type, values]);
}

async function setting(name, value) {
  await fetch(`${url}/api/settings/${name}`, { method: "POST", body: JSON.stringify(value), headers: { "Content-Type": "application/json" } });
}

const queue = (page) => page.evaluate(() => void window.app.queuePrompt(0, 1));
const cancel = (page) => page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Interrupt"));

async function look(page) {
  await page.evaluate(() => {
    const { canvas, graph } = window.app;
    const node = graph.nodes.find((node) => node.type === "LoRATrainer");
    canvas.ds.scale = 1;
    canvas.ds.offset = [700 - node.pos[0], 60 - node.pos[1]];
    canvas.setDirty(true, true);
  });
  await page.waitForTimeout(500);
}

async function shoot(page, name) {
  await page.screenshot({ path: path.join(path.dirname(output), `${name}.png`) });
}

// The whole life of a run, on two tabs.
async function life(context, page) {
  await load(page, workflow);
  seen.idle = await panel(page);
  seen.page = await promptOf(page);
  await setWidget(page, "LoRATrainer", { steps: 4000 });
  await queue(page);
  seen.first = await until(page, "n(d.points) >= 3");
  await look(page);
  seen.moved = await until(page, `n(d.points) > ${seen.first.points} && n(d.checkpoints) >= 1`);
  seen.hover = await hover(page);
  await shoot(page, "training");

  const second = await context.newPage();
  await open(second, url);
  await load(second, workflow);
  seen.second = await until(second, `n(d.points) > ${seen.moved.points} && d.state === 'running'`);
  await cancel(page);
  seen.cancelled = await until(page, "d.state === 'stopped'");
  seen.secondCancelled = await until(second, "d.state === 'stopped'");
  await second.close();

  await open(page, url); // a reload
  await load(page, workflow);
  seen.reloaded = await until(page, "n(d.points) > 0");
  await setWidget(page, "LoRATrainer", { steps: Number(seen.reloaded.points) + 5 });
  await queue(page);
  seen.resumed = await until(page, "d.state === 'finished'");
  const { prompt } = await promptOf(page);
  seen.ran = prompt;
  await page.evaluate((prompt) => window.app.loadApiJson(prompt, "life"), prompt); // as when the LoRA is dropped on the page
  seen.fromPrompt = await until(page, "n(d.points) > 0");

  await page.route("**/chroma_trainer/runs", (route) => route.abort()); // nothing to refill from
  await open(page, url);
  await load(page, workflow);
  seen.emptied = await panel(page);
  await setWidget(page, "LoRATrainer", { steps: Number(seen.reloaded.points) + 5 });
  await queue(page);
  seen.cached = await until(page, "d.state === 'finished'");
}

// Values at the pointer, in the middle of the curve.
async function hover(page) {
  const box = await page.locator(".ct-chart").boundingBox();
  await page.mouse.move(box.x + 45, box.y + box.height / 2);
  await page.waitForTimeout(200);
  return page.locator(".ct-tip").textContent();
}

// Vue nodes: the panel has its place, its values, and nothing else has changed.
async function vue(context, page) {
  await setting("Comfy.VueNodes.Enabled", true);
  try {
    await open(page, url);
    await load(page, workflow);
    seen.filled = await until(page, "n(d.points) > 0");
    await look(page);
    seen.box = await page.locator(".ct-chart").boundingBox();
    seen.page = await promptOf(page);
    await setWidget(page, "LoRATrainer", { name: "in-vue", steps: 8 });
    await queue(page);
    seen.ran = await until(page, "d.run.startsWith('in-vue-') && d.state === 'finished'");
    await shoot(page, "vue");
  } finally {
    await setting("Comfy.VueNodes.Enabled", false);
  }
}

// A trainer in a subgraph: its id in the prompt is "12:5". The subgraph's node shows the panel as well.
async function subgraph(context, page) {
  await load(page, workflow);
  await setWidget(page, "LoRATrainer", { name: "inside", steps: 8 });
  await page.evaluate(async () => {
    const { canvas } = window.app;
    const node = window.app.graph.nodes.find((node) => node.type === "LoRATrainer");
    const { node: outer } = window.app.graph.convertToSubgraph(new Set([node]));
    canvas.openSubgraph ? canvas.openSubgraph(outer.subgraph, outer) : canvas.setGraph(outer.subgraph);
    await new Promise((done) => setTimeout(done, 800));
  });
  seen.ids = Object.keys((await promptOf(page)).prompt);
  await queue(page);
  seen.ran = await until(page, "d.run.startsWith('inside-') && d.state === 'finished'");
  await shoot(page, "subgraph");
  await page.evaluate(async () => {
    window.app.canvas.setGraph(window.app.rootGraph ?? window.app.graph.rootGraph ?? window.app.graph);
    await new Promise((done) => setTimeout(done, 1500));
  });
  seen.outside = await until(page, "d.run.startsWith('inside-') && d.state === 'finished'");
  seen.saved = (await promptOf(page)).workflow.nodes.map((node) => JSON.stringify([node.widgets_values, node.properties]));
  await shoot(page, "subgraph-outside");
}

// Pause, resume and stop, from the sidebar.
async function sidebar(context, page) {
  const run = (condition) => until(page, condition, ".ct-run");
  const press = (name) => page.click(`.ct-run [data-command="${name}"]`);
  const points = () => page.evaluate(() => Number(document.querySelector(".ct-run .ct-panel").dataset.points));
  await load(page, workflow);
  await queue(page);
  await until(page, "n(d.points) >= 3");
  await page.evaluate(() => window.app.extensionManager.sidebarTab.toggleSidebarTab("chroma-trainer-runs"));
  seen.card = await until(page, "d.state === 'running'", ".ct-card");
  await shoot(page, "runs");
  await page.click(".ct-card");
  await run("d.state === 'running' && d.alive === 'true'");
  await page.waitForFunction(() => Number(document.querySelector(".ct-run .ct-panel").dataset.points) >= 3);
  await press("pause");
  await run("d.state === 'paused'");
  await page.waitForTimeout(2000); // the panel has drawn what the last look brought
  seen.paused = await points();
  seen.node = await until(page, "d.state === 'paused'", ".ct-panel:not(.ct-run *)");
  await shoot(page, "paused");
  await press("resume");
  await run("d.state === 'running' && d.alive === 'true'");
  await page.waitForFunction((paused) => Number(document.querySelector(".ct-run .ct-panel").dataset.points) > paused, seen.paused, { timeout: WAIT_MS });
  await page.waitForTimeout(1000);
  await shoot(page, "sidebar");
  await press("stop");
  seen.stopped = await run("d.state === 'stopped'");
  await page.waitForTimeout(2000);
  seen.reached = await points();
  seen.settings = await page.locator(".ct-settings").textContent();
  seen.pictures = await page.locator(".ct-cell").count();
  await page.click(".ct-back");
  seen.list = await until(page, "d.view === 'list' && n(d.count) >= 1", ".ct-runs");
}

const toggleSidebar = (page) => page.evaluate(() => window.app.extensionManager.sidebarTab.toggleSidebarTab("chroma-trainer-runs"));
const rowsAre = (page, names) => page.waitForFunction(
  (names) => [...document.querySelectorAll(".ct-row")].map((row) => row.dataset.name).join() === names, names.join(), { timeout: WAIT_MS });

// Three runs in the background: ComfyUI's queue stays free, the others wait, are ordered and removed, and a reload finds all of it.
async function background(context, page) {
  const nodePanel = ".ct-panel:not(.ct-run *)";
  const card = (name) => `.ct-card[data-run^="${name}-"]`;
  await load(page, workflow);
  await queue(page);
  seen.live = await until(page, "d.state === 'running' && n(d.points) >= 3", nodePanel);
  seen.free = await (await fetch(`${url}/queue`)).json();
  for (const name of ["second", "third"]) {
    await setWidget(page, "LoRATrainer", { name });
    await queue(page);
    await until(page, "d.state === 'waiting'", nodePanel);
  }
  await toggleSidebar(page);
  await until(page, "d.state === 'running'", card("first"));
  await rowsAre(page, ["second", "third"]);
  await look(page);
  await shoot(page, "waiting");
  await page.click('.ct-row[data-name="third"] [data-action="up"]');
  await rowsAre(page, ["third", "second"]);

  await open(page, url); // a reload
  await load(page, workflow);
  seen.reloaded = await until(page, "d.state === 'running' && n(d.points) >= 3", nodePanel);
  if (!(await page.$(".ct-runs"))) await toggleSidebar(page);
  await rowsAre(page, ["third", "second"]);
  await page.setViewportSize({ width: 620, height: 900 });
  await page.waitForTimeout(1500);
  await shoot(page, "narrow");
  await page.setViewportSize({ width: 1700, height: 1400 });
  await page.click('.ct-row[data-name="second"] [data-action="remove"]');
  await rowsAre(page, ["third"]);

  await page.click(card("first"));
  await until(page, "d.state === 'running' && d.alive === 'true'", ".ct-run");
  await page.waitForFunction(() => Number(document.querySelector(".ct-run .ct-panel").dataset.points) >= 3);
  await shoot(page, "run");
  await page.click('.ct-run [data-command="stop"]');
  await until(page, "d.state === 'stopped'", ".ct-run");
  seen.stopped = await until(page, "d.state === 'stopped'", nodePanel);
  await page.click(".ct-back");
  seen.third = await until(page, "d.state === 'running'", card("third"));
  await page.waitForFunction(() => !document.querySelector(".ct-row"));

  await page.click(card("first")); // resumed from the sidebar: in the background again, after the third
  await page.click('.ct-run [data-command="resume"]');
  await page.waitForTimeout(1000);
  await page.click(".ct-back");
  await rowsAre(page, ["first"]);
  seen.resumed = await until(page, "d.state === 'waiting'", nodePanel);
  await shoot(page, "resumed");
  await page.click('.ct-row [data-action="remove"]');
  await page.waitForFunction(() => !document.querySelector(".ct-row"));
  seen.removed = await until(page, "d.state === 'removed'", nodePanel);
  await page.click(card("third"));
  await page.click('.ct-run [data-command="stop"]');
  await until(page, "d.state === 'stopped'", ".ct-run");
}

// A sweep that is refused and then trained: its table and grid on the node and in the sidebar, the scores of its images, and
// the sliders of strengths and checkpoints.
async function sweep(context, page) {
  const nodePanel = ".ct-panel:not(.ct-run *)";
  await load(page, workflow);
  await setWidget(page, "DatasetBackend", { folder: "neon-emoji" });
  await setWidget(page, "ValidateSampler", { score: "clip", score_model: "tiny-clip" });
  await page.evaluate(() => {
    const { graph } = window.app;
    const node = window.LiteGraph.createNode("SweepSettings");
    graph.add(node);
    const trainer = graph.nodes.find(({ type }) => type === "LoRATrainer");
    node.pos = [trainer.pos[0] - 380, trainer.pos[1] + 700];
    node.setSize([300, 180]);
    node.connect(0, trainer, trainer.inputs.findIndex(({ name }) => name === "sweep"));
  });
  await setWidget(page, "SweepSettings", { over: "no_such_field=1,2" });
  seen.refused = await page.evaluate(async () => {
    const { output } = await window.app.graphToPrompt();
    const answer = await window.app.api.fetchApi("/prompt", { method: "POST", body: JSON.stringify({ prompt: output }), headers: { "Content-Type": "application/json" } });
    return answer.text();
  });
  await setWidget(page, "SweepSettings", { over: "learning_rate=1e-3,1e-4\nrank=4,8" });
  await queue(page);
  await page.waitForFunction((panel) => document.querySelectorAll(`${panel} .ct-sweep tbody tr[data-verdict="best"]`).length, nodePanel, { timeout: WAIT_MS });
  await look(page);
  await shoot(page, "sweep-running");
  await page.waitForFunction((panel) => document.querySelector(`${panel} .ct-sweep`)?.textContent.includes("4 of 4"), nodePanel, { timeout: 3 * WAIT_MS });
  await until(page, "d.state === 'finished'", nodePanel);
  const count = (root, what) => page.locator(`${root} ${what}`).count();
  const rows = ".ct-sweep table:not(.ct-sweep-grid) tbody tr";
  seen.node = {
    rows: await count(nodePanel, rows), best: await count(nodePanel, `${rows}[data-verdict="best"]`), grid: await count(nodePanel, ".ct-sweep-grid td"),
    facts: await page.locator(`${nodePanel} .ct-facts`).first().textContent(),
  };
  await page.waitForTimeout(1000);
  await shoot(page, "sweep");
  await toggleSidebar(page);
  await page.click('.ct-card[data-run^="swept~"]');
  await page.waitForSelector(".ct-run .ct-by-prompt td", { timeout: WAIT_MS });
  await page.waitForSelector(`.ct-run ${rows}`, { timeout: WAIT_MS });
  seen.side = {
    rows: await count(".ct-run", rows), links: await count(".ct-run", `${rows} button`),
    prompts: await page.locator(".ct-run .ct-by-prompt td:first-child").allTextContents(),
  };
  await shoot(page, "sweep-sidebar");
  const part = '.ct-run .ct-part[data-part="strength"]';
  await page.click(`${part} summary`);
  await page.locator(`${part} input`).nth(0).fill("0, 1");
  await page.locator(`${part} input`).nth(1).fill("all");
  await page.locator(`${part} textarea`).fill("cat face");
  await page.click(`${part} [data-command="sample-strengths"]`);
  await page.waitForSelector(`${part} .ct-row[data-kind="strengths"]`, { timeout: WAIT_MS });
  await page.click(`${part} .ct-row[data-kind="strengths"] button`);
  await page.locator(".ct-dialog .ct-slider").nth(1).fill("2");
  await page.waitForTimeout(1000);
  await shoot(page, "sliders");
  seen.slider = await page.evaluate(() => {
    const { step, nearest } = document.querySelector(".ct-vote-page").dataset;
    return { steps: step, nearest };
  });
  await page.click('[data-command="save-strength"]');
  await page.waitForFunction(() => document.querySelector(".ct-vote-page .ct-result").textContent, null, { timeout: WAIT_MS });
}

// The images of docs/live.md: the demo with images held out, on its node and in the sidebar. OUTPUT is beside live.png and sidebar.png.
async function views(context, page) {
  const uncover = () => page.evaluate(() => {
    for (let over of document.querySelectorAll('img[class*="h-[200px]"]')) { // the page's own preview of the running job lies over the rest
      while (over.parentElement !== document.body && !["fixed", "absolute"].includes(getComputedStyle(over).position)) over = over.parentElement;
      over.style.display = "none";
    }
  });
  const reach = (step) => page.waitForFunction((step) => Number(document.querySelector(".ct-panel").dataset.step) >= step, step, { timeout: 20 * WAIT_MS, polling: 500 });
  await load(page, workflow);
  await setWidget(page, "LoRATrainer", { steps: 600, holdout: 0.2, checkpoint_every: 50, validate_every: 100 });
  await setWidget(page, "ValidateSampler", { prompts: JSON.stringify(VIEWED), lora_strength: "1.0" });
  await queue(page);
  await page.evaluate(() => {
    const node = window.app.graph.nodes.find(({ type }) => type === "LoRATrainer");
    node.setSize([480, node.computeSize()[1] + 640]); // a large panel: its images can be seen
  });
  await reach(505); // the images of step 500 are there
  await look(page);
  await page.mouse.move(5, 5);
  await uncover();
  await page.waitForTimeout(300);
  await page.screenshot({ path: path.join(path.dirname(output), "live.png"), clip: await page.locator(".ct-panel").first().boundingBox() });
  await page.setViewportSize({ width: 1300, height: 1106 });
  await toggleSidebar(page);
  await page.waitForSelector(".ct-card", { timeout: WAIT_MS });
  await uncover();
  await page.evaluate(() => document.querySelector(".ct-card").click());
  await page.addStyleTag({ content: ".side-bar-panel { flex: 0 0 460px !important; }" });
  await page.waitForFunction(() => [...document.querySelectorAll(".ct-cell img")].filter((image) => image.naturalWidth).length >= 6, null, { timeout: WAIT_MS });
  await page.waitForTimeout(2000);
  await uncover();
  const side = await page.locator(".side-bar-panel").boundingBox();
  await page.screenshot({ path: path.join(path.dirname(output), "sidebar.png"), clip: { x: 0, y: side.y, width: side.x + side.width, height: side.height } });
  seen.state = await panel(page);
  await page.evaluate(() => document.querySelector('.ct-run [data-command="stop"]').click());
}

await withPage(url, async (context, page) => {
  const faults = [];
  page.on("pageerror", (error) => faults.push(String(error)));
  await { life, vue, subgraph, sidebar, background, sweep, views }[scenario](context, page);
  seen.faults = faults;
}, { width: 1700, height: 1400 });
fs.writeFileSync(output, JSON.stringify(seen, null, 2) + "\n");
