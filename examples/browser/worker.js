// Loads packages and writes text, beside the page, which so stays awake.
//
// In: {package, prompt, options, stop}, stop being a shared Int32Array that the page sets to 1.
// Out: {loaded: bytes, of: bytes}, {begun: true}, {token: milliseconds since the request}, {text}, {done: true} or {error}.
import transformers from "./transformers.js";

const { AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, TextStreamer } = transformers;

class StoppedByThePage extends StoppingCriteria {
  constructor(stop) {
    super();
    this.stop = stop;
  }

  _call(sequences) {
    return sequences.map(() => Atomics.load(this.stop, 0) === 1);
  }
}

let open = { name: null, tokenizer: null, model: null };

self.onmessage = async ({ data: request }) => {
  try {
    await load(request.package);
    postMessage({ begun: true });
    await write(request);
    postMessage({ done: true });
  } catch (error) {
    postMessage({ error: error.message ?? String(error) });
  }
};

async function load(name) {
  if (open.name === name) {
    return;
  }
  await open.model?.dispose();
  open = { name: null, tokenizer: null, model: null };
  const files = new Map();
  const progress_callback = ({ status, file, loaded, total }) => {
    if (status === "progress") {
      files.set(file, { loaded, total });
      const sum = (of) => [...files.values()].reduce((bytes, file) => bytes + file[of], 0);
      postMessage({ loaded: sum("loaded"), of: sum("total") });
    }
  };
  const tokenizer = await AutoTokenizer.from_pretrained(name, { progress_callback });
  const model = await AutoModelForCausalLM.from_pretrained(name, { progress_callback });
  open = { name, tokenizer, model };
}

async function write({ prompt, options, stop }) {
  const { tokenizer, model } = open;
  const started = performance.now();
  const inputs = tokenizer(prompt);
  const room = model.config.n_positions - inputs.input_ids.dims.at(-1);
  if (room < 1) {
    throw new Error(`the prompt fills the model's ${model.config.n_positions} tokens; shorten it`);
  }
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => postMessage({ text }),
    token_callback_function: () => postMessage({ token: performance.now() - started }),
  });
  await model.generate({
    ...inputs,
    ...options,
    max_new_tokens: Math.min(options.max_new_tokens, room),
    stopping_criteria: new StoppedByThePage(stop),
    streamer,
  });
}
