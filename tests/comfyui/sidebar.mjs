// node sidebar.mjs SCENARIO URL WORKFLOW OUTPUT.json: what a person sees and does in the sidebar's views of files.
// Screenshots go beside OUTPUT, in the dark and in the light palette, and 300 pixels wide.
import fs from "node:fs";
import path from "node:path";

import { load, open, withPage } from "./browser.mjs";

const [scenario, url, workflow, output] = process.argv.slice(2);
const WAIT_MS = 150_000;
const seen = {};
const input = JSON.parse(fs.readFileSync(workflow, "utf8"));

const shoot = (page, name) => page.screenshot({ path: path.join(path.dirname(output), `${name}.png`) });
const openSidebar = (page) => page.evaluate(() => window.app.extensionManager.sidebarTab.toggleSidebarTab("chroma-trainer-runs"));
const textOf = (page, what) => page.locator(what).first().innerText();

async function palette(page, name) {
  await page.evaluate((name) => window.app.extensionManager.setting.set("Comfy.ColorPalette", name), name);
  await page.waitForTimeout(700);
}

// The sidebar with this width: the page's own splitter goes no narrower than a share of the window.
async function widen(page, width) {
  await page.addStyleTag({ content: `.side-bar-panel { flex: 0 0 ${width}px !important; min-width: 0 !important; width: ${width}px; }` });
  await page.waitForTimeout(300);
}

// Screenshots of one view in both palettes, wide and narrow; and whether anything is wider than the narrow sidebar.
async function shootAll(page, name) {
  await widen(page, 460);
  await shoot(page, `${name}-dark`);
  await palette(page, "light");
  await shoot(page, `${name}-light`);
  await widen(page, 300);
  await shoot(page, `${name}-narrow`);
  seen[`${name}-overflow`] = await page.evaluate(() => {
    const view = document.querySelector(".ct-page");
    return view.scrollWidth - view.clientWidth;
  });
  await palette(page, "dark");
  await widen(page, 460);
}

// Drops a file of this machine on an element, as from a folder.
async function dropFile(page, what, file) {
  const data = await page.evaluateHandle(([name, bytes]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], name));
    return transfer;
  }, [path.basename(file), [...fs.readFileSync(file)]]);
  await page.dispatchEvent(what, "dragover", { dataTransfer: data });
  seen.dragged = await page.locator(".ct-side").getAttribute("data-drag");
  await page.dispatchEvent(what, "drop", { dataTransfer: data });
}

const reportOf = (page, name) => page.waitForSelector(`.ct-view[data-lora="${name}"]`, { timeout: WAIT_MS });

// A LoRA of ComfyUI's folder, its repaired file, its family, and one that is dropped.
async function loras(page) {
  await load(page, input.workflow);
  const nodes = () => page.evaluate(() => window.app.graph.nodes.length);
  seen.nodes = [await nodes()];
  await openSidebar(page);
  await page.waitForSelector('.ct-tab[data-tab="runs"][aria-selected="true"]');
  await page.focus('.ct-tab[data-tab="runs"]');
  await page.keyboard.press("ArrowRight");
  seen.tab = await page.evaluate(() => document.activeElement.dataset.tab);
  await page.waitForFunction((name) => [...document.querySelectorAll("#chroma-trainer-loras option")].some(({ value }) => value === name), input.lora);
  await page.fill(".ct-view .ct-input", input.lora);
  await page.keyboard.press("Enter");
  await reportOf(page, path.basename(input.lora));
  seen.findings = await textOf(page, ".ct-findings");
  seen.facts = await textOf(page, ".ct-facts-table");
  seen.family = await textOf(page, ".ct-family");
  seen.figures = await page.locator(".ct-figure").count();
  seen.labels = await page.locator('.ct-figure [role="img"]').evaluateAll((list) => list.map((one) => one.getAttribute("aria-label")));
  await shootAll(page, "lora");
  await page.click('[data-command="lora.repair"]');
  await page.waitForSelector(".ct-result .ct-link", { timeout: WAIT_MS });
  seen.repaired = await textOf(page, ".ct-result");
  await page.click(".ct-result .ct-link");
  await reportOf(page, "anna-fixed.safetensors");
  seen.buttons = await page.locator(".ct-report .ct-buttons > *").count();
  seen.fixed = await textOf(page, ".ct-report h3");
  await page.click(".ct-family .ct-link"); // its parent
  await reportOf(page, path.basename(input.lora));

  await dropFile(page, ".ct-drop", input.dropped);
  await reportOf(page, path.basename(input.dropped));
  seen.saveButton = await textOf(page, '[data-command="lora.save"]');
  await page.click('[data-command="lora.save"]');
  await page.waitForFunction(() => document.querySelector(".ct-result")?.textContent);
  seen.saved = await textOf(page, ".ct-result");
  await dropFile(page, ".ct-drop", input.words); // no LoRA
  await page.waitForSelector(".p-toast-message");
  seen.refused = await textOf(page, ".p-toast-message");
  seen.nodes.push(await nodes());
}

