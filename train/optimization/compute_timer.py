"""How long a rank computes in a step before it has to wait for others: what tells a slow rank from those that wait."""

import time

import torch


class ComputeTimer:
    """From the first forward of a step to the end of this rank's own backward.

    On CUDA it is the device's time, between two events; nobody waits for them before the step's report has come.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._started = self._ended = 0.0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._on_device else []

    def start(self) -> None:
        if self._on_device:
            self._events[0].record()
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._on_device:
            self._events[1].record()
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of the last step. Asked for once the step has been reported."""
        if self._on_device:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._ended - self._started
