"""The table of where the steps went, from a trace of PyTorch's profiler.

On a CPU it is the main thread's time: an operator's, less that of those inside it. On a GPU it is the device's time,
and what a kernel belongs to is decided by the operator that started it. What is computed counts first, then
communication that nothing hides, then waiting for a batch; the rest is idle: Python, and all that a GPU waits for.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from common.step_profile import PARTS, Operator, TimeByPart
from train.profiler.host_lanes import ANNOTATION, Event, Lane, Place, host_lanes, is_under_way
from train.profiler.intervals import Interval, Shares
from train.profiler.names import BACKWARD, STEP, part_of_kernel

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
STARTS_WORK = ("cuda_runtime", "cuda_driver")
LARGEST = 15  # operators or kernels that a table names
LONGEST_NAME = 120
MICROSECOND = 1e-6

Windows = list[tuple[float, float]]  # from, to in microseconds


def read_events(trace: bytes) -> list[Event]:
    """The events of a trace as it is exported. Raises ValueError where it is not whole."""
    events: list[Event] = json.loads(trace)["traceEvents"]
    return events


def tabulate(events: list[Event]) -> TimeByPart:
    """Where the time went of the steps that a trace marks. Raises ValueError for one without whole steps."""
    steps = [event for event in events if event.get("cat") == ANNOTATION and STEP.fullmatch(event["name"])]
    if not steps:
        raise ValueError("the trace has no steps")
    windows = [(event["ts"], event["ts"] + event["dur"]) for event in steps]
    lanes, tails = host_lanes(events), _tails(events, windows)
    main = [_with_tail(interval, tails) for interval in lanes[steps[0]["tid"]].intervals]
    sent = [_interval(event, "communication") for event in events if is_under_way(event)]
    kernels = [_interval(event, part) for event, part in _kernels(events, lanes, tails)]

    computed = [interval for interval in kernels or main if interval.part not in ("communication", "data")]
    sent += [interval for interval in kernels or main if interval.part == "communication"]
    shares, all_sent = Shares(windows), Shares(windows).give(sent)
    shares.give(computed)
    shown = shares.give(sent)
    shares.give(interval for interval in main if interval.part == "data")
    return _summed(shares, "device" if kernels else "main thread", hidden=max(0.0, all_sent - shown))


def _summed(shares: Shares, measured: str, *, hidden: float) -> TimeByPart:
    """The table of what has been given away. Args: hidden: microseconds of communication beside computing."""
    parts = dict.fromkeys(PARTS, 0.0)
    for (part, _), microseconds in shares.given.items():
        parts[part] += microseconds
    parts["idle"] = sum(end - start for start, end in shares.free)
    total = sum(parts.values())
    largest = sorted(shares.given.items(), key=lambda item: -item[1])[:LARGEST]
    return TimeByPart(
        measured=measured,
        seconds=total * MICROSECOND,
        parts={part: microseconds * MICROSECOND for part, microseconds in parts.items()},
        shares={part: microseconds / total if total else 0.0 for part, microseconds in parts.items()},
        hidden_communication_seconds=hidden * MICROSECOND,
        largest=[
            Operator(name=name[:LONGEST_NAME], part=part, seconds=microseconds * MICROSECOND)
            for (part, name), microseconds in largest
        ],
    )


def _tails(events: Iterable[Event], windows: Windows) -> Windows:
    """What follows on each step's last backward function: clipping, judging, updating, forgetting the gradients."""
    ends = sorted(event["ts"] + event["dur"] for event in events if event.get("name", "").startswith(BACKWARD))
    last = [ends[bisect_right(ends, stop) - 1] if ends else stop for _, stop in windows]
    return [(end if start <= end else stop, stop) for end, (start, stop) in zip(last, windows, strict=True)]


def _in_tail(time: float, part: str, tails: Windows) -> str:
    if part not in ("communication", "data"):
        for start, end in tails:
            if start <= time <= end:
                return "optimizer"
    return part


def _with_tail(interval: Interval, tails: Windows) -> Interval:
    part = _in_tail(interval.start, interval.part, tails)
    return interval if part == interval.part else interval._replace(part=part)


def _interval(event: Event, part: str) -> Interval:
    return Interval(event["ts"], event["ts"] + event["dur"], part, event["name"])


def _kernels(events: list[Event], lanes: dict[Any, Lane], tails: Windows) -> Iterable[tuple[Event, str]]:
    """What the device did, and the part of each: that of the operator that started it, else what its name tells."""
    started: dict[Any, Place] = {}  # by the number that a kernel and the call that started it have in common
    for event in events:
        if event.get("cat") in STARTS_WORK and "correlation" in event.get("args", ()):
            started[event["args"]["correlation"]] = (event["tid"], event["ts"])
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in DEVICE_WORK:
            continue
        part = part_of_kernel(event["name"])
        place = started.get(event.get("args", {}).get("correlation"))
        if part != "communication" and place is not None:
            thread, time = place
            operator = lanes[thread].at(time) if thread in lanes else None
            if operator is not None and operator.part != "elementwise":
                part = operator.part
            part = _in_tail(time, part, tails)
        yield event, part
