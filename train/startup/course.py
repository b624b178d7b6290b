"""The learning rate's course over a resumed run: what its checkpoint fixes, and where a change bends it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from train.optimization.schedule import Course, WarmUp, plan_course, warm_up_from
from train.settings.sections import Config, ScheduleConfig

RECORDED = "warm_up"  # in a checkpoint's manifest
ROUNDING = 1e-9  # of the peak


@dataclass(frozen=True)
class ResumedCourse:
    """The course from a checkpoint on, lines for the log, and the changed fields that make the rate jump there."""

    course: Course
    lines: list[str]
    bent_by: list[str]


@dataclass(frozen=True)
class _Settings:
    """All that a course depends on besides the warm-up that is recorded."""

    schedule: ScheduleConfig
    lr: float
    max_steps: int

    @classmethod
    def of(cls, config: Config) -> "_Settings":
        return cls(config.schedule, config.optim.lr, config.run.max_steps)

    @classmethod
    def recorded(cls, config: Mapping[str, Any]) -> "_Settings":
        """Of a checkpoint's configuration; what an older version lacked has its default."""
        known = {item.name for item in fields(ScheduleConfig)}
        schedule = {key: value for key, value in config["schedule"].items() if key in known}
        return cls(ScheduleConfig(**schedule), config["optim"]["lr"], config["run"]["max_steps"])

    def flat(self) -> dict[str, Any]:
        schedule = {f"schedule.{key}": value for key, value in asdict(self.schedule).items()}
        return {"optim.lr": self.lr, "run.max_steps": self.max_steps, **schedule}

    def put_back(self, name: str, before: "_Settings") -> "_Settings":
        """These settings with one field as it was before."""
        section, key = name.split(".")
        if section == "schedule":
            return replace(self, schedule=replace(self.schedule, **{key: getattr(before.schedule, key)}))
        return replace(self, **{key: getattr(before, key)})

    def course(self, warm_up: WarmUp) -> Course:
        return plan_course(self.schedule, self.lr, self.max_steps, warm_up)


def warm_up_facts(course: Course) -> dict[str, Any]:
    """What every checkpoint of the run records of its warm-up."""
    return {RECORDED: asdict(course.warm_up)}


def recorded_warm_up(manifest: Mapping[str, Any]) -> WarmUp | None:
    """The warm-up that a checkpoint's run has; None for an imported one, which has had none.

    Older checkpoints record none: theirs is their configuration's fraction of their own max_steps.
    """
    if RECORDED in manifest:
        return WarmUp(manifest[RECORDED]["start"], manifest[RECORDED]["steps"])
    if "config" not in manifest:
        return None
    before = _Settings.recorded(manifest["config"])
    return warm_up_from(0, before.schedule, before.max_steps)


def plan_resumed(config: Config, manifest: Mapping[str, Any] | None, *, own: bool) -> ResumedCourse:
    """The course from a checkpoint on.

    Args:
        manifest: the checkpoint's; None for a new run.
        own: the checkpoint is this run's; False for a branch from another's.
    """
    now = _Settings.of(config)
    step = int(manifest["step"]) if manifest else 0
    warm_up = recorded_warm_up(manifest) if manifest else None
    if manifest is None or warm_up is None or step == 0:
        return ResumedCourse(now.course(warm_up_from(step, now.schedule, now.max_steps)), [], [])
    before = _Settings.recorded(manifest["config"])
    last = before.course(warm_up)
    changed = [name for name, value in now.flat().items() if value != before.flat()[name]]
    if now.schedule.rewarm and not (own and before.schedule.rewarm):
        course = now.course(warm_up_from(step, now.schedule, now.max_steps))
        line = f"schedule.rewarm: the schedule starts again after step {step}, warm-up of {course.warm_up.steps} steps"
        return ResumedCourse(course, [line, _rates(last, course, step)], [])
    course = now.course(_kept_warm_up(warm_up, step, now, before))
    lines = []
    if "schedule.warmup" in changed and course.warm_up == warm_up and step >= warm_up.end:
        lines.append(f"schedule.warmup has no effect: the warm-up was over at step {warm_up.end}")
    bent_by = []
    following = course.rate(step + 1)
    if _jumps(last, course, step):
        lines.append(_rates(last, course, step))
        one_back = {name: now.put_back(name, before) for name in changed}
        bent_by = [name for name, other in one_back.items() if _next_rate(other, warm_up, before, step) != following]
        bent_by = bent_by or changed
    # a decay that has started ends where it was to end, however little the next rate would differ
    extended = now.max_steps != before.max_steps and before.schedule.kind == now.schedule.kind == "wsd"
    if extended and last.decay_start < step and "run.max_steps" not in bent_by:
        lines += [] if lines else [_rates(last, course, step)]
        bent_by.append("run.max_steps")
    for name, line in _bends_of_muon(config, manifest["config"], last, course, step):
        bent_by.append(name)
        lines.append(line)
    return ResumedCourse(course, lines, bent_by)


