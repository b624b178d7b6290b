"""Run train/pretrain.py of a version of the project, and note which of its functions run on the way.

    python tests/helpers/traced_start.py CHECKOUT RESULT.json OPTION…

Knows nothing of that version but this entry's path and `main`, and that AdamW updates. Imports nothing of the project:
the folder of the version under trace is the one that its imports find. Only the main thread is watched.
"""

import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

ENTRY = "train/pretrain.py"
ROOMS = ("common/", "data_prep/", "eval/", "model/", "train/")
TRACED_STEP = 3  # past the first steps' own work; it ends in its update, and begins after the update before it


class Trace:
    """Counts updates, and what runs before the first one and before that of TRACED_STEP."""

    def __init__(self, checkout: Path) -> None:
        self._root = f"{checkout}{os.sep}"
        self._in_main = False
        self.updates = 0
        self.frames: list[str] = []  # from main to the first update: file and function
        self.entered: set[str] = set()  # files whose functions run before the first update
        self.handed: set[str] = set()  # those of them that are given the configuration, a section, or what holds one
        self.step: set[tuple[str, str]] = set()  # file and function of TRACED_STEP
        self.readers: dict[str, set[str]] = {}  # of each value: the files that read it before the first update

    def call(self, frame: FrameType, event: str, _: Any) -> None:
        """sys.setprofile's function."""
        if event != "call" or (file := self._own_file(frame.f_code)) is None or frame.f_code.co_name.startswith("<"):
            return
        self._in_main |= file == ENTRY and frame.f_code.co_name == "main"
        if not self._in_main:
            return
        if self.updates == 0:
            self.entered.add(file)
            if any(is_or_holds_section(value) for value in arguments_of(frame)):
                self.handed.add(file)
        elif self.updates == TRACED_STEP - 1:
            self.step.add((file, frame.f_code.co_qualname))

    def read(self, value: str, frame: FrameType) -> None:
        """A value of the configuration is read by this frame."""
        if self.updates == 0 and (file := self._own_file(frame.f_code)) and not frame.f_code.co_name.startswith("<"):
            self.readers.setdefault(value, set()).add(file)

    def update(self, frame: FrameType | None) -> None:
        """AdamW is asked for an update by this frame."""
        if self.updates == 0:
            found = []
            while frame is not None and not (found and found[-1] == f"{ENTRY}: main"):
                if (file := self._own_file(frame.f_code)) is not None:
                    found.append(f"{file}: {frame.f_code.co_qualname}")
                frame = frame.f_back
            self.frames = found[::-1]
        self.updates += 1

    def _own_file(self, code: CodeType) -> str | None:
        """Where code stands in the version; None for other projects' code, and for this file."""
        file = code.co_filename.removeprefix(self._root)
        return file if file.startswith(ROOMS) else None


def watch_readers(trace: Trace) -> None:
    """Let the dataclasses that are made from now on report who reads their values, where they are sections."""
    make = dataclasses.dataclass

    def watched(kind: Any = None, **options: Any) -> Any:
        if kind is None:
            return lambda decorated: watched(decorated, **options)
        section = make(kind, **options)
        if is_section_kind(section):
            names, get = {field.name for field in dataclasses.fields(section)}, section.__getattribute__

            def read(self: Any, name: str) -> Any:
                value = get(self, name)
                if name in names and not is_section(value):
                    trace.read(f"{section.__name__}.{name}", sys._getframe(1))
                return value

            setattr(section, "__getattribute__", read)  # noqa: B010 (a type checker forbids the plain assignment)
        return section

    setattr(dataclasses, "dataclass", watched)  # noqa: B010 (likewise)


def arguments_of(frame: FrameType) -> list[Any]:
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return [frame.f_locals.get(name) for name in names]


def is_or_holds_section(value: Any) -> bool:
    return is_section(value) or any(is_section(field) for field in getattr(value, "__dict__", {}).values())


def is_section(value: Any) -> bool:
    """Whether this is the configuration or a part of it, by the names that these have in all versions."""
    return dataclasses.is_dataclass(type(value)) and is_section_kind(type(value))


def is_section_kind(kind: type) -> bool:
    return kind.__module__.startswith(("train.", "model.")) and kind.__name__.endswith(("Config", "Section"))


def main() -> int:
    checkout, result, options = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:]
    trace = Trace(checkout)
    watch_readers(trace)
    update = torch.optim.AdamW.step

    def watched_update(self: Any, *arguments: Any, **named: Any) -> Any:
        trace.update(sys._getframe(1))
        return update(self, *arguments, **named)

    torch.optim.AdamW.step = watched_update  # type: ignore[method-assign]
    sys.argv = [str(checkout / ENTRY), *options]
    sys.setprofile(trace.call)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
    found = {
        "frames": trace.frames,
        "entered": sorted(trace.entered),
        "handed": sorted(trace.handed),
        "step": sorted(trace.step),
        "readers": {value: sorted(files) for value, files in trace.readers.items()},
    }
    result.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
