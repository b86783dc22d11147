// transformers.js, told to take everything from this server: its own parts, onnxruntime's, the packages.
import * as transformers from "/modules/@huggingface/transformers/dist/transformers.min.js";

const { env } = transformers;
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/packages/";
env.useBrowserCache = false; // it keeps files by name, and would mix those of two packages that bore the same one

// The plain build: 14 MB instead of the 27 MB of the one that transformers.js would take, on which packages run too.
const build = (ending) => new URL(`/modules/onnxruntime-web/dist/ort-wasm-simd-threaded.${ending}`, location.href).href;
env.backends.onnx.wasm.wasmPaths = { mjs: build("mjs"), wasm: build("wasm") };

export default transformers;
