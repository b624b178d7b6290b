"""Runs over several token sets: the same for any ranks and interruptions, each source in its own order."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from data_prep.token_sets.token_set import TokenSet
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, curve, run_of, tiny_arguments, train, train_by_path
from train.batches.shuffle import windows_at

SIZES = {"web": 60, "code": 20, "books": 9}  # sequences of 16 tokens
STEP = 8  # sequences
OPTIONS = ("--batch.tokens_per_step=128", "--batch.micro_batch=2", "--schedule.kind=constant", "--run.max_steps=24",
           "--checkpoint.every_steps=6", "--eval.every_steps=12", "--model.dropout=0")  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for seed, (name, count) in enumerate(SIZES.items()):
        make_token_set(folder / name, train_tokens=16 * count + 1, val_tokens=40 + 100 * seed, seed=seed)
    return folder


def mix_file(folder: Path, sets: Path, weights: dict[str, float], stages: list[dict[str, Any]] | None = None) -> str:
    """A configuration file to add, as an option."""
    mix = [{"name": name, "path": str(sets / name), "weight": weight} for name, weight in weights.items()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"mix-{len(list(folder.glob('mix-*')))}.yaml"
    path.write_text(yaml.safe_dump({"data": {"mix": mix, "stages": stages or []}}), encoding="utf-8")
    return f"--config={path}"


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    config, data, *others = tiny_arguments(folder, Path("unused"), name, *OPTIONS, *more)
    files = [option for option in others if option.startswith("--config=")]
    assert data == "--data.path=unused"
    return [config, *files, *(option for option in others if option not in files)]


def read_by(run: RunFolder) -> list[list[tuple[str, int]]]:
    """By step, each sequence with its source."""
    return [[(name, n) for name, n in r["sequences"]] for r in read_metrics(run.metrics) if "sequences" in r]


def of_source(run: RunFolder, source: str) -> Iterator[list[int]]:
    return ([n for name, n in step if name == source] for step in read_by(run))


STAGES: list[dict[str, Any]] = [{"until_tokens": 1024, "weights": {"web": 3, "code": 1}},
          {"until_tokens": 2048, "weights": {"web": 1, "code": 1, "books": 1}, "ramp_tokens": 512},
          {"weights": {"books": 1, "web": 1}}]  # fmt: skip


def test_any_ranks_and_interruptions_read_the_same(tmp_path: Path, sets: Path) -> None:
    mix = mix_file(tmp_path, sets, {"web": 2, "code": 1, "books": 1}, STAGES)
    train(1, tmp_path, arguments(tmp_path, "whole", mix))
    whole = run_of(tmp_path, "whole")
    for ranks, until in ((2, 7), (1, 13), (4, 24)):  # past the ends of books' and code's epochs
        train(ranks, tmp_path, arguments(tmp_path, "cut", mix, f"--run.max_steps={until}"))
    cut = run_of(tmp_path, "cut")
    assert read_by(cut) == read_by(whole)
    losses = [[float(row[1]) for row in curve(run) if row[1] != "None"] for run in (whole, cut)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)

    # each source goes through its own order, whatever the stages
    consumed = dict.fromkeys(SIZES, 0)
    for step, record in enumerate(r for r in read_metrics(whole.metrics) if "sequences" in r):
        for name, size in SIZES.items():
            mine = [n for source, n in record["sequences"] if source == name]
            assert mine == sorted(windows_at(consumed[name], len(mine), size, 1337).tolist()), (step, name)
            consumed[name] += len(mine)
        assert record["source_tokens"] == {name: count * 16 for name, count in consumed.items()}
    assert not any(name == "books" for step in read_by(whole)[:8] for name, _ in step)
    assert {name for step in read_by(whole)[16:] for name, _ in step} == {"books", "web"}
    assert "data.mix: books: " in whole.log.read_text()

    # validation: each source's loss, and their mean by the weights of data.mix
    last = [record for record in read_metrics(whole.metrics) if "val_loss" in record][-1]
    by_source = last["val_loss_by_source"]
    assert list(by_source) == list(SIZES)
    assert last["val_loss"] == pytest.approx(by_source["web"] / 2 + by_source["code"] / 4 + by_source["books"] / 4)


def test_other_commands_read_a_run_of_a_mix(tmp_path: Path, sets: Path) -> None:
    mix = mix_file(tmp_path, sets, {"web": 3, "code": 1})
    train(1, tmp_path, arguments(tmp_path, "mixed", mix, "--run.max_steps=6", "--data.packing=whole_documents"))
    run = run_of(tmp_path, "mixed").path
    for command, status, words in (
        (["eval/summary.py"], 0, "unigram entropy"),
        (["eval/compare.py"], 0, "web + code"),
        (["eval/report.py"], 0, ""),
        (["eval/perplexity.py"], 2, f"give --data {sets / 'web'} or --data {sets / 'code'}"),
    ):
        done = subprocess.run(
            [sys.executable, *command, str(run)], capture_output=True, text=True, cwd=PROJECT, timeout=120
        )
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr


def test_a_branch_on_another_mix_reads_on_in_each_source(tmp_path: Path, sets: Path) -> None:
    """docs/annealing.md: a branch from before the decay, with the shipped configuration on sets of this test."""
    shipped = yaml.safe_load((PROJECT / "train" / "configs" / "anneal.yaml").read_text(encoding="utf-8"))
    weights = {source["name"]: source["weight"] for source in shipped["data"]["mix"]}
    assert list(weights) == ["web", "code", "books"] and list(shipped) == ["data"]
    decays = ("--schedule.kind=wsd", "--schedule.decay=0.5", "--run.max_steps=12")
    train(1, tmp_path, arguments(tmp_path, "trunk", f"--data.path={sets / 'web'}", *decays))
    trunk = run_of(tmp_path, "trunk")
    resume = f"--resume={trunk.checkpoints / 'step-00000006'}"
    mix = mix_file(tmp_path, sets, weights)  # not in the order of the alphabet
    more = ("--config=anneal", mix, resume, "--allow-change=data.path", *decays)
    train(2, tmp_path, arguments(tmp_path, "mixed", *more))
    mixed = run_of(tmp_path, "mixed")
    rates = [{r["step"]: r["lr"] for r in read_metrics(run.metrics) if "lr" in r} for run in (trunk, mixed)]
    assert rates[1].items() <= rates[0].items() and len(rates[1]) == 6
    read = [n for step in of_source(mixed, "web") for n in step]
    assert sorted(read) == sorted(windows_at(6 * STEP, len(read), SIZES["web"], 1337).tolist())
    assert "data.mix: web continues after its first 48 sequences" in mixed.log.read_text()
    manifest = read_checkpoint_manifest(list_checkpoints(mixed.checkpoints)[0][1])
    assert manifest["mix"]["first"] == {"web": 48, "code": 0, "books": 0}
    assert dict(manifest["mix"]["sets"])["web"] == TokenSet.open(sets / "web").identity

    # and a mix after a mix
    other = mix_file(tmp_path, sets, {"books": 1, "code": 3})
    resume = f"--resume={list_checkpoints(mixed.checkpoints)[0][1]}"
    train(1, tmp_path, arguments(tmp_path, "second", other, resume, "--allow-change=data.path", "--run.max_steps=15"))
    before = sum(len(step) for step in of_source(mixed, "code"))
    read = [n for step in of_source(run_of(tmp_path, "second"), "code") for n in step]
    assert sorted(read) == sorted(windows_at(before, len(read), SIZES["code"], 1337).tolist())


def test_what_can_t_be_mixed_is_one_line(tmp_path: Path, sets: Path) -> None:
    make_token_set(tmp_path / "other", vocab_size=40, train_tokens=400, val_tokens=100)
    both = {"web": 1.0, "code": 1.0}
    train(1, tmp_path, arguments(tmp_path, "kept", mix_file(tmp_path, sets, both), "--run.max_steps=6"))
    limited = [{"name": "code", "path": str(sets / "code"), "max_epochs": 2.5}]
    foreign = [{"name": "a", "path": str(sets / "web")}, {"name": "b", "path": str(tmp_path / "other")}]
    for name, file, words in (
        ("kept", mix_file(tmp_path, sets, {"web": 1.0, "code": 2.0}), "was trained on other data"),
        ("kept", mix_file(tmp_path, sets, {"code": 1.0, "web": 1.0}), "was trained on other data"),
        ("new", mix_file(tmp_path, sets, {"web": -1.0}), "the weights {'web': -1.0} must not be negative"),
        ("new", mix_file(tmp_path, sets, both, [{"weights": {"prose": 1.0}}]), "prose is not in data.mix (web, code)"),
        ("new", f"--data.mix={json.dumps(limited)}", "code would be read 9.60 times, max_epochs is 2.5"),
        ("new", f"--data.mix={json.dumps(foreign)}", "prepare them with one tokenizer"),
    ):
        done = train_by_path(*arguments(tmp_path, name, file, "--run.max_steps=24"))
        assert done.returncode == 2, (words, done.stderr)
        (line,) = done.stderr.splitlines()
        assert words in line
    assert not run_of(tmp_path, "new").metrics.exists()
