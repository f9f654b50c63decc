// Runs an exported model.js in Node: node web.mjs FOLDER < QUESTIONS > ANSWERS, both JSON.
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const { info, load } = await import(pathToFileURL(`${folder}/model.js`));
const model = await load(await readFile(`${folder}/model.wasm`));
const { inputs = [], images = [] } = JSON.parse(readFileSync(0, "utf8"));
const outputs = inputs.map((x) => Array.from(model.run(Float32Array.from(x))));
let refused = null;
try { model.run(new Float32Array(1)); } catch (error) { refused = `${error.name}: ${error.message}`; }
process.stdout.write(JSON.stringify({
  info,
  outputs,
  classes: outputs.map((y) => model.classify(y)),
  prepared: images.map((image) => Array.from(model.prepare(image))),
  refused,
}));
