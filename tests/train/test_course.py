"""The learning rate of runs that are extended, branched and changed: it bends only where that was asked for."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest, write_checkpoint_manifest
from common.errors import UserError
from common.metrics_file import read_json_lines, read_metrics
from common.run_folder import RunFolder
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, run_of, tiny_arguments, train, train_by_path
from train.optimization.schedule import Course, plan_course
from train.settings.command_line import as_dict
from train.settings.sections import Config, OptimConfig, RunConfig, ScheduleConfig
from train.startup.course import check_course, plan_resumed, warm_up_facts

PEAK = 3e-3


def config(max_steps: int, *, lr: float = PEAK, **schedule: Any) -> Config:
    return Config(
        optim=OptimConfig(lr=lr),
        schedule=ScheduleConfig(**{"warmup": 0.1, **schedule}),
        run=RunConfig(max_steps=max_steps),
    )


def manifest(before: Config, step: int, course: Course | None = None) -> dict[str, Any]:
    """What a checkpoint says of its schedule; without a course one that was written before courses were recorded."""
    facts = warm_up_facts(course) if course else {}
    return {"step": step, "config": as_dict(before), **facts}


def test_wsd_in_its_stable_phase_is_branched_to_ten_times_the_length() -> None:
    """The warm-up is a tenth of the run at its first start: 2 steps of 20, not 20 of 200."""
    resumed = plan_resumed(config(200, kind="wsd"), manifest(config(20, kind="wsd"), 10), own=False)
    assert [resumed.course.rate(step) for step in (11, 12, 160)] == [PEAK] * 3
    assert resumed.course.rate(161) == PEAK * (0.1 + 0.9 * (1 - 1 / 40))  # the decay, a fifth, follows max_steps
    assert resumed.course.rate(200) == pytest.approx(PEAK / 10)
    assert (resumed.lines, resumed.bent_by) == ([], [])


def test_the_same_settings_give_the_same_bits() -> None:
    for kind in ("cosine", "wsd", "constant"):
        for warmup in (0, 7, 0.1):
            same = config(40, kind=kind, warmup=warmup)
            fresh = plan_course(same.schedule, PEAK, 40)
            for step in range(1, 40):
                for course in (None, fresh):
                    resumed = plan_resumed(same, manifest(same, step, course), own=True)
                    assert resumed.course == fresh
                    assert (resumed.lines, resumed.bent_by) == ([], [])
    # as the trainer computed it before courses were resolved
    cosine = plan_course(ScheduleConfig("cosine", 0.1), PEAK, 40)
    for step in range(5, 41):
        remaining = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 4) / 36)))
        assert cosine.rate(step) == PEAK * (0.1 + (1 - 0.1) * remaining)


def test_a_run_stopped_before_the_first_step_of_its_new_schedule_goes_on() -> None:
    """Its checkpoint is of the step that the warm-up begins after: there is no rate before it (an AssertionError)."""
    again = config(40, kind="cosine", warmup=5, rewarm=True)
    facts = manifest(again, 10) | {"warm_up": {"start": 10, "steps": 5}}
    for own in (True, False):
        resumed = plan_resumed(again, facts, own=own)
        assert [resumed.course.rate(step) for step in (11, 15)] == [PEAK / 5, PEAK]
        assert resumed.bent_by == []


@pytest.mark.parametrize(
    ("before", "now", "step", "names"),
    [
        (config(20), config(40), 20, ["run.max_steps"]),
        (config(20), config(40), 10, ["run.max_steps"]),
        (config(40), config(20), 10, ["run.max_steps"]),
        (config(20), config(20, lr=1e-3), 10, ["optim.lr"]),
        (config(20), config(40, lr=1e-3, decay=0.3), 10, ["optim.lr", "run.max_steps"]),
        (config(20), config(20, kind="constant"), 10, ["schedule.kind"]),
        (
            config(100, kind="wsd", decay=20),
            config(101, kind="wsd", decay=20),
            81,
            ["run.max_steps"],
        ),  # a bit of a bend
        (config(20, kind="wsd"), config(40, kind="wsd"), 18, ["run.max_steps"]),
        (config(100, warmup=20), config(100, warmup=40), 10, ["schedule.warmup"]),
        (config(20, kind="wsd"), config(40, kind="wsd"), 16, []),  # the decay would have begun with step 17
        (config(20, kind="constant"), config(10_000, kind="constant"), 1, []),
        (config(20, kind="constant"), config(20, kind="constant", warmup=15), 10, []),  # over is over
        (config(20, kind="wsd"), config(20, kind="wsd", decay=0.1, final_lr_fraction=0.0), 10, []),
        (config(100), config(100, final_lr_fraction=0.0999), 50, []),  # less than a step's course
    ],
)
def test_a_bend_is_refused_in_the_same_run_by_the_fields_that_make_it(
    before: Config, now: Config, step: int, names: list[str]
) -> None:
    resumed = plan_resumed(now, manifest(before, step), own=True)
    assert resumed.bent_by == names
    checkpoint = Path("step-1")
    if names:
        flags = " ".join(f"--allow-change {name}" for name in names)
        with pytest.raises(UserError, match=flags) as refused:
            check_course(resumed, checkpoint, names[:-1] if len(names) == 1 else [])
        last, following = plan_resumed(before, manifest(before, step), own=True).course, resumed.course
        both = f"learning rate {last.rate(step):.4g} at step {step}, {following.rate(step + 1):.4g} at step {step + 1}"
        assert both in str(refused.value)
        assert both in resumed.lines
    check_course(resumed, checkpoint, names)


def test_muon_s_own_rate_and_scale_bend_it_too() -> None:
    def muon(**options: Any) -> Config:
        return replace(config(20, kind="constant", warmup=0), optim=OptimConfig(lr=PEAK, kind="muon", **options))

    before = muon(muon_lr=0.02)
    for now, name, words in (
        (muon(muon_lr=0.03), "optim.muon_lr", "muon's learning rate 0.02 at step 10, 0.03 at step 11"),
        (muon(), "optim.muon_lr", "muon's learning rate 0.02 at step 10, 0.003 at step 11"),
        (muon(muon_lr=0.02, muon_scale="shape"), "optim.muon_scale", "scaled by shape, by rms before"),
    ):
        resumed = plan_resumed(now, manifest(before, 10), own=True)
        assert resumed.bent_by == [name]
        with pytest.raises(UserError, match=rf"{name} differs .*{words}.* --allow-change {name}"):
            check_course(resumed, Path("step-10"), [])
        check_course(resumed, Path("step-10"), [name])
    assert plan_resumed(before, manifest(before, 10), own=True).bent_by == []
    assert plan_resumed(muon(muon_lr=PEAK), manifest(muon(), 10), own=True).bent_by == []  # the same rate, spelt out


def test_a_warm_up_under_way_keeps_its_length_whatever_becomes_of_max_steps() -> None:
    first = plan_course(ScheduleConfig("constant", 0.1), PEAK, 100)
    for recorded in (None, first):
        resumed = plan_resumed(
            config(1000, kind="constant"), manifest(config(100, kind="constant"), 5, recorded), own=True
        )
        assert [resumed.course.rate(step) for step in (6, 10, 11)] == [PEAK * 6 / 10, PEAK, PEAK]
    # and again: the checkpoints of the extended run record 10 steps, not a tenth of theirs
    again = plan_resumed(
        config(5000, kind="constant"), manifest(config(1000, kind="constant"), 8, resumed.course), own=True
    )
    assert again.course.rate(9) == PEAK * 9 / 10


def test_a_new_warm_up_comes_once_and_only_when_asked_for() -> None:
    before, now = config(20), config(40, rewarm=True)
    resumed = plan_resumed(now, manifest(before, 20), own=True)
    assert resumed.bent_by == []
    assert [resumed.course.rate(step) for step in (21, 24, 40)] == pytest.approx([PEAK / 4, PEAK, PEAK / 10])
    assert "learning rate 0.0003 at step 20, 0.00075 at step 21" in resumed.lines
    again = plan_resumed(now, manifest(now, 22, resumed.course), own=True)
    assert (again.course, again.lines) == (resumed.course, [])
    without = plan_resumed(config(40), manifest(now, 22, resumed.course), own=True)  # the flag left out later
    assert (without.course, without.bent_by) == (resumed.course, [])
    branch = plan_resumed(now, manifest(now, 30, resumed.course), own=False)
    assert branch.course.warm_up.start == 30
    assert plan_resumed(now, None, own=False).course == plan_course(now.schedule, PEAK, 40)  # nothing to warm up again


def test_an_imported_checkpoint_has_had_no_warm_up() -> None:
    now = config(40)
    assert plan_resumed(now, {"step": 0}, own=False).course == plan_course(now.schedule, PEAK, 40)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=2_001, val_tokens=500)
    return folder


def rates(run: RunFolder) -> dict[int, float]:
    return {record["step"]: record["lr"] for record in read_metrics(run.metrics) if "lr" in record}


def forget_the_warm_up(run: RunFolder) -> None:
    """Make a run's checkpoints such as were written before warm-ups were recorded."""
    for _, path in list_checkpoints(run.checkpoints):
        facts = read_checkpoint_manifest(path)
        del facts["warm_up"], facts["manifest_sha256"], facts["config"]["schedule"]["rewarm"]
        write_checkpoint_manifest(path, facts)


