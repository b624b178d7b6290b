"""The benchmark of a step: contestants that learn the same, figures that add up, failures that are rows."""

import gzip
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from model.counts import parameter_count
from tests.helpers.training import PROJECT
from train.benchmarks.contestants import build
from train.benchmarks.step_cases import CONTESTANTS, Case, Request, build_parser, read_cases
from train.benchmarks.step_figures import Row, ratios, summary, table
from train.benchmarks.step_turns import take_turns
from train.benchmarks.step_worker import Process, random_batch

CPU = torch.device("cpu")
SIZES = ["--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.vocab_size=256", "--block-size=32"]
TINY = [*SIZES, "--micro-batch=2", "--accumulation=2", "--dtype=fp32", "--device=cpu", "--threads=1", "--steps=1"]
LEARNING = [name for name in CONTESTANTS if name != "ceiling"]
KEYS = {
    "tokens_per_second_vs_textbook",
    "tokens_per_second_vs_nanogpt",
    "tokens_per_second_vs_transformers",
    "share_of_ceiling",
}


def case_of(*options: str) -> Case:
    (case,), _ = read_cases(build_parser(""), [*TINY, *options])
    return case


def bench(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    script = PROJECT / "train" / "benchmarks" / "bench_step.py"
    return subprocess.run(
        [sys.executable, str(script), *TINY, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def test_all_take_turns_and_the_ratios_are_those_of_the_rows(tmp_path: Path) -> None:
    done = bench("--turns=2", f"--json={tmp_path / 'step.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    (case,) = found["cases"]
    rows = {row["contestant"]: row for row in case["contestants"]}
    assert list(rows) == list(CONTESTANTS)
    assert found["machine"]["cores"] >= 1
    assert case["machine"] | {"dtype": "fp32", "threads": 1, "torch": torch.__version__} == case["machine"]
    for name, row in rows.items():
        assert row["error"] is None
        assert len(row["turns_seconds"]) == len(row["turns_processor_seconds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 32 / row["seconds"]["median"])
        assert row["seconds"]["minimum"] == min(row["turns_seconds"])  # of one step each
        assert row["peak_bytes"] > row["start_bytes"] / 2 > 10 << 20
        assert f"\n{name} " in done.stdout
    assert rows["longhaul"]["estimated_bytes"] > 16 * rows_of_weights()
    check_ratios(found["ratios"][case["name"]], rows)
    check_losses([rows[name] for name in LEARNING])
    assert rows["ceiling"]["last_loss"] is None


def rows_of_weights() -> int:
    return parameter_count(case_of().config.model.architecture())


def check_ratios(found: dict[str, Any], rows: dict[str, Any]) -> None:
    def paired(other: str, what: str) -> float:
        pairs = zip(rows[other][what], rows["longhaul"][what], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    assert found.keys() >= {*KEYS, "peak_memory_vs_textbook"}
    assert found["by_processor_time"].keys() == KEYS
    for key in KEYS:
        other = "ceiling" if key == "share_of_ceiling" else key.removeprefix("tokens_per_second_vs_")
        assert found[key] == pytest.approx(paired(other, "turns_seconds"))
        assert found["by_processor_time"][key] == pytest.approx(paired(other, "turns_processor_seconds"))
    peaks = rows["longhaul"]["peak_bytes"], rows["textbook"]["peak_bytes"]
    assert found["peak_memory_vs_textbook"] == pytest.approx(peaks[0] / peaks[1])


def check_losses(rows: list[dict[str, Any]]) -> None:
    """Of the same ids from the same weights, before any update and after two of them."""
    for which in ("first_loss", "last_loss"):
        losses = [row[which] for row in rows]
        assert losses == pytest.approx([losses[0]] * len(rows), abs=1e-4)
    assert rows[0]["first_loss"] != rows[0]["last_loss"]


@pytest.mark.parametrize(
    "options",
    [
        ["--preset=llama-124m"],
        ["--preset=llama-124m", "--model.tie_weights=false"],
        ["--model.mlp=gelu_exact", "--model.tie_weights=false"],
        ["--dtype=bf16"],
    ],
    ids=str,
)
def test_contestants_learn_the_same(options: list[str]) -> None:
    case = case_of(*options)
    losses = {}
    for name in LEARNING:
        process = Process(build(name, case, CPU), case, CPU)
        losses[name] = [step["loss"] for step in process.answer(Request(4))["steps"]]
    ours = losses.pop("longhaul")
    for theirs in losses.values():
        assert theirs == pytest.approx(ours, abs=1e-4 if case.config.run.dtype == "fp32" else 1e-2)


def test_who_fails_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError", encoding="utf-8")
    which = ["--contestants", "longhaul", "nanogpt", "transformers"]
    done = bench("--turns=1", "--window=8", *which, f"--json={tmp_path / 'step.json'}", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    longhaul, nanogpt, transformers = found["cases"][0]["contestants"]
    assert longhaul["error"] is None
    assert longhaul["tokens_per_second"] > 0
    assert nanogpt["error"] == "a plain GPT has no model.window 8"
    assert transformers["error"].startswith("transformers is not installed")
    assert nanogpt["error"] in done.stdout
    (ratio,) = found["ratios"].values()
    assert {ratio[key] for key in KEYS} == {None}


def test_a_process_that_dies_is_a_row() -> None:
    case = replace(case_of(), contestants=("ceiling", "textbook"), turns=2)
    answers: list[tuple[str, str]] = []
    for name, kind, answer in take_turns(case):
        answers.append((name, kind))
        if kind == "error":
            assert answer["error"] == "its process ended (signal 9, as when memory runs out)"
        if (name, kind) == ("ceiling", "warm_up"):
            processes()["ceiling"].kill()
    assert answers == [
        *[("ceiling", "facts"), ("textbook", "facts"), ("ceiling", "warm_up"), ("textbook", "warm_up")],
        *[("ceiling", "error"), ("textbook", "turn"), ("textbook", "turn")],
    ]
    assert not processes().keys() & {"ceiling", "textbook"}


def processes() -> dict[str, BaseProcess]:
    return {child.name: child for child in multiprocessing.active_children()}


def test_ratios_are_medians_of_paired_turns() -> None:
    def row(name: str, *turns: float, peak: int) -> Row:
        step: dict[str, float | None] = {"processor_seconds": 1.0, "device_seconds": None, "loss": None}
        return Row(name, peak_bytes=peak, turns=[[step | {"seconds": seconds}] for seconds in turns])

    rows = {
        "longhaul": row("longhaul", 1.0, 2.0, 4.0, peak=3),  # a machine that becomes slower
        "textbook": row("textbook", 1.5, 3.0, 6.4, peak=4),
        "ceiling": row("ceiling", 0.8, 1.8, 3.6, peak=1),
        "nanogpt": row("nanogpt", peak=1),
    }
    found = ratios(rows)
    assert found["tokens_per_second_vs_textbook"] == pytest.approx(1.5)
    assert found["share_of_ceiling"] == pytest.approx(0.9)
    assert found["peak_memory_vs_textbook"] == pytest.approx(0.75)
    assert found["by_processor_time"]["share_of_ceiling"] == pytest.approx(1.0)
    assert found["tokens_per_second_vs_nanogpt"] is None
    assert found["tokens_per_second_vs_transformers"] is None


def test_seconds_of_a_gpu() -> None:
    """By made-up events: idle time, MFU on a known device, seconds to compile."""
    step: dict[str, float | None] = {"processor_seconds": 1.0, "loss": 2.5}
    steps: list[dict[str, float | None]] = [step | {"seconds": s, "device_seconds": s - 0.5} for s in (2.0, 2.0, 4.0)]
    row = Row("longhaul", compiled=True, machine={"device": "NVIDIA H100 80GB HBM3"}, turns=[steps])
    row.warm_up_seconds, row.peak_bytes, case = [32.0], 1, case_of()
    figures = summary(row, case)
    assert figures["seconds"] == {"median": 2.0, "minimum": 2.0, "spread": 1.0}
    assert figures["device_seconds"]["median"] == 1.5
    assert figures["idle_share"] == pytest.approx(1.5 / 8)
    assert figures["compile_seconds"] == 30.0
    assert 0 < figures["mfu"] < 1
    assert "MFU" in table(case, {"longhaul": row})


def test_nanogpt_compiled_as_a_whole() -> None:
    losses = []
    for compiled in ("false", "true"):
        counters.clear()
        case = case_of("--model.n_layer=1", "--accumulation=1", f"--compile={compiled}")
        contestant = build("nanogpt", case, CPU)
        losses.append(contestant.step(random_batch(case, 0, pinned=False), 1))
        assert counters["stats"]["unique_graphs"] == (compiled == "true")
        assert contestant.compiled == (compiled == "true")
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("options", [[], ["--preset=llama-124m"], ["--model.n_kv_head=1", "--model.window=8"]], ids=str)
def test_the_ceiling_multiplies_what_a_step_must(options: list[str]) -> None:
    case = case_of(*options)
    config = case.config.model.architecture()
    step = build("ceiling", case, CPU).step
    with FlopCounterMode(display=False) as counter:
        step(random_batch(case, 0, pinned=False), 0)
    tokens, padding = case.config.batch.tokens_per_step, config.padded_vocab_size - config.vocab_size
    tables = config.block_size * config.n_embd if config.position == "learned" else 0
    vectors = sum(p.numel() for p in model_of(case).parameters() if p.dim() == 1)
    matrices = parameter_count(config) - tables - vectors + padding * config.n_embd
    window = min(config.window or 32, 32)
    keys = sum(min(position + 1, window) for position in range(32)) / 32  # that a query sees
    attention = 12 * config.n_layer * config.n_embd * keys
    assert counter.get_total_flops() == pytest.approx(tokens * (6 * matrices + attention), rel=0.005)


def model_of(case: Case) -> torch.nn.Module:
    from model.gpt import GPT

    return GPT(case.config.model.architecture())


def test_the_same_ids_for_all_and_other_ones_in_every_step() -> None:
    case = case_of("--documents")
    batch = random_batch(case, 3, pinned=False)
    assert torch.equal(batch.tokens, random_batch(case, 3, pinned=False).tokens)
    assert not torch.equal(batch.tokens, random_batch(case, 4, pinned=False).tokens)
    assert torch.equal(batch.tokens[..., 1:], batch.targets[..., :-1])
    assert batch.document_ids is not None
    assert batch.document_ids.diff(dim=-1).min() == 0
    assert batch.document_ids.diff(dim=-1).max() == 1
    assert build("longhaul", case, CPU).step(batch, 1) == pytest.approx(5.5, abs=0.2)
    with pytest.raises(UserError, match="document_mask"):
        build("textbook", case, CPU).step(batch, 1)


def test_a_trace_of_a_step(tmp_path: Path) -> None:
    case = case_of()
    process = Process(build("nanogpt", case, CPU), case, CPU)
    process.answer(Request(1, tmp_path / "step.json.gz"))
    with gzip.open(tmp_path / "step.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    assert any(event["name"] == "aten::scaled_dot_product_attention" for event in events)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--contestants=nobody"], "nobody"),
        (["--micro-batch=0"], "above zero"),
        (["--preset=llama-124m", "--config=train/configs/demo.yaml"], "give one of them"),
        (["--model.n_head=5"], "not a multiple of model.n_head"),
        (["--model.heads=5"], "unknown option --model.heads"),
        (["--resume=never"], "train/pretrain.py only"),
        (["--device=mps"], "use cpu or cuda"),
        (["--profile=no-folder"], "no-folder is not a folder"),
        (["--dtype=fp8"], "run.dtype"),
    ],
)
def test_mistakes_are_one_line(options: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        case_of(*options)


def test_cases_of_one_name_are_told_apart() -> None:
    cases, _ = read_cases(build_parser(""), [*TINY, "--micro-batch", "2", "2", "2"])
    names = [case.name for case in cases]
    assert names == [names[0], f"{names[0]}#2", f"{names[0]}#3"]


def test_the_records_cases() -> None:
    cases, _ = read_cases(build_parser(""), ["--cases", "record", "--turns=7"])
    assert {case.micro_batch for case in cases} == {8, 1}
    assert len({case.name for case in cases}) == len(cases)
    assert {case.turns for case in cases} == {7}
    assert all(case.contestants == CONTESTANTS for case in cases)
