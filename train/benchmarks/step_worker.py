"""A contestant's own process: it builds the contestant, then does as many steps as it is asked for, and waits."""

import platform
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.memory_errors import is_out_of_memory
from common.processes import peak_resident_bytes, resident_bytes
from model.devices import choose_device
from model.precision import resolve_dtype
from train.batches.loader import StepBatch
from train.benchmarks.contestants import Contestant, build
from train.benchmarks.step_cases import Case, Request
from train.startup.auto import set_determinism

DOCUMENTS = 4  # of a sequence on average, where there are documents at all
RESET_PEAK = "5"  # what /proc/PID/clear_refs takes for it


def serve(connection: Connection, name: str, case: Case) -> None:
    """Answer requests with figures until there are no more; what fails is the last answer."""
    try:
        torch.set_num_threads(case.threads)
        device = choose_device(case.config.run.device)
        set_determinism(case.config.run.deterministic, device)
        process = Process(build(name, case, device), case, device)
        connection.send(process.facts())
        while (request := connection.recv()) is not None:
            connection.send(process.answer(request))
    except EOFError:  # the command has ended before its time
        pass
    except Exception as error:  # of any contestant, compiler or driver: a row in the table
        connection.send({"error": describe(error)})


def describe(error: Exception) -> str:
    """One line."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())[:300]
    return f"out of memory ({text})" if is_out_of_memory(error) else f"{type(error).__name__}: {text}"


class Process:
    """The contestant, what it has learnt from so far, and the machine as it sees it."""

    def __init__(self, contestant: Contestant, case: Case, device: torch.device) -> None:
        self._contestant = contestant
        self._case = case
        self._device = device
        self._steps = 0
        self._start_bytes = reset_peak_bytes(device)

    def facts(self) -> dict[str, Any]:
        """What is known before the first step."""
        cuda = self._device.type == "cuda"
        return {
            "described": self._contestant.described,
            "compiled": self._contestant.compiled,
            "estimated_bytes": self._contestant.estimated_bytes,
            "start_bytes": self._start_bytes,
            "machine": {
                "device": torch.cuda.get_device_name(self._device) if cuda else self._device.type,
                "dtype": resolve_dtype(self._case.config.run.dtype, self._device)[0],
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            },
        }

    def answer(self, request: Request) -> dict[str, Any]:
        """The figures of each step, the last loss, and the peak so far."""
        if self._device.type == "cuda" and self._steps:  # its memory was given back: the first step takes it again
            self._step()
        done = []
        for index in range(request.steps):
            traced = request.trace if index == request.steps - 1 else None
            done.append(self._step() if traced is None else self._traced_step(traced))
        figures = {"steps": done, **self._peaks()}
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return figures

    def _step(self) -> dict[str, float | None]:
        batch = random_batch(self._case, self._steps, pinned=self._device.type == "cuda")
        self._steps += 1
        events = self._events()
        synchronise(self._device)
        started, processor = time.perf_counter(), time.process_time()
        for event in events[:1]:
            event.record()
        loss = self._contestant.step(batch, self._steps)
        for event in events[1:]:
            event.record()
        synchronise(self._device)
        return {
            "seconds": time.perf_counter() - started,
            "processor_seconds": time.process_time() - processor,
            "device_seconds": events[0].elapsed_time(events[1]) / 1000 if events else None,
            "loss": loss,
        }

    def _traced_step(self, file: Path) -> dict[str, float | None]:
        from torch.profiler import profile

        with profile() as profiler:
            figures = self._step()
        profiler.export_chrome_trace(str(file))
        return figures

    def _events(self) -> list[Any]:
        return [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._device.type == "cuda" else []

    def _peaks(self) -> dict[str, int | None]:
        if self._device.type != "cuda":
            return {"peak_bytes": peak_resident_bytes(), "peak_reserved_bytes": None}
        reserved = torch.cuda.max_memory_reserved(self._device)
        return {"peak_bytes": torch.cuda.max_memory_allocated(self._device), "peak_reserved_bytes": reserved}


def random_batch(case: Case, step: int, *, pinned: bool) -> StepBatch:
    """The same ids for every contestant, other ones in every step."""
    model, shape = case.config.model, (case.accumulation, case.micro_batch, case.config.model.block_size + 1)
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(model.vocab_size, shape, generator=generator)  # (A, M, T+1)
    parts = [ids[..., :-1].contiguous(), ids[..., 1:].contiguous()]
    if case.config.data.masks_documents:
        starts = torch.rand(parts[0].shape, generator=generator) < DOCUMENTS / model.block_size
        parts.append(starts.cumsum(dim=-1))  # (A, M, T)
    tokens, targets, *documents = (part.pin_memory() if pinned else part for part in parts)
    windows = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    count = targets.numel()
    return StepBatch(tokens, targets, documents[0] if documents else None, windows, count, count)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_bytes(device: torch.device) -> int:
    """Bytes in use before the first step; what building took at its peak counts no longer."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # no Linux, or not allowed: the peak of building counts, too
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="utf-8")
    return resident_bytes()
