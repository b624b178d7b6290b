"""A study's queue: killed at every point it does nothing twice, loses nothing, and leaves the same results."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import UserError
from common.run_folder import RunFolder
from eval.comparison.study_output import write_report
from tests.helpers.source_code import PROJECT
from tests.helpers.study_runs import law, write_study_run
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import TINY_YAML
from train.studies.command import train_study
from train.studies.cost import describe_plan
from train.studies.planning import PlannedRun, Planner, plan
from train.studies.reading import read_results, read_study
from train.studies.study_file import read_study_file
from train.studies.study_folder import StudyFolder
from train.studies.work_queue import Slot, WorkQueue

STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": {"config": "tiny.yaml", "schedule.warmup": 0.1, "model.dropout": 0.0},
    "variants": {"base": {"budgets": [5120]}, "norm": {"model.norm": "rmsnorm"}},
    "seeds": [1, 2],
    "budgets": {"tokens": [10240]},
}


def write_study(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY_YAML, encoding="utf-8")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False), encoding="utf-8")
    return path


class Silent:
    def event(self, text: str) -> None: ...
    def show(self, queue: WorkQueue) -> None: ...


def stand_in(prepared: Path, failing: str = "-") -> Any:
    """Instead of training: notes that it was started, then leaves the folder of a finished run."""

    def command(run: PlannedRun, folder: StudyFolder) -> list[str]:
        source, target = prepared / run.name, folder.run(run.name).path
        if not source.exists():
            loss = lambda tokens: law(tokens) + 0.01 * run.seed[0]  # noqa: E731
            write_study_run(source, seed=run.seed[0], steps=run.steps, every=1, loss=loss)
            config = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
            config["optim"]["lr"] = run.choices.get("optim.lr", 1e-3)
            (source / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
            RunFolder(source).write_state("done", reason="all steps", step=run.steps, tokens=run.tokens)
            (source / "checkpoints").mkdir()
        script = f"echo {run.name} >> {prepared}/started; case {run.name} in {failing}) echo boom; exit 3;; esac; "
        return ["sh", "-c", f"{script} rm -rf {target}.new; cp -r {source} {target}.new; mv {target}.new {target}"]

    return command


def queue_of(
    path: Path, prepared: Path, failing: str = "-", jobs: int = 1, planner: Planner | None = None
) -> WorkQueue:
    folder = StudyFolder(path.parent)
    planner = planner or Planner(read_study_file(path))
    folder.fix(planner.study)
    return WorkQueue(planner, folder, [Slot({}) for _ in range(jobs)], Silent(), command=stand_in(prepared, failing))


def results_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "results").glob("*.json"))}


def work_and_die(queue: WorkQueue, calls: int) -> int:
    """`work` in a child that kills itself at its so-many-th call of what changes something; return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = calls

    def deadly(function: Any) -> Any:
        def wrapper(*values: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*values, **named)

        return wrapper

    os.replace, os.rmdir, subprocess.Popen = map(deadly, (os.replace, os.rmdir, subprocess.Popen))  # type: ignore
    os._exit(queue.work())


def test_a_queue_that_is_killed_anywhere_does_nothing_twice(tmp_path: Path) -> None:
    tuned = {"base": {"budgets": [5120]}, "norm": {"model.norm": "rmsnorm", "tune": {"optim.lr": [0.01, 0.02]}}}
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    whole = write_study(tmp_path / "whole", variants=tuned)
    assert queue_of(whole, prepared, jobs=2).work() == 0
    expected = results_of(whole.parent)
    assert len(expected) == 2 * 2 + 2 + 1  # of base's budgets, of the trials, and the chosen one's other seed
    report = json.dumps(whole_report(whole))

    (prepared / "started").unlink()
    turned = write_study(tmp_path / "killed", variants=dict(reversed(tuned.items())))
    planner = Planner(read_study_file(turned))
    plan(planner, read_results(Planner(read_study_file(whole)), StudyFolder(whole.parent))[0])  # reads all options once
    kills = 0
    for calls in range(1, 100):
        if os.WIFEXITED(work_and_die(queue_of(turned, prepared, planner=planner), 1 + calls % 4)):
            break
        kills += 1
        time.sleep(0.05)  # a run that the dead queue has just started
    assert queue_of(turned, prepared, planner=planner).work() == 0
    assert kills >= 6
    assert results_of(turned.parent) == expected
    assert json.dumps(whole_report(turned)) == report
    assert not list((turned.parent / "runs").glob("*/checkpoints"))
    started = (prepared / "started").read_text(encoding="utf-8").split()
    assert sorted(set(started)) == sorted(name.removesuffix(".json") for name in expected)


