"""Checks that need real runs: they learn, resume to the bit, save beside training, and meet the end of the memory."""

import re
import signal
import statistics
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.step_profile import read_step_profiles
from train.batches.plan import plan_batch
from train.benchmarks.campaign.trainers import TINY_MODEL, Trainers, last_validation, training
from train.estimates.run_memory import estimated_memory
from train.settings.command_line import read_config
from train.settings.sections import Config

SMOKE = "--config=train/configs/smoke.yaml"
GPT2 = "--config=train/configs/gpt2-124m.yaml"
SMALL = (
    "--model.block_size=256", "--model.n_layer=4", "--model.n_head=8", "--model.n_embd=512",
    "--batch.tokens_per_step=16384", "--batch.micro_batch=16",
)  # fmt: skip


def smoke(trainers: Trainers) -> dict[str, Any]:
    """smoke.yaml eager, compiled, and with two ranks on one device."""
    steps = ("--run.max_steps=6",) if trainers.tiny else ()
    started = {
        "eager": trainers.start("smoke-eager", SMOKE, "--run.compile=false", *steps),
        "two ranks": trainers.start("smoke-ranks", SMOKE, "--run.compile=false", *steps, ranks=2),
    }
    if not trainers.tiny:
        started["compiled"] = trainers.start("smoke-compiled", SMOKE, "--run.compile=true")
    found: dict[str, Any] = {"validation": {}, "errors": {}}
    for name, trainer in started.items():
        if any(codes := trainer.wait()):
            found["errors"][name] = [str(codes), *trainer.printed().splitlines()[-8:]]
        else:
            found["validation"][name] = last_validation(trainer.end_well())
    eager = found["validation"].get("eager")
    found["differences"] = {
        name: abs(loss - eager) / eager for name, loss in found["validation"].items() if eager and name != "eager"
    }
    return found


def resume(trainers: Trainers, work: Path) -> dict[str, Any]:
    """A deterministic run without interruption, beside one that is stopped in a step, then killed in a save."""
    options = (
        SMOKE, "--run.deterministic=true", "--run.max_steps=60", "--checkpoint.every_steps=20", "--eval.every_steps=0",
        *(TINY_MODEL if trainers.tiny else SMALL),
    )  # fmt: skip
    calm = trainers.start("calm", *options)
    broken = trainers.start("broken", *options, TORCHINDUCTOR_CACHE_DIR=str(work / "inductor-1"))
    stopped = broken.wait_until(broken.has_step)
    broken.send(signal.SIGTERM)
    codes = broken.wait()
    state = broken.folder.read_state() or {}
    found: dict[str, Any] = {"stopped_in_a_step": stopped, "stop": {"codes": codes, "state": state}}
    found["preempted"] = codes == [0] and state.get("status") == "preempted"

    broken = trainers.start("broken", *options, TORCHINDUCTOR_CACHE_DIR=str(work / "inductor-2"))
    found["killed_in_a_save"] = broken.wait_until(broken.is_saving)
    broken.send(signal.SIGKILL)
    broken.wait()
    found["checkpoints_after_kill"] = sorted(path.name for path in broken.folder.checkpoints.iterdir())

    broken = trainers.start("broken", *options, TORCHINDUCTOR_CACHE_DIR=str(work / "inductor-3"))
    curves = [_curve(trainer.end_well()) for trainer in (calm, broken)]
    found["steps"] = [len(curve) for curve in curves]
    found["differing_steps"] = sum(one != other for one, other in zip_longest(*curves))
    found["same_weights"] = _hashes(calm.folder.checkpoints) == _hashes(broken.folder.checkpoints)
    return found


def _curve(records: list[dict[str, Any]]) -> list[list[float]]:
    return [[record[key] for key in ("step", "loss", "grad_norm", "lr")] for record in training(records)]


def _hashes(checkpoints: Path) -> dict[str, str]:
    """SHA-256 of the newest checkpoint's files."""
    _, newest = list_checkpoints(checkpoints)[0]
    return {name: entry["sha256"] for name, entry in read_checkpoint_manifest(newest)["files"].items()}


