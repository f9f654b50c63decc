// Times the sparse network and the dense one in onnxruntime-web, in turn.

import * as ort from "./onnxruntime-web/ort.wasm.bundle.min.mjs";

let session;

/** Load the dense network: WebAssembly with vectors, one thread. */
async function loadDense() {
  ort.env.wasm.numThreads = 1;
  const file = "onnxruntime-web/ort-wasm-simd-threaded.wasm";
  ort.env.wasm.wasmPaths = { wasm: new URL(file, import.meta.url).href };
  return ort.InferenceSession.create(new URL("dense.onnx", import.meta.url).href, {
    executionProviders: ["wasm"], graphOptimizationLevel: "all",
  });
}

/**
 * Time both networks in turn.
 * @param {Model} model the sparse network, from model.js
 * @param {Float32Array} input
 * @param {{rounds?: number, milliseconds?: number}} options rounds of both; the least time of a
 *   round of one network, whose mean time per call is one measurement
 * @returns {Promise<{sparse: number[], dense: number[], sparseMedian: number, denseMedian: number,
 *   ratio: number, difference: number, version: string}>} milliseconds per call; the largest
 *   difference of the outputs, relative to the largest output
 */
export async function compare(model, input, { rounds = 15, milliseconds = 10 } = {}) {
  session ??= await loadDense();
  const shape = model.info.inputShape;
  const sparse = () => model.run(input);
  const dense = async () => {
    const feeds = { [session.inputNames[0]]: new ort.Tensor("float32", input, shape) };
    return (await session.run(feeds))[session.outputNames[0]].data;
  };
  const [found, expected] = [sparse(), await dense()];
  const largest = Math.max(...expected.map(Math.abs));
  const difference = Math.max(...found.map((y, i) => Math.abs(y - expected[i]))) / largest;
  const times = { sparse: [], dense: [] };
  for (let i = -2; i < rounds; i++) {  // two rounds warm up
    const [a, b] = [await time(sparse, milliseconds), await time(dense, milliseconds)];
    if (i < 0) continue;
    times.sparse.push(a);
    times.dense.push(b);
    await new Promise((resume) => setTimeout(resume));  // the page stays responsive
  }
  const [sparseMedian, denseMedian] = [median(times.sparse), median(times.dense)];
  const version = ort.env.versions.web ?? ort.env.versions.common;
  return { ...times, sparseMedian, denseMedian, ratio: denseMedian / sparseMedian, difference,
    version };
}

async function time(call, milliseconds) {
  const start = performance.now();
  let calls = 0, passed = 0;
  while (passed < milliseconds) {
    const found = call();
    if (found instanceof Promise) await found;
    calls++;
    passed = performance.now() - start;
  }
  return passed / calls;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const n = sorted.length;
  return (sorted[(n - 1) >> 1] + sorted[n >> 1]) / 2;
}
