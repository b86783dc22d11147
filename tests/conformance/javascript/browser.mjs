// Opens the page of examples/browser in headless Chromium and does what the request says; JSON in and out.
//
// {executable, url, steps: {name: step}, screenshot?}: a step is {prompt, fields, stopAfter?}, done on the page by
// keyboard alone, or {jobs: a request of jobs.mjs, build?}, run in a page of its own, on another build of onnxruntime's
// WebAssembly if one is named. The answer: {steps: {name: what came of it}, requested: every URL asked for, errors: what
// the page complained of}.
import { readFile } from "node:fs/promises";
import { text } from "node:stream/consumers";

import { chromium } from "playwright-core";

const NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1";
const LONGEST_MS = 120_000;

const request = JSON.parse(await text(process.stdin));
const jobsModule = await readFile(new URL("./jobs.mjs", import.meta.url), "utf8");
const requested = [];
const errors = [];

const browser = await chromium.launch({
  executablePath: request.executable,
  args: ["--no-sandbox", "--disable-gpu", NO_NETWORK],
});
try {
  const context = await browser.newContext({ viewport: { width: 900, height: 900 } });
  context.on("request", (asked) => requested.push(asked.url()));
  context.on("weberror", (error) => errors.push(String(error.error())));
  await context.route("**/jobs.mjs", (route) => route.fulfill({ body: jobsModule, contentType: "text/javascript" }));
  const page = await opened(context);
  const steps = {};
  for (const [name, step] of Object.entries(request.steps)) {
    steps[name] = await ("jobs" in step ? inAPageOfItsOwn(context, step) : byKeyboard(page, step));
  }
  if (request.screenshot) {
    await page.screenshot({ path: request.screenshot });
  }
  process.stdout.write(JSON.stringify({ steps, requested, errors }));
} finally {
  await browser.close();
}

async function opened(context) {
  const page = await context.newPage();
  await page.goto(request.url);
  await page.getByRole("status").getByText("Ready.").waitFor();
  return page;
}

async function inAPageOfItsOwn(context, step) {
  const page = await opened(context);
  const answer = await page.evaluate(async ({ jobs, build }) => {
    const { default: transformers } = await import("/transformers.js");
    const { answer } = await import("/jobs.mjs");
    if (build) {
      const { wasm } = transformers.env.backends.onnx;
      const paths = Object.entries(wasm.wasmPaths);
      wasm.wasmPaths = Object.fromEntries(paths.map(([kind, path]) => [kind, path.replace(/[^.]*$/, `${build}.$&`)]));
    }
    return answer(transformers, jobs).catch((error) => ({ error: error.message }));
  }, step);
  await page.close();
  return answer;
}

// Fills in the form and reads the page as a user without a mouse does.
async function byKeyboard(page, { prompt, fields, stopAfter }) {
  for (const [label, value] of Object.entries(fields)) {
    await page.getByLabel(label).focus();
    if (label === "Package") {
      await page.getByLabel(label).selectOption(value);
    } else {
      await page.keyboard.press("Control+A");
      await page.keyboard.type(value);
    }
  }
  await page.getByLabel("Prompt").focus();
  await page.keyboard.press("Control+A");
  for (const [number, line] of prompt.split("\n").entries()) {
    if (number > 0) {
      await page.keyboard.press("Shift+Enter");
    }
    await page.keyboard.insertText(line);
  }
  await page.keyboard.press("Enter");
  if (stopAfter) {
    await page.waitForFunction((count) => Number(document.getElementById("count").textContent) >= count, stopAfter);
    await page.keyboard.press("Escape");
  }
  await page.getByRole("status").getByText(/^(Done|Stopped|Failed)/).waitFor({ timeout: LONGEST_MS });
  return page.evaluate(() => ({
    status: document.getElementById("status").textContent,
    given: document.getElementById("given").textContent,
    written: document.getElementById("written").textContent,
    count: Number(document.getElementById("count").textContent),
    speed: Number(document.getElementById("speed").textContent),
    focus: document.activeElement.id,
  }));
}