// The dataset of a node on the canvas: findings with their images, a filter, a copy without some, and the node that uses it.
async function datasets(page) {
  await load(page, input.workflow);
  await openSidebar(page);
  await page.click('.ct-tab[data-tab="datasets"]');
  await page.waitForSelector(".ct-field option", { state: "attached" });
  seen.nodes = await page.locator('.ct-field select[aria-label="Dataset Backend"] option').allTextContents();
  await page.selectOption('.ct-field select[aria-label="Dataset Backend"]', { label: seen.nodes.find((title) => title.includes(input.folder)) });
  await page.click('[data-command="examine"]');
  await page.waitForSelector(`.ct-view[data-dataset="${input.folder}"]`, { timeout: WAIT_MS });
  seen.usable = await textOf(page, ".ct-report > .ct-result");
  seen.kinds = await page.locator(".ct-finding").evaluateAll((list) => list.map(({ dataset }) => dataset.kind));
  await page.waitForFunction(() => [...document.querySelectorAll(".ct-found img")].slice(0, 2).every((image) => image.naturalWidth > 0));
  await shootAll(page, "dataset");
  await page.focus('.ct-chip[data-kind="copies"]');
  await page.keyboard.press("Enter");
  seen.filtered = await page.locator(".ct-finding").evaluateAll((list) => list.map(({ dataset }) => dataset.kind));
  const boxes = page.locator(".ct-found input");
  seen.boxes = await boxes.evaluateAll((list) => list.map((box) => [box.getAttribute("aria-label"), box.checked]));
  seen.copyLabel = await textOf(page, '[data-command="copy"]');
  await page.click('[data-command="copy"]');
  await page.waitForSelector('[data-command="use"]', { timeout: WAIT_MS });
  seen.copied = await textOf(page, ".ct-result [data-command]");
  await page.click('[data-command="use"]');
  seen.folders = await page.evaluate(() => window.app.graph.nodes.filter(({ type }) => type === "DatasetBackend").map(({ widgets }) => widgets[0].value));
}

