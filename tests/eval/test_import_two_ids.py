"""Models whose texts begin with one id and end with another (Llama's, Mistral's), with scaled rotary positions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.token_sets.manifest import document_start
from data_prep.token_sets.sequences import document_ids
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.tokenizer import END_OF_TEXT
from eval import export_hf, import_hf
from eval.hellaswag_task.examples import Example
from eval.hellaswag_task.metrics import build_questions
from eval.shared.loading import load_checkpoint
from tests.eval.hf_folders import LLAMA3_ROPE, call, check_equal, refused, run_by_path, two_id_folder

transformers = pytest.importorskip("transformers")

TEXTS = ["the theory of the thing", "one.\n\ntwo 12345!", "naïve 日本 😀\n", ""]
SCALINGS: list[dict[str, Any]] = [LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}]


@pytest.mark.parametrize(("kind", "scaling"), [("llama3", 0), ("prepended", 1), ("metaspace first", 0)])
def test_logits_ids_and_the_way_back_are_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, scaling: int
) -> None:
    source = tmp_path / "llama"
    theirs = two_id_folder(source, kind, rope_parameters=SCALINGS[scaling])
    call(import_hf, monkeypatch, source, tmp_path / "in")
    loaded = load_checkpoint(tmp_path / "in")
    assert loaded.model.config.rope_scaling == SCALINGS[scaling]["rope_type"]
    tokenizer = loaded.tokenizer
    check_equal(tmp_path / "in", theirs, tokenizer.vocab_size)
    tokens = torch.randint(0, tokenizer.vocab_size, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = loaded.model(tokens)[..., : tokenizer.vocab_size], theirs(tokens).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    call(export_hf, monkeypatch, tmp_path / "in", tmp_path / "out")
    for folder in (source, tmp_path / "out"):
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert tokenizer.prompt(text) == reference(text)["input_ids"]  # with its <s>
        config = json.loads((folder / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (reference.bos_token_id, reference.eos_token_id)
        kept = {name: config["rope_parameters"][name] for name in SCALINGS[scaling]}
        assert kept == SCALINGS[scaling]
    call(import_hf, monkeypatch, tmp_path / "out", tmp_path / "back")
    back = load_checkpoint(tmp_path / "back")
    assert back.tokenizer.spec == tokenizer.spec
    assert back.model.config == loaded.model.config


def test_generation_is_transformers_and_stops_at_each_of_several_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "llama"
    theirs = two_id_folder(source, "prepended")
    call(import_hf, monkeypatch, source, tmp_path / "in")
    reference = transformers.AutoTokenizer.from_pretrained(source)
    prompt = reference("the theory", return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    written = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, length:].tolist()
    arguments = ["--prompt", "the theory", "--preset", "greedy", "--max-tokens", 20, "--json", tmp_path / "texts.json"]
    done = run_by_path("eval/generate.py", tmp_path / "in", *arguments)
    assert done.returncode == 0, done.stderr
    (text,) = json.loads((tmp_path / "texts.json").read_text())["texts"]
    assert text["text"] == load_checkpoint(tmp_path / "in").tokenizer.decode(written, continues=True)
    # the third token written ends texts as well: config.json and generation_config.json have lists
    third = written[2]
    assert third not in written[:2]
    config = json.loads((source / "config.json").read_text())
    end = config["eos_token_id"]
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [end]}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [third, end]}))
    call(import_hf, monkeypatch, source, tmp_path / "several")
    tokenizer = load_checkpoint(tmp_path / "several").tokenizer
    assert (tokenizer.end_of_text_id, tokenizer.end_ids) == (end, (end, third))
    done = run_by_path("eval/generate.py", tmp_path / "several", *arguments)
    assert done.returncode == 0, done.stderr
    (text,) = json.loads((tmp_path / "texts.json").read_text())["texts"]
    assert (text["tokens"], text["ended"]) == (2, "end of text")
    call(export_hf, monkeypatch, tmp_path / "several", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [end, third]


def test_documents_are_framed_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_id_folder(tmp_path / "llama", "prepended")
    call(import_hf, monkeypatch, tmp_path / "llama", tmp_path / "in")
    documents = [f"the theory of thing {number}\n naïve 日本 </s>" for number in range(300)]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare = ["data_prep/text_files.py", tmp_path / "notes.jsonl", "--out", tmp_path / "set", "--val-tokens", 200]
    done = run_by_path(*prepare, "--tokenizer", tmp_path / "in", "--workers", 1)
    assert done.returncode == 0, done.stderr
    opened = TokenSet.open(tmp_path / "set", verify="full")
    tokenizer = load_checkpoint(tmp_path / "in").tokenizer
    begin, end = tokenizer.begin_of_text_id, tokenizer.end_of_text_id
    assert begin is not None
    assert (document_start(opened.tokenizer_spec), begin == end) == (begin, False)
    stream = opened.split("train")
    ids = stream.read(0, len(stream)).astype(np.int64)
    assert (ids[0], ids[-1]) == (begin, end)
    assert (ids[1:][ids[:-1] == end] == begin).all()
    assert (
        np.count_nonzero(ids == begin)
        == np.count_nonzero(ids == end)
        == stream.documents
        == document_ids(ids, begin)[-1]
    )
    assert set(tokenizer.decode(ids).split(END_OF_TEXT)[:-1]) <= set(documents)
    verified = run_by_path("data_prep/verify.py", tmp_path / "set")
    assert verified.returncode == 0, verified.stdout
    looked = run_by_path("data_prep/inspect_shards.py", tmp_path / "set", "--document", 1)
    assert looked.stdout.split("\n", 1)[1].strip() in documents, looked.stderr
    tune = ["train/finetune.py", tmp_path / "in", "--data.path", tmp_path / "set", "--run.root", tmp_path / "runs"]
    tune += ["--run.name", "tuned", "--run.max_steps", 2, "--batch.tokens_per_step", 120, "--batch.micro_batch", 2]
    tune += ["--data.document_mask", "true", "--eval.sample_every_steps", 2, "--eval.prompts", "[the theory]"]
    tuned = run_by_path(*tune, "--run.device", "cpu", "--run.compile", "false")
    assert tuned.returncode == 0, tuned.stderr
    measured = run_by_path("eval/perplexity.py", tmp_path / "runs" / "tuned", "--json", tmp_path / "p.json")
    assert measured.returncode == 0, measured.stderr
    assert json.loads((tmp_path / "p.json").read_text())["document_mask"] is True
    call(export_hf, monkeypatch, tmp_path / "runs" / "tuned", tmp_path / "out")


def test_hellaswags_contexts_begin_as_the_tokenizer_itself_begins_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = Example(0, "the theory", ("of it", "a", "b", "c"), "the theory", ("of it", "a", "b", "c"))
    for kind, template in (("prepended", True), ("llama3", True), ("llama3", False)):
        name = f"{kind}-{template}"
        two_id_folder(tmp_path / name, kind, template=template)
        call(import_hf, monkeypatch, tmp_path / name, tmp_path / f"in-{name}")
        tokenizer = load_checkpoint(tmp_path / f"in-{name}").tokenizer
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for (question,) in (build_questions([example], tokenizer).plain, build_questions([example], tokenizer).harness):
            assert list(question.context) == reference("the theory")["input_ids"]
            assert list(question.context + question.endings[0]) == reference("the theory of it")["input_ids"]
        empty = Example(0, "", ("a",) * 4, "", ("a",) * 4)
        assert build_questions([empty], tokenizer).plain[0].context == (tokenizer.begin_of_text_id,)


def test_files_that_contradict_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bos_token_id": 7}, "start with id 7 by config.json, with 0 (<s>) by tokenizer_config.json"),
        ({"eos_token_id": 7}, "end with id 7 by config.json, with 1 (</s>) by tokenizer_config.json"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "kind yarn"),
    ]
    for number, (values, message) in enumerate(cases):
        two_id_folder(tmp_path / str(number), "llama3", **values)
        assert message in refused(monkeypatch, tmp_path / str(number), tmp_path / "in")
    source = tmp_path / "template"
    two_id_folder(source, "llama3")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    assert "puts the ids [0] before a text" in refused(monkeypatch, source, tmp_path / "in")
    incomplete = {name: value for name, value in LLAMA3_ROPE.items() if name != "factor"}
    (source / "config.json").write_text(json.dumps(config | {"rope_parameters": incomplete}))
    assert "lacks factor" in refused(monkeypatch, source, tmp_path / "in")
