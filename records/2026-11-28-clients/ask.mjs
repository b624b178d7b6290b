// What transformers.js computes with an export's folder and its onnx/model.onnx, for ask.py, which starts this in the
// folder that has node_modules. A file that takes keys and values is asked by generate(), another by whole texts.

import { createRequire } from "node:module";
import path from "node:path";

const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = createRequire(path.resolve("any.js"))("@huggingface/transformers");
const [folder, prompt, count] = [process.argv[2], process.argv[3], Number(process.argv[4])];
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + "/";
const name = path.basename(folder);

const whole = (ids) => {
    const of = (value) => new Tensor("int64", BigInt64Array.from(ids, value), [1, ids.length]);
    return { input_ids: of(BigInt), attention_mask: of(() => 1n) };
};
const last = ({ data, dims }) => Array.from(data.slice(-dims.at(-1)));
const likeliest = (logits) => logits.indexOf(Math.max(...logits));

const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: "fp32" });
const ids = tokenizer(prompt).input_ids.tolist()[0].map(Number);
const logits = last((await model(whole(ids))).logits);
const cached = model.sessions.model.inputNames.some((each) => each.startsWith("past_key_values"));
let found = [...ids];
if (cached) {
    const asked = { ...whole(ids), max_new_tokens: count, do_sample: false, eos_token_id: -1 };
    found = (await model.generate(asked)).tolist()[0].map(Number);
} else {
    while (found.length < ids.length + count) found.push(likeliest(last((await model(whole(found))).logits)));
}
const { version } = createRequire(path.resolve("any.js"))("onnxruntime-node/package.json");
console.log(JSON.stringify({ logits, new: found.slice(ids.length), cached, onnxruntime: version }));
