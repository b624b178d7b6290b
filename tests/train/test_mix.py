"""Runs over several token sets: the same for any ranks and interruptions, each source in its own order."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.errors import UserError
from common.metrics_file import read_metrics
from common.metrics_table import MetricsTable
from common.run_folder import RunFolder
from data_prep.token_sets.sequences import JoinedSequences
from data_prep.token_sets.token_mix import Source, TokenMix
from data_prep.token_sets.token_set import TokenSet
from eval.comparison.measured_runs import MeasuredRun
from eval.comparison.run_groups import find_metric
from eval.reporting.live_view import LiveRun
from eval.reporting.look import Look
from eval.reporting.run_data import load_runs
from eval.reporting.source_pictures import source_pictures
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, curve, run_of, tiny_arguments, train, train_by_path
from train.batches.mixture import MixedOrder, levels_of
from train.batches.shuffle import windows_at
from train.batches.training_sequences import training_sequences
from train.run.mirror import grouped
from train.settings.sections import Config, DataConfig, MixSource, MixStage, ModelSection
from train.startup.fit_to_data import check_epochs, fit_to_data, mix_facts, mixture_of, open_data, start_of_mix
from train.startup.position import Reading, begin_progress

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
        targets, by_source = record["source_targets"], record["train_loss_by_source"]
        assert targets == {name: 16 * sum(source == name for source, _ in record["sequences"]) for name in SIZES}
        assert set(by_source) == {name for name, count in targets.items() if count}
        assert record["loss"] == pytest.approx(sum(loss * targets[name] for name, loss in by_source.items()) / 128)
    assert not any(name == "books" for step in read_by(whole)[:8] for name, _ in step)
    assert {name for step in read_by(whole)[16:] for name, _ in step} == {"books", "web"}
    assert "data.mix: books: " in whole.log.read_text()

    # the log has each source's mean over the targets since its line before
    ended = [record for record in read_metrics(whole.metrics) if record["step"] > 20 and "lr" in record]
    of_books = [(r["train_loss_by_source"]["books"], r["source_targets"]["books"]) for r in ended]
    mean = sum(loss * count for loss, count in of_books) / sum(count for _, count in of_books)
    assert re.search(rf"step 24/24 \| loss by source: web \d+\.\d+, books {mean:.4f}\n", whole.log.read_text())

    # validation: each source's loss, and their mean by the weights of data.mix
    last = [record for record in read_metrics(whole.metrics) if "val_loss" in record][-1]
    by_source = last["val_loss_by_source"]
    assert list(by_source) == list(SIZES)
    assert last["val_loss"] == pytest.approx(by_source["web"] / 2 + by_source["code"] / 4 + by_source["books"] / 4)


def test_other_commands_read_a_run_of_a_mix(tmp_path: Path, sets: Path) -> None:
    mix = mix_file(tmp_path, sets, {"web": 3, "code": 1})
    train(1, tmp_path, arguments(tmp_path, "mixed", mix, "--run.max_steps=6", "--data.packing=whole_documents"))
    run = run_of(tmp_path, "mixed").path
    last = [record for record in read_metrics(RunFolder(run).metrics) if "val_loss" in record][-1]
    web = last["val_loss_by_source"]["web"]

    # the figures of sources in views, and as the metric of a study, also from what is kept of its runs
    measured = MeasuredRun.load(run)
    measured.write_result(tmp_path / "result.json")
    for each in (measured, MeasuredRun.load(tmp_path / "result.json")):
        assert each.value(find_metric("val_loss_by_source.web", [each])) == web
    live = LiveRun(RunFolder(run), MetricsTable(RunFolder(run).metrics))
    live.refresh()
    shown = "\n".join(live.frame(200, 30, Look(unicode=True, color=False), 0.0))
    assert re.search(rf"loss by source: web \d\.\d+, code \d\.\d+  validation: web {web:.4f}, code ", shown)
    table = live.table.losses_by_source()
    (alone,) = [
        r["train_loss_by_source"]["code"]
        for r in read_metrics(RunFolder(run).metrics)
        if r.get("step") == 6 and "lr" in r
    ]
    assert len(table["web"]) == 6 and table["code"][-1] == alone
    assert grouped(last)["val/loss_by_source/web"] == web and not any("." in name for name in grouped(last))
    (data,) = load_runs([run])
    assert list(source_pictures([data])) == ["sources.png"] and source_pictures([data, data]).keys() == {
        "sources-0.png",
        "sources-1.png",
    }

    for command, status, words in (
        (["eval/summary.py"], 0, "unigram entropy"),
        (["eval/compare.py"], 0, "web + code"),
        (["eval/report.py"], 0, "report.html"),
        (["eval/perplexity.py"], 2, f"give --data {sets / 'web'} or --data {sets / 'code'}"),
    ):
        done = subprocess.run(
            [sys.executable, *command, str(run)], capture_output=True, text=True, cwd=PROJECT, timeout=120
        )
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    assert "Loss by source" in page and "validation, code, last" in page


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
    stated = yaml.safe_load(mixed.config.read_text())["data"]["mix"]
    assert {source["name"]: source["start"] for source in stated} == {"web": 48, "code": 0, "books": 0}
    assert mixed.log.read_text().count("data.mix: [] -> [") == mixed.log.read_text().count("data.mix: [") == 1
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


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from(list(SIZES)), st.integers(1, 9), min_size=1), st.integers(0, 90)),
        min_size=1,
        max_size=6,
    )
)
def test_each_source_continues_over_any_number_of_branches(
    sets: Path, branches: list[tuple[dict[str, int], int]]
) -> None:
    """Also one that a mix between has left out; the starts, given again as config.yaml states them, are the same."""
    read, manifest, position = dict.fromkeys(SIZES, 0), None, 0
    for weights, count in branches:
        order = [[level.start, list(level.shares)] for level in levels_of([(0, weights, 0)], list(weights))]
        tokens = TokenMix([Source(name, opened(sets / name)) for name in weights], order)
        mix = [MixSource(name, str(sets / name)) for name in weights]
        config = Config(data=DataConfig(mix=mix))
        start, _ = start_of_mix(tokens, manifest, same_sequences=True, data=config.data)
        if manifest is None or manifest["data_identity"] != tokens.identity:
            position = 0
            assert {name: start.first.get(name, 0) for name in weights} == {name: read[name] for name in weights}
        stated = start.stated(config).data
        if manifest is not None:
            assert start_of_mix(tokens, manifest, same_sequences=True, data=stated)[0] == start
        if manifest is not None:
            wrong = DataConfig(mix=[replace(mix[0], start=read[mix[0].name] + 1000), *mix[1:]])
            with pytest.raises(UserError, match="leave its start out"):
                start_of_mix(tokens, manifest, same_sequences=True, data=wrong)
        order_of = mixture_of(tokens, start.first)
        assert order_of is not None
        sources, indices = order_of.at(position, count)
        for number, name in enumerate(weights):
            mine = indices[sources == number].tolist()
            assert mine == list(range(read[name], read[name] + len(mine)))
            read[name] += len(mine)
        position += count
        facts = {
            "data_identity": tokens.identity,
            "sequences": position,
            "tokens": position,
            **mix_facts(tokens, start),
        }
        manifest = json.loads(json.dumps(facts))


@functools.cache
def opened(folder: Path) -> TokenSet:
    return TokenSet.open(folder)


def test_a_given_start_is_kept_and_roll_backs_refuse_no_run(sets: Path) -> None:
    mix = [MixSource("books", str(sets / "books"), max_epochs=3.0, start=4)]
    config = Config(data=DataConfig(mix=mix), model=ModelSection(block_size=16))
    tokens = open_data(config)
    start, lines = start_of_mix(tokens, None, same_sequences=False, data=config.data)
    assert (start.first, lines) == ({"books": 4}, ["data.mix: books starts after its first 4 sequences"])
    (line,) = check_epochs(tokens, config, start.first, 20)
    assert line.endswith("144 tokens at hand, 320 planned, 2.67 epochs")
    with pytest.raises(UserError, match=r"books would be read 3\.22 times, max_epochs is 3:"):
        check_epochs(tokens, config, start.first, 25)
    (line,) = check_epochs(tokens, config, start.first, 25, passed_over=5)
    assert line.startswith("WARNING: data.mix: books: ") and "3.22 epochs" in line


def test_stages_that_lie_before_a_branch_count_from_it(sets: Path) -> None:
    """Positions of a branch begin at 0, so that no stage is before the present one; the log says so."""
    stages = [MixStage({"web": 1.0}, until_tokens=64), MixStage({"code": 1.0})]
    mix = [MixSource(name, str(sets / name)) for name in ("web", "code")]
    config = Config(data=DataConfig(mix=mix, stages=stages), model=ModelSection(block_size=16))
    tokens, trunk = open_data(config), TokenSet.open(sets / "web")
    manifest = {
        "step": 6, "tokens": 768, "sequences": 48, "data_identity": trunk.identity,
        "position_in": asdict(Reading.of(config, trunk.identity)),
    }  # fmt: skip
    progress, _ = begin_progress(manifest, Reading.of(config, tokens.identity))
    start, lines = start_of_mix(tokens, manifest, same_sequences=True, data=config.data)
    assert progress.sequences == 0 and progress.tokens == 768
    assert lines[-1] == "data.stages: until_tokens counts from here, where the run has 768 tokens"
    mixture = mixture_of(tokens, start.first)
    assert mixture is not None and mixture.at(progress.sequences, 6)[0].tolist() == [0] * 4 + [1] * 2


SOURCES = [MixSource("web", "a", 1.0), MixSource("code", "b", 0.0)]


@pytest.mark.parametrize(
    ("mix", "stages", "words"),
    [
        ([MixSource("web", "a", -1.0)], [], "must not be negative"),
        ([MixSource("web", "a", 0.0), MixSource("code", "b", 0.0)], [], "one must be above 0"),
        ([MixSource("web", "a", float("nan"))], [], "must not be negative"),
        (SOURCES, [MixStage({"web": 1.0, "code": -0.5})], "must not be negative"),
        (SOURCES, [MixStage({"web": 0.0})], "one must be above 0"),
        (SOURCES, [MixStage({})], "one must be above 0"),
        (SOURCES, [MixStage({"prose": 1.0})], "prose is not in data.mix"),
        (SOURCES, [MixStage({"web": 1.0}, 50), MixStage({"code": 1.0}, 50)], "stage 2 ends at 50"),
        (SOURCES, [MixStage({"web": 1.0}), MixStage({"code": 1.0})], "stage 1 ends at None"),
        (SOURCES, [MixStage({"web": 1.0}, 50, ramp_tokens=50)], "ramp_tokens of stage 1 is 50"),
        ([], [MixStage({"web": 1.0})], "data.mix is empty"),
        ([MixSource("web", "a"), MixSource("web", "b")], [], "has the name 'web'"),
        ([MixSource("we b", "a")], [], "has the name 'we b'"),
        ([MixSource("web", "a", start=-1)], [], "start of web is -1"),
        ([MixSource("web", "a", max_epochs=0.0)], [], "max_epochs of web is 0"),
    ],
)
def test_a_mix_that_says_nothing_is_refused(mix: list[MixSource], stages: list[MixStage], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        DataConfig(mix=mix, stages=stages)
    assert "\n" not in str(refused.value)


def test_a_source_of_one_sequence_is_read_every_time_and_one_of_less_is_refused(tmp_path: Path, sets: Path) -> None:
    tokens = make_token_set(tmp_path / "one", train_tokens=17, val_tokens=40, seed=5)
    mix = [MixSource("web", str(sets / "web")), MixSource("one", str(tmp_path / "one"))]
    config = Config(data=DataConfig(mix=mix), model=ModelSection(block_size=16))
    fitted = fit_to_data(config, open_data(config))
    sequences = training_sequences(open_data(fitted), 16, stride=None, packed=False, mask_documents=False)
    mixture = mixture_of(open_data(fitted), {})
    assert isinstance(sequences, JoinedSequences) and mixture is not None
    order = MixedOrder(mixture, {name: part.count for name, part in sequences.parts.items()}, 1)
    numbers = order.numbers(0, 20)
    assert [order.named(n) for n in numbers.tolist()].count(("one", 0)) == 10
    row = sequences.rows(numbers[numbers == SIZES["web"]][:1])
    assert row.inputs[0].tolist() == tokens.split("train").read(0, 16).tolist()

    for count, words in (
        (16, "has 16 tokens in its train split, but one sequence needs 17"),
        (0, "has no train split"),
    ):
        make_token_set(tmp_path / str(count), train_tokens=count, val_tokens=40)
        config = replace(config, data=DataConfig(mix=[mix[0], MixSource("little", str(tmp_path / str(count)))]))
        with pytest.raises(UserError, match=words):
            fit_to_data(config, open_data(config))


def test_how_a_set_is_cut_into_shards_changes_nothing(tmp_path: Path, sets: Path) -> None:
    make_token_set(tmp_path / "code", train_tokens=16 * SIZES["code"] + 1, val_tokens=140, shard_tokens=37, seed=1)
    read = []
    for folder in (sets, tmp_path):
        mix = [MixSource("web", str(sets / "web")), MixSource("code", str(folder / "code"))]
        config = Config(data=DataConfig(mix=mix), model=ModelSection(block_size=16))
        tokens = open_data(config)
        sequences = training_sequences(tokens, 16, stride=None, packed=False, mask_documents=False)
        mixture = mixture_of(tokens, {})
        assert isinstance(sequences, JoinedSequences) and mixture is not None
        order = MixedOrder(mixture, {name: part.count for name, part in sequences.parts.items()}, 1)
        read.append(sequences.rows(order.numbers(7, 60)).inputs)
    np.testing.assert_array_equal(read[0], read[1])


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
