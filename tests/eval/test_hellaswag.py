"""HellaSwag against a plain reading of its definitions, one ending at a time, and over ranks."""

import bz2
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_prep.tokenization.loading import load_tokenizer
from eval.hellaswag import main
from eval.hellaswag_task import examples as hellaswag_examples
from eval.hellaswag_task.contamination import Contamination
from eval.hellaswag_task.examples import FULL_SIZE, evenly_spaced, read_hellaswag
from eval.hellaswag_task.metrics import choose_all
from eval.hellaswag_task.multiple_choice import BatchSize, Question, log_likelihoods
from eval.shared.loading import load_checkpoint
from model.ranks import start_ranks
from tests.eval.checkpoints import write_checkpoint
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.ranks import run_ranks
from tests.helpers.training import PROJECT
from tests.model.small import small_model

SCRIPT = PROJECT / "eval" / "hellaswag.py"
METRICS = ("acc", "acc_norm", "acc_norm_chars")


def run_script(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "LONGHAUL_CACHE": os.environ.get("LONGHAUL_CACHE", "")},
        capture_output=True,
        text=True,
        timeout=120,
    )


@torch.no_grad()
def textbook(model, context: Sequence[int], ending: Sequence[int]) -> float:
    """The definition: the whole text through the model, and the log-probabilities of the ending's tokens added up."""
    size = model.config.block_size
    text = [*context, *ending][-(size + 1) :]
    logits = model(torch.tensor([text[:-1]]))[0, :, : model.config.vocab_size].double()
    table = logits.log_softmax(dim=-1)
    return sum(float(table[i - 1, text[i]]) for i in range(len(text) - len(ending), len(text)))