def saves(trainers: Trainers) -> dict[str, Any]:
    """Seconds that training waits for a save beside it, and for one that it waits for."""
    found: dict[str, Any] = {}
    options = ("--run.max_steps=9", "--checkpoint.every_steps=3", "--eval.every_steps=0", "--eval.tokens=65536")
    shape = (SMOKE, *TINY_MODEL) if trainers.tiny else (GPT2, "--batch.tokens_per_step=32768", "--batch.micro_batch=16")
    for name, value in (("asynchronous", "true"), ("waited for", "false")):
        run = f"saves-{value}"
        records = trainers.train(run, *shape, *options, "--run.compile=false", f"--checkpoint.asynchronous={value}")
        rows = [record for record in records if record.get("kind") == "save"]
        blocked = [row["save_blocked_seconds"] for row in rows]
        found[name] = {"saves": rows, "blocked_seconds": statistics.median(blocked[1:])}  # the first makes its buffers
    found["ratio"] = found["asynchronous"]["blocked_seconds"] / found["waited for"]["blocked_seconds"]
    return found


def steps(trainers: Trainers, name: str, options: list[str]) -> dict[str, Any]:
    """A run's own speed and memory, how long it takes to its first step, its saves, and where its last steps went."""
    started = time.time()
    trainer = trainers.start(name, *options, "--log.every_steps=1")
    records = trainer.end_well()
    rows = training(records)
    profiles = read_step_profiles(trainer.folder)
    profiled = {step for profile in profiles for step in range(profile["first_step"], profile["last_step"] + 1)}
    counted = [row for row in rows[1:] if row["step"] not in profiled] or rows
    config, _ = read_config([f"--config={trainer.folder.config}"])
    estimate = _estimate(config)
    peak = max(row["memory_gib"] for row in rows)
    return {
        "steps": len(rows),
        "losses": [row["loss"] for row in rows],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in counted),
        "mfu": statistics.median(mfus) if (mfus := [row["mfu"] for row in counted if row["mfu"]]) else None,
        "micro_batch": config.batch.micro_batch,
        "recompute": config.recompute.mode,
        "peak_gib": peak,
        "estimated_gib": estimate,
        "peak_to_estimate": peak / estimate,
        "seconds_to_first_step": rows[0]["time"] - rows[0]["step_seconds"] - started,
        "seconds_of_first_step": rows[0]["step_seconds"],
        "saves": [record for record in records if record.get("kind") == "save"],
        "profile": profiles[-1] if profiles else None,
        "traces": [str(path) for path in trainer.folder.profile.glob("*.gz")],
    }


def _estimate(config: Config) -> float:
    """GiB."""
    plan = plan_batch(config.batch.tokens_per_step, config.model.block_size, cast(int, config.batch.micro_batch), 1)
    return estimated_memory(config, plan, "cuda" if torch.cuda.is_available() else "cpu").total / 2**30


def memory(trainers: Trainers) -> dict[str, Any]:
    """fp16 with what auto chooses, a batch that no memory holds, and a resumed run with less memory than before."""
    short = (
        GPT2, "--run.compile=false", "--eval.every_steps=0", "--eval.tokens=65536", "--checkpoint.every_steps=0",
        "--schedule.kind=constant",
    )  # fmt: skip
    rows = training(trainers.train("fp16", *short, "--run.dtype=fp16", "--run.max_steps=2"))
    found: dict[str, Any] = {"fp16_peak_gib": max(row["memory_gib"] for row in rows)}

    large = ("--batch.tokens_per_step=4194304", "--batch.micro_batch=4096", "--recompute.mode=none")
    trainer = trainers.start("large", *short, *large, "--run.max_steps=1")
    codes, printed = trainer.wait(), trainer.printed()
    line = next((line for line in reversed(printed.splitlines()) if "out of memory" in line), "")
    found |= {"large": {"codes": codes, "line": line}}
    found["names_the_options"] = codes == [2] and bool(re.search(r"batch\.micro_batch.*recompute", line))

    trainers.train("smaller", *short, "--run.max_steps=1")
    device = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info(device)
    hog = torch.empty(int(0.8 * free), dtype=torch.uint8, device=device)
    records = trainers.start("smaller", *short, "--run.max_steps=2")
    codes = records.wait()
    del hog
    lines = [line for line in records.printed().splitlines() if "earlier start chose" in line or "ran out" in line]
    found["resumed_with_less"] = codes == [0]
    found["less"] = {"codes": codes, "lines": lines, "printed": records.printed().splitlines()[-8:]}
    return found
