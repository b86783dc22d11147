// The form, the keys and what is shown. Everything that takes time happens in worker.js.

const at = (id) => document.getElementById(id);
const show = (id, text) => {
  at(id).textContent = text;
};
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

const worker = new Worker("worker.js", { type: "module" });
const stop = self.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : null;
let run = null; // {count, firstMs, lastMs} while a text is written

start();

async function start() {
  if (stop === null) {
    fail("this server does not isolate the page (COOP and COEP headers); use serve.py");
    return;
  }
  const packages = await (await fetch("packages.json")).json();
  at("package").replaceChildren(...packages.map(({ name, bytes }) => new Option(`${name}, ${megabytes(bytes)} MB`, name)));
  show("status", "Ready.");
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (run === null && stop !== null) {
    begin();
  }
});

at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("form").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    halt();
  }
});

at("stop").addEventListener("click", halt);

worker.addEventListener("message", ({ data }) => {
  if ("loaded" in data) {
    show("status", `Loading: ${megabytes(data.loaded)} of ${megabytes(data.of)} MB.`);
  } else if (data.begun) {
    show("status", "Writing.");
  } else if ("token" in data) {
    count(data.token);
  } else if ("text" in data) {
    at("written").append(data.text);
  } else if (data.done) {
    end(Atomics.load(stop, 0) === 1 ? "Stopped." : "Done.");
  } else {
    fail(data.error);
  }
});

worker.addEventListener("error", (event) => fail(event.message || "worker.js or transformers.js did not load"));

function begin() {
  const prompt = at("prompt").value;
  const temperature = at("temperature").valueAsNumber;
  const sampling = temperature > 0 ? { do_sample: true, temperature, top_k: at("top-k").valueAsNumber } : { do_sample: false };
  run = { count: 0, firstMs: 0, lastMs: 0 };
  Atomics.store(stop, 0, 0);
  busy(true);
  show("given", prompt);
  show("written", "");
  for (const figure of ["count", "speed", "first"]) {
    show(figure, "–");
  }
  show("status", "Loading.");
  at("status").classList.remove("failed");
  const options = { max_new_tokens: at("tokens").valueAsNumber, ...sampling };
  worker.postMessage({ package: at("package").value, prompt, options, stop });
}

// The speed is that of decoding: tokens after the first, over the time since the first.
function count(sinceRequestMs) {
  run.count += 1;
  run.lastMs = sinceRequestMs;
  if (run.count === 1) {
    run.firstMs = sinceRequestMs;
    show("first", `${Math.round(sinceRequestMs)} ms`);
  } else {
    show("speed", ((1000 * (run.count - 1)) / (run.lastMs - run.firstMs)).toFixed(1));
  }
  show("count", String(run.count));
}

function halt() {
  if (run !== null) {
    Atomics.store(stop, 0, 1);
  }
}

function end(word) {
  show("status", word);
  run = null;
  busy(false);
}

function fail(message) {
  end(`Failed: ${message}`);
  at("status").classList.add("failed");
}

function busy(now) {
  const stopHadFocus = document.activeElement === at("stop");
  const writeHadFocus = document.activeElement === at("write");
  at("write").disabled = now;
  at("stop").disabled = !now;
  at("text").setAttribute("aria-busy", String(now));
  if (now && writeHadFocus) {
    at("stop").focus();
  } else if (!now && stopHadFocus) {
    at("write").focus();
  }
}
