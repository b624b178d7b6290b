"""Count what a reader of the trainer has to go through: imports, frames, files that the configuration visits, a step.

    python tests/count_rooms.py
    python tests/count_rooms.py --compare 5fce065 --lists

- imports: project modules that `train/pretrain.py`, and `train/assemble.py` where it is there, import themselves.
- frames: functions of the project on the stack from `main` to the optimizer's first update, both ends of ours counted.
- files that the configuration visits: files with a function that is given the configuration, one of its sections, or
  an object that holds one of these, between `main` and the first update. (Beside it: all files with a function that
  runs in between.)
- readers: of one value of the configuration, the files that read it before the first update. Listed are those of the
  value with most; and of the value in the middle, where all are ordered by how many they have.
- a step: functions, and the files they are in, that run from one update to the next, without validation and saves.

All but the imports are seen in a run of a few steps, on the CPU, one process, and only in its main thread.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import CommandParser
from common.errors import exit_on_user_error
from common.paths import PROJECT
from common.publish import file_to_write, write_json_output
from tests.helpers.import_graph import imported_by, module_name
from tests.helpers.source_code import ROOMS
from tests.helpers.token_sets import make_token_set
from tests.helpers.versions import checked_out, described

TRACER = PROJECT / "tests" / "helpers" / "traced_start.py"
CONFIG = """
model: {block_size: 16, n_layer: 2, n_head: 2, n_embd: 32}
batch: {tokens_per_step: 64, micro_batch: 2}
checkpoint: {every_steps: 0}
eval: {every_steps: 0, tokens: 64, prompts: []}
run: {max_steps: 4, dtype: fp32, device: cpu, compile: false}
"""
ROWS = {
    "imports_of_pretrain": "project modules that train/pretrain.py imports",
    "imports_of_assemble": "project modules that train/assemble.py imports",
    "frames": "project frames from main to the optimizer's update",
    "visited": "files that the configuration visits before the first update",
    "entered": "files that run before the first update",
    "most_readers": "files that read the most-read value of the configuration",
    "median_readers": "files that read a value of the configuration, median",
    "step_functions": "functions that one step runs",
    "step_files": "files that these are in",
}


def count(checkout: Path) -> dict[str, list[str] | None]:
    """Everything that is counted of a version, by name; None of a file that is not there.

    Raises RuntimeError where its trainer fails.
    """
    found = traced(checkout)
    readers = sorted(found["readers"].values(), key=len)
    return {
        "imports_of_pretrain": imports(checkout, Path("train/pretrain.py")),
        "imports_of_assemble": imports(checkout, Path("train/assemble.py")),
        "frames": found["frames"],
        "visited": found["handed"],
        "entered": found["entered"],
        "most_readers": readers[-1],
        "median_readers": readers[len(readers) // 2],
        "step_functions": [f"{file}: {function}" for file, function in found["step"]],
        "step_files": sorted({file for file, _ in found["step"]}),
    }


def imports(checkout: Path, path: Path) -> list[str] | None:
    """Modules of the version that one of its files imports itself, but for what every command starts with."""
    if not (checkout / path).is_file():
        return None
    files = (file.relative_to(checkout) for room in ROOMS for file in (checkout / room).rglob("*.py"))
    modules = {module_name(file) for file in files}
    tree = ast.parse((checkout / path).read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "__package__" in ast.unparse(node.test))
    ]
    return sorted(modules & set(imported_by(tree, path, modules)))


def traced(checkout: Path) -> dict[str, Any]:
    """What traced_start.py notes of a run of this version."""
    with tempfile.TemporaryDirectory(prefix="count-rooms-") as name:
        folder = Path(name)
        make_token_set(folder / "tokens", train_tokens=2_000, val_tokens=200)
        (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
        options = [f"--config={folder / 'config.yaml'}", f"--data.path={folder / 'tokens'}", f"--run.root={folder}"]
        done = subprocess.run(
            [sys.executable, str(TRACER), str(checkout), str(folder / "result.json"), *options],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        if done.returncode != 0:
            raise RuntimeError(f"train/pretrain.py of {checkout} failed under trace:\n{done.stdout}{done.stderr}")
        found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def table(versions: dict[str, dict[str, list[str] | None]]) -> list[str]:
    width = max(map(len, ROWS.values()))
    lines = [" " * width + "".join(f"  {name:>8}" for name in versions)]
    for key, title in ROWS.items():
        sizes = ("-" if (names := counted[key]) is None else str(len(names)) for counted in versions.values())
        lines.append(f"{title:<{width}}" + "".join(f"  {size:>8}" for size in sizes))
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--compare", metavar="VERSION", help="a folder of the project, or a git revision: count it, too"
    )
    parser.add_argument("--lists", action="store_true", help="print what was counted, of this version, below the table")
    parser.add_argument("--json", type=file_to_write, help="what was counted, of both, as JSON")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    with ExitStack() as stack:
        checkouts = {"this": PROJECT}
        if arguments.compare:
            checkouts["other"] = stack.enter_context(checked_out(arguments.compare))
        versions = {name: count(checkout) for name, checkout in checkouts.items()}
        facts = {name: described(checkout) for name, checkout in checkouts.items()}
    print("\n".join(table(versions)))
    if arguments.lists:
        for key, title in ROWS.items():
            print(f"\n{title}:", *(versions["this"][key] or ["(not there)"]), sep="\n  ")
    if arguments.json is not None:
        write_json_output(arguments.json, {name: facts[name] | versions[name] for name in versions})
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
