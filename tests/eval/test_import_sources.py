"""Where an imported model's files come from, and how they may look: hub, cache, pickles, parts, padding, tokenizers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from data_prep.corpora.hub import find_on_hub
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import END_OF_TEXT
from eval import export_hf, import_hf
from eval.generation.text_stream import TextStream
from eval.hugging_face.hub_models import find_model
from eval.shared.loading import load_checkpoint
from tests.eval.hf_folders import call, check_equal, gpt2_folder, llama_folder, refused, run_by_path
from tests.helpers.http_server import Server
from tests.helpers.training import PROJECT

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

REVISION = "a" * 40
SIZES = {"gpt2": (12, 12), "gpt2-medium": (24, 16), "gpt2-large": (36, 20), "gpt2-xl": (48, 25)}  # layers, heads


@pytest.mark.parametrize(("name", "form"), [*((name, "safetensors") for name in SIZES), ("gpt2", "bin")])
def test_openais_four_sizes_in_the_files_the_hub_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    layers, heads = SIZES[name]
    source = tmp_path / name
    theirs = gpt2_folder(source, layers=layers, heads=heads)
    if form == "bin":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    call(import_hf, monkeypatch, source, tmp_path / "in")
    check_equal(tmp_path / "in", theirs)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_files_in_parts_are_put_together_and_a_missing_part_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    source = tmp_path / "gpt2"
    theirs = gpt2_folder(source, layers=2)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    stem = "model" if form == "safetensors" else "pytorch_model"
    weight_map = {}
    for part in (1, 2):
        file = f"{stem}-0000{part}-of-00002.{form}"
        held = {name: value for number, (name, value) in enumerate(tensors.items()) if number % 2 == part - 1}
        weight_map |= dict.fromkeys(held, file)
        save_file(held, source / file) if form == "safetensors" else torch.save(held, source / file)
    (source / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    call(import_hf, monkeypatch, source, tmp_path / "in")
    check_equal(tmp_path / "in", theirs)
    (source / f"{stem}-00002-of-00002.{form}").unlink()
    assert f"lacks {stem}-00002-of-00002.{form}" in refused(monkeypatch, source, tmp_path / "again")


def test_pickles_that_hold_more_than_tensors_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "gpt2"
    gpt2_folder(source)
    (source / "model.safetensors").unlink()
    assert "has neither" in refused(monkeypatch, source, tmp_path / "in")

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"wte.weight": Trap()}, source / "pytorch_model.bin")
    assert "can't be read as PyTorch weights" in refused(monkeypatch, source, tmp_path / "in")
    assert not (tmp_path / "sprung").exists()


def test_a_padded_table_is_cropped_to_the_tokenizer_and_another_vocabulary_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = gpt2_folder(tmp_path / "padded", rows=50304)
    call(import_hf, monkeypatch, tmp_path / "padded", tmp_path / "in")
    assert "left out: 47 rows" in capsys.readouterr().out
    check_equal(tmp_path / "in", theirs)
    gpt2_folder(tmp_path / "other", rows=60000)
    assert "they don't belong together" in refused(monkeypatch, tmp_path / "other", tmp_path / "x")
    gpt2_folder(tmp_path / "fewer", rows=500)
    assert "they don't belong together" in refused(monkeypatch, tmp_path / "fewer", tmp_path / "x")


def test_a_byte_level_tokenizer_of_its_own_is_carried_written_with_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, count = llama_folder(tmp_path / "llama")
    call(import_hf, monkeypatch, tmp_path / "llama", tmp_path / "in")
    check_equal(tmp_path / "in", theirs, count)
    shutil.rmtree(tmp_path / "llama" / "tokenizer.json", ignore_errors=True)
    tokenizer = load_checkpoint(tmp_path / "in").tokenizer
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    text = "the there <|end|> naïve 日本 😀\n\n\tx"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text_id == 0
    assert 0 not in ids
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids.tolist()), stream.finish()]) == text
    generated = subprocess.run(
        [sys.executable, PROJECT / "eval" / "generate.py", tmp_path / "in", "--prompt", "the", "--max-tokens", "4"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert generated.returncode == 0, generated.stderr
    call(export_hf, monkeypatch, tmp_path / "in", tmp_path / "out")
    call(import_hf, monkeypatch, tmp_path / "out", tmp_path / "back")
    assert load_checkpoint(tmp_path / "back").tokenizer.spec == tokenizer.spec


def test_an_imported_model_is_tuned_on_texts_in_its_own_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_folder(tmp_path / "llama")
    call(import_hf, monkeypatch, tmp_path / "llama", tmp_path / "in")
    documents = [f"the theory of thing {number} <|end|> naïve 日本" for number in range(300)]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare = ["data_prep/text_files.py", tmp_path / "notes.jsonl", "--out", tmp_path / "set", "--val-tokens", 100]
    done = run_by_path(*prepare, "--tokenizer", tmp_path / "in", "--workers", 1)
    assert done.returncode == 0, done.stderr
    opened = TokenSet.open(tmp_path / "set", verify="full")
    tokenizer = load_tokenizer(opened.tokenizer_spec)
    assert tokenizer.spec == load_checkpoint(tmp_path / "in").tokenizer.spec
    found = tokenizer.decode(opened.split("train").read(0, len(opened.split("train")))).split(END_OF_TEXT)[1:]
    assert len(found) > 250
    assert set(found) < set(documents)
    other = run_by_path(*prepare, "--tokenizer", "byte")
    assert (other.returncode, "another tokenizer (huggingface" in other.stderr) == (2, True), other.stderr
    tune = ["train/finetune.py", tmp_path / "in", "--data.path", tmp_path / "set", "--run.root", tmp_path / "runs"]
    tune += ["--run.name", "tuned", "--run.max_steps", 2, "--batch.tokens_per_step", 48, "--batch.micro_batch", 2]
    tuned = run_by_path(*tune, "--run.device", "cpu", "--run.compile", "false")
    assert tuned.returncode == 0, tuned.stderr
    call(export_hf, monkeypatch, tmp_path / "runs" / "tuned", tmp_path / "out")
    wrong = run_by_path(*prepare[:-3], tmp_path / "b", "--tokenizer", tmp_path / "llama")
    assert (wrong.returncode, "--tokenizer takes gpt2, char, byte, " in wrong.stderr) == (2, True)


def test_tokenizers_that_cannot_be_carried_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_folder(tmp_path / "words")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|end|>": 0, "the": 1}, unk_token="<|end|>"))
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    assert "neither a byte-level BPE nor" in refused(monkeypatch, tmp_path / "words", tmp_path / "in")
    (tmp_path / "words" / "tokenizer.json").unlink()
    assert "--tokenizer gpt2 or byte" in refused(monkeypatch, tmp_path / "words", tmp_path / "in")


def test_descriptions_that_broke_off_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "llama"
    llama_folder(source)
    whole = json.loads((source / "config.json").read_text())
    for values, message in (
        (whole | {"num_hidden_layers": "1"}, "config.json is damaged (num_hidden_layers: it is not a whole number)"),
        ([whole], "config.json is damaged (it is not an object)"),
    ):
        (source / "config.json").write_text(json.dumps(values))
        assert message in refused(monkeypatch, source, tmp_path / "in")
    (source / "config.json").write_text(json.dumps(whole))
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "tokenizer.json is damaged (it is not JSON: " in refused(monkeypatch, source, tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    assert "has no vocabulary by name, so it is no BPE" in refused(monkeypatch, source, tmp_path / "in")
    assert "neither a folder nor" in refused(monkeypatch, "exports--demo", tmp_path / "in")


def test_a_name_is_fetched_from_the_hub_once_and_then_needs_no_network(tmp_path: Path) -> None:
    theirs = gpt2_folder(tmp_path / "gpt2")
    files = {path.name: path.read_bytes() for path in (tmp_path / "gpt2").iterdir()}
    files["rust_model.ot"] = b"never asked for"
    info = {"id": "o/gpt2", "sha": REVISION, "siblings": [{"rfilename": name} for name in files]}
    served: dict[str, Any] = {f"/o/gpt2/resolve/{REVISION}/{name}": data for name, data in files.items()}
    served["/api/models/o/gpt2/revision/main"] = served["/api/models/o/gpt2"] = info
    served["/api/models/o/gpt2/tree/" + REVISION] = [
        {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
    ]
    home = {"HOME": str(tmp_path / "home"), "LONGHAUL_CACHE": str(tmp_path / "cache")}
    with Server(files=served) as server:
        done = run_by_path("eval/import_hf.py", "o/gpt2", tmp_path / "in", HF_ENDPOINT=server.url, **home)
        assert done.returncode == 0, done.stderr
        assert not server.asked(f"/o/gpt2/resolve/{REVISION}/rust_model.ot")
        missing = run_by_path("eval/import_hf.py", "o/other", tmp_path / "x", HF_ENDPOINT=server.url, **home)
    check_equal(tmp_path / "in", theirs)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: o/other is not a folder")
    assert not (tmp_path / "home").exists()
    again = run_by_path("eval/import_hf.py", "o/gpt2", tmp_path / "again", HF_HUB_OFFLINE="1", **home)
    assert again.returncode == 0, again.stderr
    offline = run_by_path("eval/import_hf.py", "o/never", tmp_path / "x", HF_HUB_OFFLINE="1", **home)
    assert offline.returncode == 2
    assert offline.stderr.count("\n") == 1
    assert "hf download o/never --local-dir DIR" in offline.stderr
    down = run_by_path("eval/import_hf.py", "o/never", tmp_path / "x", HF_ENDPOINT=server.url, **home)  # it has ended
    assert down.stderr.startswith("error: o/never is not a folder, and the hub can't be reached (ConnectError): run")
    nowhere = run_by_path("eval/import_hf.py", tmp_path / "no" / "such" / "dir", tmp_path / "x", **home)
    assert "neither a folder nor" in nowhere.stderr


@pytest.mark.parametrize("revision", ["\udcff", "", "a b", "a\x1b[2J"])
def test_what_can_be_no_revision_is_one_line_before_the_hub_is_asked(revision: str) -> None:
    for ask in (lambda: find_model("o/model", revision), lambda: find_on_hub("o/data", "default", revision)):
        with pytest.raises(UserError, match="give a commit, a tag or a branch"):
            ask()