def whole_report(path: Path) -> Any:
    return write_report(read_study(path), path.parent / "report").as_json()


def test_a_failed_run_is_named_and_tried_again(tmp_path: Path) -> None:
    path, prepared = write_study(tmp_path / "study"), tmp_path / "prepared"
    prepared.mkdir()
    queue = queue_of(path, prepared, failing="norm-10.24k-s2")
    assert queue.work() == 1
    assert queue.failed == {"norm-10.24k-s2": "it ended with status 3: boom"}
    assert len(results_of(path.parent)) == 5
    failed = [run for run in read_study(path).runs if run.run is None]
    assert [(run.variant, run.seed, run.why) for run in failed] == [
        ("norm", (2, None), "failed: it ended with status 3: boom")
    ]

    (prepared / "started").unlink()
    wider = write_study(tmp_path / "study", variants=STUDY["variants"] | {"late": {"model.bias": False}})
    queue = queue_of(wider, prepared)
    planner, folder = queue.planner, queue.folder
    results, gone = read_results(planner, folder)
    text = describe_plan(*plan(planner, results, gone), results, jobs=2)
    assert "late 10.24k: 2 runs, 0 done; 20 steps, 10.2K tokens" in text and "to do: 3 runs" in text
    assert queue.work() == 0
    started = (prepared / "started").read_text(encoding="utf-8").split()
    assert sorted(started) == ["late-10.24k-s1", "late-10.24k-s2", "norm-10.24k-s2"]