MODELS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope, windows": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "window": 7, "n_kv_head": 2},
    "differential": {"position": "rope", "attention": "differential"},
    "short context": {"block_size": 23},
    "capped logits, mixed values": {"logit_softcap": 2.0, "value_residual": True, "value_embeddings": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_log_likelihoods_are_the_textbooks(name: str) -> None:
    model = small_model(noise=0.3, **{"block_size": 90, **MODELS[name]}).train()
    chance = random.Random(name)
    questions = []
    for number in range(12):
        context = tuple(chance.randrange(61) for _ in range(chance.choice([1, 1, 5, 20, 40])))
        longest = 1 if number == 3 else chance.choice([2, 12, 22])
        endings = tuple(tuple(chance.randrange(61) for _ in range(chance.randint(1, longest))) for _ in range(4))
        questions.append(Question(context, endings))
    expected = [[textbook(model.eval(), q.context, ending) for ending in q.endings] for q in questions]
    model.train()
    finished = []
    for size in (BatchSize(32, 16), BatchSize(5, 3)):
        found = log_likelihoods(model, questions, start_ranks("cpu"), batch_size=size, done=finished.append)
        assert found == pytest.approx(np.array(expected), abs=2e-4)
    assert model.training
    assert sum(finished) >= 2 * len(questions)


def reference(model, tokenizer, row: dict) -> dict[str, int]:
    """The three choices for one row of the official file, from the definitions."""
    plain = [tokenizer.encode(" " + ending).tolist() for ending in row["endings"]]
    sums = [textbook(model, tokenizer.encode(row["ctx"]).tolist(), ending) for ending in plain]
    means = [score / len(ending) for score, ending in zip(sums, plain, strict=True)]

    from lm_eval.tasks.hellaswag.utils import preprocess

    context = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = [preprocess(ending) for ending in row["endings"]]
    kept = context.rstrip()  # spaces at its end belong to what follows
    cut = len(tokenizer.encode(kept))
    wholes = [tokenizer.encode(f"{context} {ending}").tolist() for ending in endings]
    scores = [textbook(model, whole[:cut], whole[cut:]) for whole in wholes]
    by_character = [score / len(ending) for score, ending in zip(scores, endings, strict=True)]
    return {
        "label": int(row["label"]),
        "acc": int(np.argmax(sums)),
        "acc_norm": int(np.argmax(means)),
        "acc_norm_chars": int(np.argmax(by_character)),
    }


def contamination_of(data: Path, *, found: Sequence[int], unchecked: Sequence[int]) -> dict[str, Any]:
    """What data_prep/contamination.py writes about a file, as far as it is read."""
    against = {"file": data.name, "sha256": hashlib.sha256(data.read_bytes()).hexdigest(), "items": 17}
    entries = [{"item": number, "ngram": "…", "document": 0} for number in found]
    return {"data_identity": "0" * 64, "against": against, "found": entries, "unchecked": list(unchecked)}


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte"])
def test_the_script_chooses_as_the_definitions_do(tmp_path: Path, tokenizer: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", tokenizer=tokenizer, noise=0.3)
    rows = official_rows(17, seed=1)
    data = write_official(tmp_path / "official.jsonl", rows)
    out = tmp_path / "run" / "report" / "hellaswag.json"  # a run that no report was made of has no such folder
    searched = [tmp_path / "one.json", tmp_path / "other.json"]  # of two sets of a mix
    for path, found in zip(searched, ([2, 5], [5, 16]), strict=True):
        path.write_text(json.dumps(contamination_of(data, found=found, unchecked=[7])))
    options = [part for path in searched for part in ("--contamination", path)]
    done = run_script(checkpoint, "--data", data, "--json", out, "--device", "cpu", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    loaded = load_checkpoint(checkpoint)
    expected = [reference(loaded.model, loaded.tokenizer, row) for row in rows]
    assert report["predictions"] == expected
    assert any(entry["acc"] != entry["acc_norm"] for entry in expected)
    assert any(entry["acc_norm"] != entry["acc_norm_chars"] for entry in expected)
    for metric in METRICS:
        right = [entry[metric] == entry["label"] for entry in expected]
        assert report[metric] == pytest.approx(np.mean(right), abs=1e-12)
        assert report[f"{metric}_stderr"] == pytest.approx(np.std(right, ddof=1) / 17**0.5, abs=1e-12)
        assert f"{report[metric]:.4f}" in done.stdout
    for side, numbers in {"found": [2, 5, 16], "unchecked": [7], "clean": [*range(2), 3, 4, 6, *range(8, 16)]}.items():
        assert report["contamination"][side]["examples"] == len(numbers)
        for metric in METRICS:
            right = [expected[number][metric] == expected[number]["label"] for number in numbers]
            assert report["contamination"][side][metric] == pytest.approx(np.mean(right), abs=1e-12)
        assert f"{side:10} {len(numbers):>6} examples" in done.stdout
    assert report["examples"] == 17
    assert "0.2945" in done.stdout


def test_examples_without_room_are_left_out_and_counted(tmp_path: Path) -> None:
    """What is scored is what a file without them has; each keeps its place in predictions and contamination."""
    checkpoint = write_checkpoint(tmp_path / "run", noise=0.3, block_size=96)
    rows = official_rows(17, seed=1)
    fitting = [n for n, row in enumerate(rows) if max(len(f"   {e}".encode()) for e in row["endings"]) <= 96]
    assert 1 < len(fitting) < 16
    reports = []
    for name, part in (("all", rows), ("fitting", [rows[number] for number in fitting])):
        data, out = write_official(tmp_path / f"{name}.jsonl", part), tmp_path / f"{name}.json"
        (tmp_path / "found.json").write_text(json.dumps(contamination_of(data, found=[fitting[0]], unchecked=[])))
        more = ("--contamination", tmp_path / "found.json") if name == "all" else ()
        done = run_script(checkpoint, "--data", data, "--json", out, "--device", "cpu", *more)
        assert done.returncode == 0, done.stderr
        assert ("examples (" in done.stdout and "are left out" in done.stdout) == (name == "all"), done.stdout
        assert ("0.2945" in done.stdout) == (name == "fitting"), "published scores have all examples"
        reports.append(json.loads(out.read_text()))
    whole, few = reports
    figures = ["examples", *METRICS, *(f"{metric}_stderr" for metric in METRICS)]
    assert [whole[figure] for figure in figures] == [few[figure] for figure in figures]
    assert [whole["examples_left_out"], few["examples_left_out"]] == [17 - len(fitting), 0]
    assert [whole["predictions"][number] for number in fitting] == few["predictions"]
    assert sum(entry["acc"] is None for entry in whole["predictions"]) == 17 - len(fitting)
    sides = {side: whole["contamination"][side]["examples"] for side in ("found", "clean", "unchecked")}
    assert sides == {"found": 1, "clean": len(fitting) - 1, "unchecked": 0}


def test_a_note_names_the_sets_of_a_mix_that_no_report_is_of() -> None:
    contamination = Contamination((("f" * 64, "a"), ("e" * 64, "b")), frozenset(), frozenset())
    assert contamination.note({"mix": {"sets": [["web", "a"], ["code", "b"]]}, "data_identity": "mixed"}) is None
    assert "no contamination report is of books, " in str(
        contamination.note({"mix": {"sets": [["web", "a"], ["books", "c"]]}, "data_identity": "mixed"})
    )
    assert contamination.note({"data_identity": "a"}) is None
    assert "another token set" in str(contamination.note({"data_identity": "c"}))


def main_as_rank(checkpoint: Path, data: Path, out: Path, limit: int) -> None:
    sys.argv = ["hellaswag.py", str(checkpoint), "--data", str(data), "--json", str(out), "--device=cpu", "--batch=2"]
    sys.argv.append(f"--limit={limit}")
    assert main() == 0


def test_every_example_counts_once_for_any_number_of_ranks(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", noise=0.3)
    data = write_official(tmp_path / "official.jsonl", official_rows(11))
    reports = {}
    for world_size, limit in ((1, 11), (2, 11), (3, 11), (3, 2)):  # two examples for three ranks
        out = tmp_path / f"{world_size}-{limit}.json"
        run_ranks(world_size, tmp_path / "store", main_as_rank, checkpoint, data, out, limit)
        reports[world_size, limit] = json.loads(out.read_text())
    assert reports[1, 11]["examples"] == 11
    for world_size in (2, 3):
        for key in (*METRICS, "examples", "predictions"):
            assert reports[world_size, 11][key] == reports[1, 11][key]
    assert reports[3, 2]["predictions"] == reports[1, 11]["predictions"][:2]


def test_under_torchrun(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", noise=0.3)
    data = write_official(tmp_path / "official.jsonl", official_rows(6))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = run_script(checkpoint, "--data", data, "--device", "cpu", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("acc_norm_chars") == 1


def text_form(rows: list[dict]) -> str:
    lines = [line for row in rows for line in (row["ctx"], str(row["label"]), *row["endings"])]
    return "\n".join(lines) + "\n"


def test_the_text_form_is_used_as_it_stands_and_says_so(tmp_path: Path) -> None:
    rows = official_rows(12, seed=3)
    plain, packed = tmp_path / "some.txt", tmp_path / "some.txt.bz2"
    plain.write_text(text_form(rows))
    packed.write_bytes(bz2.compress(plain.read_bytes()))
    data = read_hellaswag(plain)
    assert read_hellaswag(packed).examples == data.examples
    assert not data.official
    for row, example in zip(rows, data.examples, strict=True):
        assert example.context == example.harness_context == row["ctx"]
        assert example.endings == example.harness_endings == tuple(row["endings"])
    checkpoint = write_checkpoint(tmp_path / "run", noise=0.3)
    done = run_script(checkpoint, "--data", packed, "--limit", 5, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["examples"] == len(report["predictions"]) == 5
    assert "nothing published" in done.stdout
    assert "nothing published" in report["comparable_with"]


def test_the_real_text_file(tmp_path: Path) -> None:
    folder = os.environ.get("LONGHAUL_TEST_DATA")
    if not folder:
        pytest.skip("LONGHAUL_TEST_DATA does not name the folder with hellaswag_val.txt.bz2")
    data = read_hellaswag(Path(folder) / "hellaswag_val.txt.bz2")
    assert len(data.examples) == FULL_SIZE
    assert data.examples[0].context == "Roof shingle removal: A man is sitting on a roof. he"
    assert data.examples[0].endings[3] == "starts pulling up roofing on a roof."
    spread = evenly_spaced(data.examples, 100)
    assert len(set(spread)) == 100
    assert spread[-1] in data.examples[-101:]
    assert evenly_spaced(data.examples, 20_000) == data.examples
    loaded = load_checkpoint(write_checkpoint(tmp_path, tokenizer="gpt2", noise=0.3))
    choices = choose_all(loaded.model, spread[:8], loaded.tokenizer, start_ranks("cpu"))
    for number, example in enumerate(spread[:8]):
        context = load_tokenizer("gpt2").encode(example.context).tolist()
        endings = [load_tokenizer("gpt2").encode(f" {ending}").tolist() for ending in example.endings]
        sums = [textbook(loaded.model, context, ending) for ending in endings]
        assert choices["acc"][number] == np.argmax(sums)
        assert choices["acc_norm_chars"][number] == np.argmax(np.array(sums) / [len(e) for e in example.endings])


def test_scores_that_are_no_numbers_are_said(tmp_path: Path) -> None:
    """float16 doesn't hold these activations; the largest of four NaN would be the first ending."""
    loaded = load_checkpoint(write_checkpoint(tmp_path, noise=0.3))
    with torch.no_grad():
        loaded.model.get_parameter("h.0.mlp.c_proj.weight").mul_(3e5)
    examples = read_hellaswag(write_official(tmp_path / "a.jsonl", official_rows(2, words_at_most=3))).examples
    choose_all(loaded.model, examples, loaded.tokenizer, start_ranks("cpu"), dtype="bf16")
    with pytest.raises(UserError, match="use --dtype bf16 or fp32"):
        choose_all(loaded.model, examples, loaded.tokenizer, start_ranks("cpu"), dtype="fp16")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.txt.bz2"])
def test_a_byte_order_mark_is_no_part_of_the_first_example(tmp_path: Path, name: str) -> None:
    rows = official_rows(2, words_at_most=3)
    plain = write_official(tmp_path / "plain.jsonl", rows)
    if name != "a.jsonl":
        lines = [[row["ctx"], str(row["label"]), *row["endings"]] for row in rows]
        plain.write_text("".join(f"{line}\n" for example in lines for line in example))
    content = b"\xef\xbb\xbf" + plain.read_bytes()
    (tmp_path / name).write_bytes(bz2.compress(content) if name.endswith(".bz2") else content)
    assert read_hellaswag(tmp_path / name).examples == read_hellaswag(plain).examples


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", noise=0.3)
    monkeypatch.setenv("LONGHAUL_CACHE", str(tmp_path / "empty"))
    good = official_rows(2)
    cases = {
        (): "run 'python data_prep/prepare_offline.py'",
        ("--data", tmp_path / "none.jsonl"): "there is no file",
        ("--data", write_official(tmp_path / "a.jsonl", [good[0], {"ctx": "x"}])): "line 2 is not a HellaSwag example",
        (
            "--data",
            write_official(tmp_path / "b.jsonl", [{**good[0], "label": ""}]),
        ): "line 1 is not a HellaSwag example",
        (
            "--data",
            write_official(tmp_path / "h.jsonl", [{**good[0], "label": 1e999}]),
        ): "line 1 is not a HellaSwag example",
        ("--data", write_official(tmp_path / "c.jsonl", good), "--limit", 0): "--limit is 0",
    }
    cases["--data", tmp_path / "c.jsonl", "--json", tmp_path / "c.jsonl" / "out.json"] = "out.json can't be written"
    cases["--data", write_official(tmp_path / "h.jsonl", [{**good[0], "endings": [1, 2, 3, 4]}])] = (
        "endings.0: it is not text"
    )
    cases["--data", write_official(tmp_path / "i.jsonl", [{**good[0], "ctx_b": None}])] = "ctx_b: it is not text"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(contamination_of(tmp_path / "c.jsonl", found=[], unchecked=[])))
    cases["--data", write_official(tmp_path / "k.jsonl", good[:1]), "--contamination", other] = (
        "is about another file than"
    )
    cases["--data", tmp_path / "c.jsonl", "--contamination", tmp_path / "c.jsonl"] = "c.jsonl is damaged"
    monkeypatch.setattr(hellaswag_examples, "MOST_BYTES", 100_000)
    (tmp_path / "j.jsonl.bz2").write_bytes(bz2.compress(bytes(100_001)))
    cases["--data", tmp_path / "j.jsonl.bz2"] = "has more than 100,000 bytes"
    (tmp_path / "d.txt").write_text("context\n3\none\ntwo\n")
    cases["--data", tmp_path / "d.txt"] = "has 4 lines"
    (tmp_path / "e.txt").write_text("context\n4\none\ntwo\nthree\nfour\n")
    cases["--data", tmp_path / "e.txt"] = "not a label from 0 to 3"
    (tmp_path / "f.txt.bz2").write_text("no bzip2")
    cases["--data", tmp_path / "f.txt.bz2"] = "can't be read"
    packed = bz2.compress((tmp_path / "c.jsonl").read_bytes())
    (tmp_path / "g.jsonl.bz2").write_bytes(packed[: len(packed) // 2])  # a download that broke off
    cases["--data", tmp_path / "g.jsonl.bz2"] = "can't be read"
    for arguments, message in cases.items():
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", str(checkpoint), *map(str, arguments)])
        with pytest.raises(UserError, match=message) as error:
            main()
        assert "\n" not in str(error.value)
    done = run_script(checkpoint)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no HellaSwag at")
    assert len(done.stderr.splitlines()) == 1
