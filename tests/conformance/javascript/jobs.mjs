// What a package is asked to do in transformers.js, in Node and in a browser alike.
//
// A request is {package, tasks, prompts, texts, newTokens}: the package's name under env.localModelPath, some of the
// tasks below, prompts as lists of ids. The answer has one value for each task.

export async function answer({ AutoModelForCausalLM, AutoTokenizer, Tensor }, request) {
  const model = await AutoModelForCausalLM.from_pretrained(request.package);
  const answers = {};
  for (const task of request.tasks) {
    answers[task] = await TASKS[task](model, request, { AutoTokenizer, Tensor });
  }
  await model.dispose();
  return answers;
}

const TASKS = {
  // The ids written after each prompt, one prompt at a time.
  async greedy(model, { prompts, newTokens }, { Tensor }) {
    const written = [];
    for (const prompt of prompts) {
      written.push(...(await generate(model, [prompt], newTokens, Tensor)));
    }
    return written;
  },

  // The same, all prompts at once, padded on the left.
  batch(model, { prompts, newTokens }, { Tensor }) {
    return generate(model, prompts, newTokens, Tensor);
  },

  // All logits of each prompt, [T, V] float32 in base64.
  async logits(model, { prompts }, { Tensor }) {
    const all = [];
    for (const prompt of prompts) {
      const { logits } = await model(padded([prompt], 0, Tensor));
      all.push(base64(new Uint8Array(logits.data.buffer, logits.data.byteOffset, logits.data.byteLength)));
    }
    return all;
  },

  // The ids of each text.
  async tokenize(model, { package: name, texts }, { AutoTokenizer }) {
    const tokenizer = await AutoTokenizer.from_pretrained(name);
    return texts.map((text) => tokenizer.encode(text));
  },
};

async function generate(model, prompts, newTokens, Tensor) {
  const eos = model.config.eos_token_id;
  const inputs = padded(prompts, eos, Tensor);
  const sequences = await model.generate({ ...inputs, do_sample: false, max_new_tokens: newTokens });
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  return sequences.tolist().map((row) => row.slice(longest).map(Number));
}

function padded(prompts, fill, Tensor) {
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  const rows = (pad, of) => prompts.flatMap((ids) => [...Array(longest - ids.length).fill(pad), ...ids.map(of)]);
  const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [prompts.length, longest]);
  return { input_ids: tensor(rows(fill, (id) => id)), attention_mask: tensor(rows(0, () => 1)) };
}

function base64(bytes) {
  let binary = "";
  for (let start = 0; start < bytes.length; start += 32768) {
    binary += String.fromCharCode(...bytes.subarray(start, start + 32768));
  }
  return btoa(binary);
}