def test_two_queues_do_not_train_one_run(tmp_path: Path) -> None:
    path, prepared = write_study(tmp_path / "study"), tmp_path / "prepared"
    prepared.mkdir()
    queue = queue_of(path, prepared)
    stand_in_of_all = [queue.command(run, queue.folder) for run in plan(queue.planner, {})[0]]
    child = os.fork()
    if not child:
        os._exit(queue.work())
    assert queue_of(path, prepared).work() == 0
    assert os.waitpid(child, 0)[1] == 0
    assert len((prepared / "started").read_text(encoding="utf-8").split()) == len(stand_in_of_all) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "best"}, "metric was final when its runs started, and is now best: a metric that is chosen after"),
        ({"base": STUDY["base"] | {"optim.lr": 0.5}}, "base had optim.lr 0.01 when its runs started, and now has 0.5"),
        ({"variants": {"base": {}, "norm": {"model.norm": "layernorm"}}}, "variants.norm had model.norm rmsnorm"),
        ({"name": "other"}, "holds runs of the study tiny, not other"),
    ],
)
def test_what_was_fixed_before_may_not_change(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = StudyFolder(tmp_path)
    folder.fix(read_study_file(write_study(tmp_path)))
    folder.fix(read_study_file(write_study(tmp_path, **changes)))  # nothing has been trained yet
    folder.fix(read_study_file(write_study(tmp_path)))
    folder.results.mkdir()
    (folder.results / "any.json").write_text("{}", encoding="utf-8")
    changed = write_study(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        folder.fix(read_study_file(changed))
    with pytest.raises(UserError, match=words):
        read_study(changed, tmp_path)  # as --report does
    plan_only = argparse.Namespace(study=changed, out=tmp_path, slurm=None, jobs=1, threads=1, dry_run=True)
    with pytest.raises(UserError, match=words):
        train_study(plan_only)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": [1]}, "unknown field seed: did you mean seeds?"),
        ({"seeds": []}, r"seeds.run: list should have at least 1 item"),
        ({"seeds": ["one"]}, "seeds.run.0: it is not a whole number"),
        ({"seeds": [1, 1]}, "seeds: one is given twice"),
        ({"seeds": {"run": [1, 2], "data": [1, 2]}}, "hold one of both"),
        ({"budgets": {"steps": [1]}}, "unknown field budgets.steps"),
        ({"budgets": {"tokens": [1], "flops": [1]}}, "budgets: give tokens, flops or tokens_per_parameter"),
        ({"budgets": {"tokens": [-5]}}, "budgets.tokens: -5 is not positive"),
        ({"budgets": {"tokens": ["many"]}}, "budgets.tokens.0: it is not a number"),
        ({"budgets": {"tokens": [100]}}, "budgets: 100 is less than 2 steps of 512 tokens"),
        ({"base": {"model.n_layer": 2}}, "base.config: name the configuration file"),
        ({"base": {"config": "none.yaml"}}, "none.yaml is not beside the study"),
        ({"base": STUDY["base"] | {"schedule.warmup": 3}}, "schedule.warmup is 3 steps: give a share of the run"),
        ({"base": STUDY["base"] | {"run.seed": 3}}, "base: the study sets run.seed itself"),
        ({"baseline": "no"}, "baseline: there is no variant no: use one of base, norm"),
        ({"variants": {"base": {"norm": 1}}}, "variants.base: norm is no option: use section.key"),
        ({"variants": {"base": {"model.norms": 1}}}, "unknown option --model.norms"),
        ({"variants": {"base": {}, "x": {"tune": {"optim.lr": 1}}}}, "variants.x.tune: give options with a list"),
        ({"variants": {"base": {}, "Base": {}}}, "variants.Base: another one differs in capital letters only"),
        ({"sizes": {"depth": [0]}}, "sizes.depth.0: input should be greater than 0"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError, match=words) as refused:
        plan(Planner(read_study_file(path)), {})
    assert str(refused.value).startswith(f"study {path}: ")


def test_a_dial_sets_shape_batch_rate_and_horizon(tmp_path: Path) -> None:
    sizes = {"depth": [4, 2], "width_per_layer": 16, "head_size": 16}
    base = STUDY["base"] | {"model.vocab_size": 257}
    budgets = {"tokens_per_parameter": [2, "1e1"]}
    path = write_study(tmp_path, base=base, sizes=sizes, budgets=budgets, seeds={"run": [1], "data": [7, 8]})
    planner = Planner(read_study_file(path))
    runs, _ = plan(planner, {})
    names = [run.name for run in runs if run.variant == "norm"]
    assert names == [f"norm-d{d}-{b}tpp-s1-d{s}" for d in (2, 4) for b in (2, 10) for s in (7, 8)]
    options = {run.name: set(run.options) for run in runs}
    small, large = options["norm-d2-10tpp-s1-d7"], options["norm-d4-10tpp-s1-d7"]
    assert {"--model.n_layer=4", "--model.n_embd=64", "--model.n_head=4", "--data.seed=7"} <= large
    # 10 tokens for each of 34,208 and 217,536 parameters, beside the reference's 10,240 tokens at width 32
    sequences = [round(512 * (10 * count / 10_240) ** 0.383 / 64) for count in (34_208, 217_536)]
    rates = [
        0.01 * (batch * 64 / 512) ** 0.5 * (32 / width) ** 0.5 for batch, width in zip(sequences, (32, 64), strict=True)
    ]
    for found, batch, rate in zip((small, large), sequences, rates, strict=True):
        assert {f"--batch.tokens_per_step={batch * 64}", f"--optim.lr={float(f'{rate:.4g}')}"} <= found
    assert {run.tokens for run in runs if run.size == "d2"} == {
        run.tokens for run in runs if run.size == "d2" and run.variant == "base"
    }


def test_real_runs_survive_kills_and_leave_result_files(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data")
    base = STUDY["base"] | {"data.path": str(tmp_path / "data")}
    path = write_study(tmp_path / "study", base=base, variants={"base": {}}, seeds=[1], budgets={"tokens": [51_200]})
    command = [sys.executable, str(PROJECT / "train" / "study.py"), str(path), "--jobs=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = RunFolder(tmp_path / "study" / "runs" / "base-51.2k-s1")
    queue = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    until(lambda: any(run.checkpoints.glob("step-*/checkpoint.json")))
    trainer = json.loads(run.lock.read_text(encoding="utf-8"))["pid"]
    queue.kill()
    queue.wait()
    os.kill(trainer, signal.SIGKILL)

    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started from step" in done.stdout and "all 1 runs are done" in done.stdout
    assert not run.checkpoints.exists()
    result = tmp_path / "study" / "results" / "base-51.2k-s1.json"
    assert result.stat().st_size < 50_000 and str(tmp_path / "study") not in result.read_text(encoding="utf-8")
    subprocess.run(["rm", "-rf", str(run.path)], check=True)
    found = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert "base 51.2k: 1 run, 1 done; 100 steps" in found.stdout and "to do: 0 runs" in found.stdout


def until(there: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_batch_that_grows_takes_the_steps_that_a_budget_needs(tmp_path: Path) -> None:
    grows = {"batch.warmup": [[0, 128], [1280, 512]]}
    variants = {"base": {"budgets": [5120]}, "grows": grows | {"model.norm": "rmsnorm"}}
    runs, _ = plan(Planner(read_study_file(write_study(tmp_path, variants=variants, seeds=[1]))), {})
    found = {(run.variant, run.budget): (run.steps, run.tokens) for run in runs}
    assert sorted(found.values()) == [(10, 5120), (20, 10_240), (10 + 18, 1280 + 18 * 512)]  # of 17.5 the even number
    assert [value for (variant, _), value in found.items() if variant == "grows"] == [(28, 10_496)]