def check_course(resumed: ResumedCourse, checkpoint: Path, allowed: list[str]) -> None:
    """Raises UserError where the rate of a run jumps for fields whose change is not allowed."""
    refused = [name for name in resumed.bent_by if name not in allowed]
    if refused:
        flags = " ".join(f"--allow-change {name}" for name in refused)
        raise UserError(
            f"{checkpoint}: {' and '.join(refused)} differs from the checkpoint's and bends the schedule "
            f"({resumed.lines[-1]}): put it back, give {flags}, or another --run.name to branch "
            "(docs/training.md, Extending)"
        )


def _bends_of_muon(
    config: Config, recorded: Mapping[str, Any], last: Course, course: Course, step: int
) -> list[tuple[str, str]]:
    """The fields that make the updates of muon's matrices jump while the schedule's own rate may not, each with why."""
    now, before = config.optim, recorded["optim"]
    if now.kind != "muon" or before.get("kind") != "muon":
        return []
    bends = []
    rate, last_rate = now.muon_lr or now.lr, before["muon_lr"] or before["lr"]
    if now.muon_lr != before["muon_lr"] and rate != last_rate:
        here, there = _rate(last, step) * last_rate / last.peak, course.rate(step + 1) * rate / course.peak
        words = f"muon's learning rate {here:.4g} at step {step}, {there:.4g} at step {step + 1}"
        bends.append(("optim.muon_lr", words))
    if now.muon_scale != before["muon_scale"]:
        words = f"muon's updates are scaled by {now.muon_scale}, by {before['muon_scale']} before"
        bends.append(("optim.muon_scale", words))
    return bends


def _kept_warm_up(recorded: WarmUp, step: int, now: _Settings, before: _Settings) -> WarmUp:
    """The recorded warm-up, unless it is under way and another was asked for. One that is over stays over."""
    if now.schedule.warmup == before.schedule.warmup or step >= recorded.end:
        return recorded
    return replace(recorded, steps=warm_up_from(0, now.schedule, now.max_steps).steps)


def _next_rate(settings: _Settings, recorded: WarmUp, before: _Settings, step: int) -> float:
    return settings.course(_kept_warm_up(recorded, step, settings, before)).rate(step + 1)


def _jumps(last: Course, course: Course, step: int) -> bool:
    """Whether the next rate differs from the last by more than a step moves it in either course."""
    moved = abs(course.rate(step + 1) - _rate(last, step))
    usual = max(
        abs(last.rate(step + 1) - _rate(last, step)),
        abs(course.rate(step + 1) - _rate(course, step)),
        abs(course.rate(step + 2) - course.rate(step + 1)),
    )
    return moved > usual + ROUNDING * max(last.peak, course.peak)


def _rates(last: Course, course: Course, step: int) -> str:
    rates = f"{_rate(last, step):.4g} at step {step}, {course.rate(step + 1):.4g} at step {step + 1}"
    return f"learning rate {rates}"


def _rate(course: Course, step: int) -> float:
    """The rate of a checkpoint's step; of one that was saved before its course's first step, that step's."""
    return course.rate(max(step, course.warm_up.start + 1))