// A run that has ended: prompts that it is asked for, a blind vote on two of its checkpoints over a reload, and the slider.
async function votes(page) {
  const openRun = async () => {
    await page.click(`.ct-card[data-run="${input.run}"]`);
    await page.waitForSelector(".ct-part");
  };
  await openSidebar(page);
  await openRun();
  await page.fill(".ct-ask textarea", "cat face\n\n sun ");
  await page.click(".ct-ask button");
  await page.waitForSelector(".ct-ask ~ .ct-grid-of-pictures img", { timeout: WAIT_MS });
  seen.drawn = await page.locator(".ct-ask ~ .ct-grid-of-pictures .ct-cell").allTextContents();
  seen.drawnWidth = await page.locator(".ct-ask ~ .ct-grid-of-pictures img").first().evaluate((image) => image.decode().then(() => image.naturalWidth));

  await page.click('.ct-part[data-part="vote"] summary');
  seen.versions = await page.locator('.ct-part select[aria-label="First version"] option').allTextContents();
  await page.fill('.ct-part[data-part="vote"] textarea', "cat face");
  await page.fill('.ct-part[data-part="vote"] input[type="number"]', "4");
  await page.click('[data-command="sample-vote"]');
  await page.waitForSelector('.ct-row[data-kind="vote"]', { timeout: WAIT_MS });
  await shootAll(page, "run");
  await page.focus('.ct-row[data-kind="vote"] button');
  await page.keyboard.press("Enter");
  const voted = (count) => page.waitForFunction((count) => document.querySelector(".ct-vote-page")?.dataset.voted === count, String(count));
  await voted(0);
  seen.blind = await textOf(page, ".ct-vote-page");
  await page.waitForFunction(() => [...document.querySelectorAll(".ct-candidate img")].every((image) => image.naturalWidth > 0));
  await shoot(page, "pair-dark");
  for (const [key, count] of [["ArrowLeft", 1], ["ArrowDown", 2], ["Backspace", 1], ["ArrowRight", 2]]) {
    await page.keyboard.press(key);
    await voted(count);
  }
  await page.keyboard.press("Escape");
  await page.waitForFunction(() => !document.querySelector("dialog.ct-dialog"));

  await open(page, url); // a reload
  await openSidebar(page);
  await openRun();
  await page.click('.ct-part[data-part="vote"] summary');
  await page.waitForSelector('.ct-row[data-kind="vote"]');
  seen.resumed = await textOf(page, '.ct-row[data-kind="vote"]');
  await palette(page, "light");
  await page.click('.ct-row[data-kind="vote"] button');
  await voted(2);
  await shoot(page, "pair-light");
  await page.keyboard.press("ArrowLeft");
  await voted(3);
  await page.click('.ct-candidate[data-side="right"]');
  await voted(4);
  seen.outcome = await textOf(page, ".ct-verdict");
  await shoot(page, "outcome-light");
  await page.keyboard.press("Escape");
  await palette(page, "dark");

  await page.click('.ct-part[data-part="strength"] summary');
  await page.fill('.ct-part[data-part="strength"] input', "0, 1");
  await page.fill('.ct-part[data-part="strength"] textarea', "cat face");
  await page.click('[data-command="sample-strengths"]');
  await page.waitForSelector('.ct-row[data-kind="strengths"]', { timeout: WAIT_MS });
  await page.click('.ct-row[data-kind="strengths"] button');
  await page.locator(".ct-slider:focus").waitFor(); // the dialog comes after an answer of the server; keys before it are lost
  await page.waitForFunction(() => [...document.querySelectorAll(".ct-stack img")].every((image) => image.naturalWidth > 0));
  for (let times = 0; times < 30; times++) await page.keyboard.press("ArrowLeft");
  seen.slider = await page.locator(".ct-vote-page").evaluate(({ dataset }) => ({ ...dataset }));
  seen.opacities = await page.locator(".ct-stack img").evaluateAll((list) => list.map((image) => Number(image.style.opacity)));
  await shoot(page, "slider-dark");
  await page.click('[data-command="save-strength"]');
  await page.waitForFunction(() => document.querySelector(".ct-dialog .ct-result")?.textContent);
  seen.saved = await textOf(page, ".ct-dialog .ct-result");
}

await withPage(url, async (context, page) => {
  page.setDefaultTimeout(WAIT_MS);
  const faults = [];
  page.on("pageerror", (error) => faults.push(String(error)));
  await { loras, datasets, votes }[scenario](page).catch(async (error) => {
    await shoot(page, "failed");
    throw error;
  });
  seen.faults = faults;
}, { width: 1500, height: 1300 });
fs.writeFileSync(output, JSON.stringify(seen, null, 2) + "\n");
