// A sparse network in WebAssembly, written by torch-feather. No dependencies; one thread.
//
//   import { load } from "./model.js";
//   const model = await load();                    // fetches model.wasm beside this file
//   const input = model.prepare(imageData);        // Float32Array, from an ImageData of any size
//   const outputs = model.run(input);              // Float32Array: one number per class
//   const best = model.classify(outputs)[0];       // {name, probability}
//
// In Node: `await load(await readFile("model.wasm"))`.

/** Names of the classes, shapes, and the preparation of images. */
export const info = @INFO@;

/**
 * Load the network.
 * @param {URL|string|BufferSource} [source] address of model.wasm, or its bytes
 * @returns {Promise<Model>}
 */
export async function load(source = new URL("model.wasm", import.meta.url)) {
  let bytes = source;
  if (typeof source === "string" || source instanceof URL) {
    const response = await fetch(source);
    if (!response.ok) throw new Error(`${source}: ${response.status} ${response.statusText}`);
    bytes = await response.arrayBuffer();
  }
  let wasm, top;
  const malloc = (size) => {  // nothing is freed before the page is left
    top ??= wasm.__heap_base.value;
    const start = (top + 63) & ~63;
    top = start + size;
    const pages = Math.ceil((top - wasm.memory.buffer.byteLength) / 65536);
    if (pages > 0) wasm.memory.grow(pages);
    return start;
  };
  const { log, pow, sin, cos } = Math;
  const env = { malloc, free() {}, logf: log, powf: pow, sinf: sin, cosf: cos };
  wasm = (await WebAssembly.instantiate(bytes, { env })).instance.exports;
  return new Model(wasm, malloc);
}

/** A loaded network; `load` returns it. */
export class Model {
  constructor(wasm, malloc) {
    this.info = info;
    this.wasm = wasm;
    const [inputs, outputs, created] = [malloc(4), malloc(4), malloc(4)];
    this.input = malloc(4 * size(info.inputShape));
    this.output = malloc(4 * size(info.outputShape));
    const code = wasm.model_create(created, 1);
    if (code) throw new Error(`model_create returned error ${code}`);
    const words = new Uint32Array(wasm.memory.buffer);  // after the last growth of the memory
    words[inputs / 4] = this.input;
    words[outputs / 4] = this.output;
    this.call = [words[created / 4], inputs, outputs];
  }

  /**
   * Compute the outputs for one input.
   * @param {Float32Array} input info.inputShape numbers, channel by channel, row by row
   * @returns {Float32Array} info.outputShape numbers
   */
  run(input) {
    const { buffer } = this.wasm.memory;
    const [n, m] = [size(info.inputShape), size(info.outputShape)];
    if (input.length !== n) throw new RangeError(`expected ${n} numbers, got ${input.length}`);
    new Float32Array(buffer, this.input, n).set(input);
    const code = this.wasm.model_run(...this.call);
    if (code) throw new Error(`model_run returned error ${code}`);
    return new Float32Array(buffer, this.output, m).slice();
  }

  /**
   * Prepare an image as in evaluation: scale its shorter side, crop its center, normalize.
   * @param {{data: ArrayLike<number>, width: number, height: number}} image RGBA, such as ImageData
   * @returns {Float32Array}
   */
  prepare(image) {
    const { side, mean, std, inputShape: [, channels, height, width] } = info;
    const short = Math.min(image.width, image.height);
    const [wide, high] = [image.width, image.height].map((l) => Math.floor((side * l) / short));
    const scaled = resize(image, wide, high);
    const [top, left] = [halfEven(high - height), halfEven(wide - width)];
    const found = new Float32Array(channels * height * width);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const at = 3 * ((y + top) * wide + x + left);
        const rgb = scaled.subarray(at, at + 3);
        const pixel = channels === 1 ? [Math.round((rgb[0] + rgb[1] + rgb[2]) / 3)] : rgb;
        for (let c = 0; c < channels; c++) {
          found[(c * height + y) * width + x] = (pixel[c] / 255 - mean[c]) / std[c];
        }
      }
    }
    return found;
  }

  /**
   * Return the classes of outputs, the most probable first.
   * @param {Float32Array} outputs
   * @returns {{name: string, probability: number}[]}
   */
  classify(outputs) {
    const most = Math.max(...outputs);
    let found = Array.from(outputs, (y) => (info.multiLabel ? 1 / (1 + Math.exp(-y)) : Math.exp(y - most)));
    if (!info.multiLabel) {
      const total = found.reduce((a, b) => a + b);
      found = found.map((p) => p / total);
    }
    return found.map((probability, i) => ({ name: info.classNames[i], probability }))
      .sort((a, b) => b.probability - a.probability);
  }
}

const size = (shape) => shape.reduce((a, b) => a * b, 1);

/** Half a number, rounded to an integer; halves to even, as in Python. */
function halfEven(n) {
  const floor = Math.floor(n / 2);
  return n % 2 ? floor + Math.abs(floor % 2) : floor;
}

/** Scale an RGBA image to RGB, bilinearly with antialiasing, as in PyTorch. */
function resize({ data, width, height }, wide, high) {
  const rows = new Uint8ClampedArray(3 * wide * height);  // rounds, as PyTorch between the axes
  const columns = taps(width, wide);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < wide; x++) {
      const [first, weights] = columns[x];
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) {
          sum += weights[k] * data[4 * (y * width + first + k) + c];
        }
        rows[3 * (y * wide + x) + c] = sum;
      }
    }
  }
  const found = new Uint8ClampedArray(3 * wide * high);
  const row = 3 * wide;
  taps(height, high).forEach(([first, weights], y) => {
    for (let i = 0; i < row; i++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * rows[(first + k) * row + i];
      found[y * row + i] = sum;
    }
  });
  return found;
}

/** For each pixel of a scaled axis: the first source pixel, and the weights. */
function taps(from, to) {
  const scale = from / to;
  const reach = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = scale * (i + 0.5);
    const first = Math.max(Math.trunc(center - reach + 0.5), 0);
    const end = Math.min(Math.trunc(center + reach + 0.5), from);
    const weights = Array.from({ length: end - first }, (_, k) =>
      Math.max(0, 1 - Math.abs((first + k + 0.5 - center) / reach)));
    const total = weights.reduce((a, b) => a + b);
    return [first, weights.map((w) => w / total)];
  });
}
