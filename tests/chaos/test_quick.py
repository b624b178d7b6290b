"""A quick part of the fault campaign, and the harness's own judgement.

The whole campaign: python tests/chaos/run.py --faults 220 --seed 1
"""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from common.run_folder import RunFolder
from tests.chaos import freezes, plan, spikes
from tests.chaos.faults import why_not_hung
from tests.chaos.phases import BEFORE_CONFIGURATION, FIRST_RANK_ONLY, MORE_ENTRIES, PHASES, Trap
from tests.chaos.verdict import by_step, compare, compare_closely
from tests.chaos.victim import WRAPPED, HookGone, wrap

PROJECT = Path(__file__).resolve().parents[2]
QUICK_FAULTS, QUICK_SEED = 12, 48

linux = pytest.mark.skipif(sys.platform != "linux", reason="the harness reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dozen_faults_cost_nothing_but_steps_to_do_again(tmp_path: Path) -> None:
    report = tmp_path / "chaos.json"
    done = subprocess.run(
        [
            sys.executable,
            str(PROJECT / "tests" / "chaos" / "run.py"),
            f"--faults={QUICK_FAULTS}",
            f"--seed={QUICK_SEED}",
            f"--json={report}",
            f"--folder={tmp_path / 'chaos'}",
            "--executed-share=0",
            "--mix",
            "--option=optim.kind=muon",  # whose part for embeddings, norms and biases is AdamW
            "--option=optim.shard=true",
            f"--without={plan.WANDB_SILENT}",
            f"--without={plan.WANDB_STOPPED}",
            f"--without={plan.FREEZE}",  # a minute each; tests/train/test_hangs.py has some
        ],
        env={name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert (found["faults"], found["differing_steps"], found["lost_runs"]) == (QUICK_FAULTS, 0, 0)
    for row in found["rows"]:
        assert row["complaint"] == ""
        assert row["steps_lost"] is not None and row["seconds_to_detect"] >= 0
    assert len({row["phase"] for row in found["rows"]}) >= 5


def test_two_hundred_faults_hold_ten_kills_in_each_phase_and_everything_else() -> None:
    faults = plan.draw(200, seed=1)
    assert len(faults) == 200
    kills = Counter(fault.phase for fault in faults if fault.kind == plan.KILL)
    assert set(kills) == set(PHASES) and min(kills.values()) >= 10
    drawn = plan.draw(100, seed=1, ranks=(1, 2, 3, 4))
    hit = {(fault.ranks, fault.trap.rank) for fault in drawn if fault.trap}
    assert hit == {(ranks, rank) for ranks in (1, 2, 3, 4) for rank in range(ranks)}
    for phase in PHASES:
        targets = {fault.target for fault in faults if fault.kind == plan.KILL and fault.phase == phase}
        assert targets == {plan.ONE_RANK, plan.LAUNCHER, plan.ALL}
    kinds = {(fault.kind, fault.target) for fault in faults}
    for name in plan.SIGNALS:
        assert {(name, plan.ONE_RANK), (name, plan.ALL_RANKS), (name, plan.LAUNCHER)} <= kinds
    assert {kind for kind, _ in kinds} == {kind for kind, _ in plan.WEIGHTS}


def test_the_plan_is_the_seeds() -> None:
    assert plan.draw(50, seed=1) == plan.draw(50, seed=1)
    assert plan.draw(50, seed=1) != plan.draw(50, seed=2)
    assert {fault.kind for fault in plan.draw(9, seed=1, only={plan.KILL})} == {plan.KILL}
    assert plan.DISK_FULL not in {fault.kind for fault in plan.draw(200, seed=1, without={plan.DISK_FULL})}


def test_fifty_freezes_hit_both_ranks_in_every_phase() -> None:
    drawn = freezes.draw(50, seed=1)
    assert [freeze.number for freeze in sorted(drawn, key=lambda freeze: freeze.number)] == list(range(1, 51))
    hit = Counter((freeze.phase, freeze.rank) for freeze in drawn)
    for phase in (*PHASES, *MORE_ENTRIES):
        assert all(hit[phase, rank] >= 2 for rank in ((0,) if phase in FIRST_RANK_ONLY else (0, 1)))
    early = [freeze for freeze in drawn if freeze.phase == "start" and freeze.entry <= BEFORE_CONFIGURATION]
    assert {freeze.rank for freeze in early} == {0, 1} and drawn[: len(early)] == early


HUNG = "WARNING: training hangs, and waits for: rank 1 on node7, …\nfailed: hung for 25 s: rank 1 on node7, …\n"
STATE = {"status": "failed", "failure": "hung", "reason": "hung for 25 s: rank 1 on node7, …"}


@pytest.mark.parametrize(
    ("said", "state", "words"),
    [
        (HUNG, STATE, ""),
        (HUNG.splitlines()[0], STATE, "the run was not ended for rank 1"),
        (HUNG.replace("rank 1", "rank 0"), STATE, "rank 1 was not named"),
        (HUNG, {**STATE, "failure": "lost_rank"}, "state is failed, lost_rank (hung for 25 s: rank 1 on node7, …)"),
        (HUNG, {**STATE, "reason": "hung for 25 s: no rank"}, "state is failed, hung (hung for 25 s: no rank)"),
    ],
)
def test_a_frozen_rank_must_be_named_and_ended(said: str, state: dict[str, str], words: str) -> None:
    assert why_not_hung(1, said, state, watched_by_peers=True) == words


@pytest.mark.parametrize("phase", WRAPPED)
def test_every_trap_finds_the_functions_it_wraps(phase: str) -> None:
    for module, owner, name in WRAPPED[phase]:
        place = importlib.import_module(module)
        assert callable(getattr(getattr(place, owner) if owner else place, name))


def test_spikes_find_the_functions_they_wrap() -> None:
    found = []

    def look(module: str, owner: str | None, name: str, wrapper: object) -> None:
        found.append(getattr(getattr(importlib.import_module(module), str(owner)), name))

    spikes.plant(look)
    assert len(found) == 2 and all(map(callable, found))


def test_a_function_that_is_gone_is_no_silent_miss() -> None:
    with pytest.raises(HookGone, match=r"train\.checkpoints\.writer\.save_nothing"):
        wrap("train.checkpoints.writer", None, "save_nothing", lambda original: original)


def test_a_trap_survives_the_environment() -> None:
    trap = Trap(1, "write", 3, "after")
    assert Trap.from_json(trap.to_json()) == trap


def write_run(folder: Path, lines: list[dict[str, object]]) -> RunFolder:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFolder(folder)


CALM: list[dict[str, object]] = [
    {"step": 1, "loss": 5.0, "lr": 0.1},
    {"step": 2, "loss": 4.0, "lr": 0.1},
    {"step": 2, "val_loss": 4.5, "val_tokens": 8},
]


@pytest.mark.parametrize(
    ("lines", "differing"),
    [
        (CALM, []),
        ([CALM[0], CALM[1], {"kind": "start", "step": 0}, *CALM], []),  # gone back, and the same again
        ([CALM[0], {**CALM[1], "loss": 4.0000000000000009}, CALM[2]], [2]),
        ([{**CALM[0], "loss": 5.1}, {"kind": "start", "step": 0}, *CALM], [1]),  # superseded, but was another step
        (CALM[:2], [2]),
        (CALM[1:], [1]),
        ([*CALM, {"step": 3, "loss": 3.0, "lr": 0.1}], [3]),
        ([CALM[0], CALM[1], {**CALM[2], "val_loss": 4.6}], [2]),
    ],
)
def test_a_step_that_differs_in_the_last_bit_counts(
    tmp_path: Path, lines: list[dict[str, object]], differing: list[int]
) -> None:
    calm, run = write_run(tmp_path / "calm", CALM), write_run(tmp_path / "run", lines)
    assert compare(calm, run).differing_steps == differing
    assert not compare(calm, run).same_parameters  # there is no checkpoint to tell
    assert by_step(CALM).keys() == {1, 2}


@pytest.mark.parametrize(
    ("lines", "differing"),
    [
        ([CALM[0], CALM[1], {"kind": "start", "step": 0}, *CALM], []),
        ([CALM[0], {**CALM[1], "loss": 4.000004}, CALM[2]], []),
        ([CALM[0], {**CALM[1], "loss": 4.0004}, CALM[2]], [2]),
        ([CALM[0], CALM[1], {**CALM[2], "val_loss": None}], [2]),
        ([{**CALM[0], "sequences": [1]}, {"kind": "start", "step": 0}, *CALM], [1]),  # superseded, but read otherwise
        (CALM[:2], [2]),
        ([*CALM, {"step": 3, "loss": 3.0, "lr": 0.1}], [3]),
    ],
)
def test_other_ranks_may_differ_by_rounding_but_not_in_what_they_read(
    tmp_path: Path, lines: list[dict[str, object]], differing: list[int]
) -> None:
    calm, run = write_run(tmp_path / "calm", CALM), write_run(tmp_path / "run", lines)
    assert compare_closely(calm, run).differing_steps == differing
