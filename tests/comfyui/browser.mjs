// ComfyUI's page in a real browser: opening it, loading a workflow, and what it holds.
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { createRequire } from "node:module";

const { chromium } = createRequire(import.meta.url)(process.env.PLAYWRIGHT_CORE);
const READY_MS = 120_000;

// call(context, page) with the page open and ready.
export async function withPage(url, call, viewport = { width: 2200, height: 1300 }) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), "chroma-trainer-page-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM,
    headless: true,
    viewport,
    args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"],
  });
  try {
    const local = (address) => [url, "data:", "blob:"].some((start) => address.startsWith(start));
    await context.route("**/*", (route) => (local(route.request().url()) ? route.continue() : route.abort()));
    const page = context.pages()[0] ?? (await context.newPage());
    await open(page, url);
    await call(context, page);
  } finally {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
}

export async function open(page, url) {
  await page.goto(url);
  await page.waitForFunction(
    () => window.app?.vueAppReady && window.app.extensionManager && window.app.graph && !document.querySelector("#splash-loader"),
    null,
    { timeout: READY_MS },
  );
  await page.waitForTimeout(1000);
}

export async function load(page, file) {
  await page.evaluate(async (data) => {
    await window.app.loadGraphData(data);
    await new Promise((done) => setTimeout(done, 500));
  }, typeof file === "string" ? JSON.parse(fs.readFileSync(file, "utf8")) : file);
}

export async function promptOf(page) {
  return page.evaluate(async () => {
    const { output, workflow } = await window.app.graphToPrompt();
    return JSON.parse(JSON.stringify({ prompt: output, workflow }));
  });
}
