"""eval/generate.py as a user types it, on a checkpoint of the trainer's own writer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.checkpoint_files import OWN_HASH, read_checkpoint_manifest, write_checkpoint_manifest
from common.errors import UserError
from data_prep.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from eval.generate import main
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.hf_tokenizers import tokenizer_json

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "generate.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "run"
    write_checkpoint(folder / "checkpoints", noise=0.3, position="rope", block_size=64)
    return folder


def generate(*arguments, text="", status=0):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        input=text.encode(),
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_texts_and_figures_of_a_run(run, tmp_path):
    out, _ = generate(run, "--prompt", "ab", "--samples", 2, "--max-tokens", 9, "--json", tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    assert [text["sample"] for text in report["texts"]] == [0, 1]
    assert report["texts"][0]["text"] != report["texts"][1]["text"]
    assert report["sampling"] == {
        "temperature": 0.8, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    assert report["tokens_per_second"] > 0
    for text in report["texts"]:
        assert text["tokens"] <= 9
        assert f"ab{text['text']}" in out
    generate(run, "--prompt", "ab", "--samples", 1, "--max-tokens", 9, "--json", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["texts"][0] == report["texts"][0]


def test_ids_that_the_model_or_the_tokenizer_lacks_are_one_line(tmp_path):
    write_checkpoint(tmp_path / "smaller" / "checkpoints", vocab_size=100)  # its tokenizer has 257
    _, said = generate(tmp_path / "smaller", "--prompt", "é", status=2)
    assert re.fullmatch(
        r"error: the model of .* has 100 ids, but its tokenizer 257: they don't belong together.*\n", said
    )
    pytest.importorskip("tokenizers")
    spec = HuggingFaceTokenizer.of(tokenizer_json("gpt2"), 1).spec
    checkpoint = write_checkpoint(tmp_path / "beyond" / "checkpoints", tokenizer=spec)
    facts = read_checkpoint_manifest(checkpoint)
    facts["tokenizer"]["end_of_text_id"] = 99_999
    write_checkpoint_manifest(checkpoint, {key: value for key, value in facts.items() if key != OWN_HASH})
    _, said = generate(tmp_path / "beyond", "--prompt", "a", status=2)
    assert said.startswith(f"error: {checkpoint}: the id that ends a text is 99999, but the tokenizer has 340 ids")
    assert len(said.splitlines()) == 1


def test_prompts_from_file_and_standard_input_and_the_streamed_text(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("été\n", encoding="utf-8")
    options = ("--preset", "greedy", "--max-tokens", 12, "--past-end")
    from_file, _ = generate(run, "--prompt-file", tmp_path / "prompt.txt", *options)
    (tmp_path / "prompt.txt").write_text("été\n", encoding="utf-8-sig")  # as Windows' editors save
    assert generate(run, "--prompt-file", tmp_path / "prompt.txt", *options)[0] == from_file
    from_input, _ = generate(run, "--prompt-file", "-", *options, text="\ufeffété\n")
    given, _ = generate(run, "--prompt", "été\n", *options)
    assert from_file == from_input == given
    assert given.startswith("été\n") and given.endswith("\n")


def test_interactive_asks_again_until_the_end_of_input(run):
    out, _ = generate(run, "--interactive", "--preset", "greedy", "--max-tokens", 3, text="ab\ncd\n")
    alone, _ = generate(run, "--prompt", "cd", "--preset", "greedy", "--max-tokens", 3)
    assert re.findall(r"^> (ab|cd)", out, re.MULTILINE) == ["ab", "cd"]
    assert alone in out


def test_stop_strings_and_a_full_context(run, tmp_path):
    options = ("--prompt", "ab", "--preset", "greedy", "--past-end", "--max-tokens", 100)
    _, complaint = generate(run, *options, "--json", tmp_path / "full.json")
    full = json.loads((tmp_path / "full.json").read_text())["texts"][0]
    assert full["ended"] == "context full" and full["tokens"] == 64 + 1 - 3
    assert "--slide" in complaint
    generate(run, *options, "--slide", "--json", tmp_path / "slide.json")
    slid = json.loads((tmp_path / "slide.json").read_text())["texts"][0]
    assert slid["tokens"] == 100 and slid["ended"] == "count"
    assert slid["text"].startswith(full["text"].rstrip("\ufffd"))
    stop = full["text"][5:7]
    generate(run, *options, "--stop", stop, "--json", tmp_path / "stop.json")
    stopped = json.loads((tmp_path / "stop.json").read_text())["texts"][0]
    assert stopped["ended"] == "stop string"
    assert stopped["text"] == full["text"][: full["text"].index(stop)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--interactive"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--slide", "65"], "64"),
        (["--prompt", "a", "--stop", ""], "--stop"),
        (["--prompt", "a", "--samples", "0"], "--samples"),
        (["--prompt", "a" * 70], "--slide"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--interactive", "--prompt", "a"], "--interactive"),
    ],
)
def test_mistakes_say_what_to_do(run, arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(run), *arguments])
    with pytest.raises(UserError, match=re.escape(says)):
        main()
    assert capsys.readouterr().out == ""


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    out, err = generate(tmp_path, "--prompt", "a", status=2)
    assert err.startswith(f"error: {tmp_path}") and err.count("\n") == 1
    assert out == ""