def test_a_cosine_run_is_extended_branched_and_warmed_up_again(tmp_path: Path, data: Path) -> None:
    cosine = ("--schedule.warmup=0.2", "--run.max_steps=10")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "run", *cosine))
    run = run_of(tmp_path, "run")
    forget_the_warm_up(run)
    planned = plan_course(ScheduleConfig("cosine", 0.2), 1e-2, 10)
    assert rates(run) == {step: planned.rate(step) for step in range(1, 11)}

    longer = [*tiny_arguments(tmp_path, data, "run", *cosine), "--run.max_steps=20"]
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    refused = train_by_path(*longer)
    assert refused.returncode == 2
    bend = "learning rate 0.001 at step 10, 0.0055 at step 11"
    assert bend in refused.stderr
    assert "--allow-change run.max_steps" in refused.stderr
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before

    branch = [*longer, "--run.name=branch", f"--resume={run.checkpoints / 'step-00000010'}"]
    train(1, tmp_path, [*branch, "--run.max_steps=15", "--schedule.rewarm=true"])
    warmed = run_of(tmp_path, "branch")
    assert rates(warmed)[11] == pytest.approx(1e-2 / 3)
    train(1, tmp_path, [*longer, "--allow-change=run.max_steps"])
    assert bend in run.log.read_text()
    assert rates(run)[11] == pytest.approx(0.0055)  # a warm-up of 2 steps, not of 4


def test_a_run_that_was_warmed_up_again_resumes_to_the_bit(tmp_path: Path, data: Path) -> None:
    """It is asked for by every one of its commands, and comes once."""
    train(1, tmp_path, tiny_arguments(tmp_path, data, "trunk", "--schedule.kind=constant", "--run.max_steps=5"))
    trunk = run_of(tmp_path, "trunk").checkpoints / "step-00000005"
    wsd = ("--schedule.kind=wsd", "--schedule.warmup=4", "--schedule.decay=4", "--schedule.rewarm=true")
    again = (*wsd, "--checkpoint.every_steps=2", "--checkpoint.keep_last=9", f"--resume={trunk}")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "calm", *again, "--run.max_steps=17"))
    calm = run_of(tmp_path, "calm")
    expected = [0.25, 0.5, 0.75, *[1] * 5, 0.775, 0.55, 0.325, 0.1]
    assert list(rates(calm).values()) == pytest.approx([1e-2 * rate for rate in expected])
    stopped = run_of(tmp_path, "stopped")
    arguments = tiny_arguments(tmp_path, data, "stopped", *again, "--run.max_steps=17")
    train(1, tmp_path, arguments)
    for step in (16, 12, 6):  # killed in the decay, in the stable phase, in the warm-up
        for newer, path in list_checkpoints(stopped.checkpoints):
            if newer > step:
                shutil.rmtree(path)
        train(1, tmp_path, arguments)
    assert curve(stopped) == curve(calm)
    starts = [record["step"] for record in read_json_lines(stopped.metrics) if record.get("kind") == "start"]
    assert starts == [5, 16, 12, 6]
