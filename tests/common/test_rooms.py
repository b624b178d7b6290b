"""The layout: imports one way and in no ring, names that are nobody else's, empty packages, entries where they were."""

import ast
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.helpers.import_graph import Arrow, arrows, cycle, module_name, outside_imports
from tests.helpers.source_code import PROJECT, product_code

# Each row may import the rows above it, nothing beside it.
ROOMS = (("common",), ("model", "data_prep", "setup"), ("eval",), ("train",), ("slurm", "docs", "longhaul"))
NEVER = {("slurm", "eval")}
INSIDE_TRAIN = (
    ("settings", "batches", "errors", "progress"),
    ("objectives",),
    ("optimization", "stopping"),
    ("run",),
    ("evaluations", "checkpoints", "layer_statistics", "profiler"),
    ("bad_steps", "estimates"),
    ("trainer", "startup"),
    ("assemble", "restore"),
    ("pretrain",),
    ("finetune",),
)
# What stands beside that order, and what of train/ each may import.
BESIDE = {
    "launching": {"stopping"},
    "launch": {"launching", "stopping"},
    "sync_tensorboard": {"run"},
    "sync_wandb": {"run"},
    "studies": {"settings"},
    "study": {"studies"},
    "plan": {"settings", "estimates", "startup", "finetune"},
    "benchmarks": {
        "settings",
        "batches",
        "progress",
        "objectives",
        "optimization",
        "checkpoints",
        "startup",
        "estimates",
    },
}
# The commands that README.md and docs/ show.
ENTRIES = [
    "data_prep/conversations.py", "data_prep/docstrings.py", "data_prep/fineweb.py", "data_prep/inspect_shards.py",
    "data_prep/train_tokenizer.py", "data_prep/contamination.py", "data_prep/hub_dataset.py",
    "data_prep/preferences.py", "data_prep/prepare_offline.py", "data_prep/prompts.py", "data_prep/shakespeare.py",
    "data_prep/text_files.py", "data_prep/verify.py",
    "data_prep/benchmarks/bench_prepare.py", "eval/average.py", "eval/chat.py", "eval/compare.py",
    "eval/export_gguf.py", "eval/export_hf.py",
    "eval/generate.py", "eval/harness.py", "eval/hellaswag.py", "eval/import_hf.py", "eval/perplexity.py",
    "eval/reward.py",
    "eval/plot_loss.py", "eval/report.py", "eval/summary.py", "eval/watch.py", "eval/benchmarks/bench_generate.py",
    "train/pretrain.py", "train/finetune.py", "train/launch.py", "train/plan.py", "train/study.py",
    "train/sync_tensorboard.py", "train/sync_wandb.py",
    "train/benchmarks/bench_checkpoint.py", "train/benchmarks/bench_loader.py",
    "slurm/submit.py", "slurm/status.py", "slurm/124m.sh", "slurm/355m.sh",
    "slurm/774m.sh", "slurm/1p3b.sh", "setup/completion.py", "setup/environment.py",
    "setup/pin_packages.py", "docs/write_options.py",
    "tests/chaos/run.py", "tests/fuzz/campaign.py", "tests/same_run.py", "tests/count_rooms.py",
    "tests/chaos/freezes.py", "tests/chaos/alarms.py",
    "records/2026-11-22-tiny-shakespeare/regenerate.py", "eval/benchmarks/bench_hellaswag.py",
    "train/benchmarks/bench_step.py", "train/benchmarks/gpu_campaign.py",
]  # fmt: skip

CODE = list(product_code())
ARROWS = arrows(CODE)


def wrong_between_rooms(found: Iterable[Arrow]) -> set[Arrow]:
    level = {room: number for number, row in enumerate(ROOMS) for room in row}
    rooms = {arrow: (arrow[0].split(".")[0], arrow[1].split(".")[0]) for arrow in found}
    return {
        arrow
        for arrow, (one, other) in rooms.items()
        if one != other
        and (one not in level or other not in level or level[other] >= level[one] or (one, other) in NEVER)
    }


def wrong_inside_train(found: Iterable[Arrow]) -> set[Arrow]:
    level = {part: number for number, row in enumerate(INSIDE_TRAIN) for part in row}
    wrong = set()
    for arrow in found:
        if arrow[0].startswith("train.") and arrow[1].startswith("train."):
            one, other = (name.split(".")[1] for name in arrow)
            allowed = other in BESIDE[one] if one in BESIDE else level.get(other, sys.maxsize) < level[one]
            if one != other and not allowed:
                wrong.add(arrow)
    return wrong


def test_rooms_import_one_way() -> None:
    assert wrong_between_rooms(ARROWS) == set()


def test_train_imports_one_way() -> None:
    parts = {Path(path.parts[1]).stem for path, _ in CODE if path.parts[0] == "train"}
    planned = {part for row in INSIDE_TRAIN for part in row} | BESIDE.keys()

    assert parts - {"__init__"} <= planned, "a new part of train/ needs a place in the order"
    assert wrong_inside_train(ARROWS) == set()


def test_no_modules_import_each_other() -> None:
    assert cycle(ARROWS) is None


def test_no_library_imports_a_command() -> None:
    commands = {module_name(path) for path, tree in CODE if is_command(tree)}

    found = {(one, other) for one, other in ARROWS if other in commands and one not in commands}

    assert found == set()


def test_rooms_that_need_no_torch_import_none() -> None:
    without = [(path, tree) for path, tree in CODE if path.parts[0] in ("common", "data_prep", "setup")]

    assert [str(path) for path, tree in without if "torch" in outside_imports(tree)] == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("common/paths.py", "import model.gpt"),
        ("model/gpt.py", "from data_prep import verify"),
        ("data_prep/verify.py", "def later():\n    from model.gpt import GPT"),
        ("eval/report.py", "import train.pretrain as p"),
        ("train/trainer.py", "from slurm.submit import main"),
        ("slurm/submit.py", "from eval import report"),
        ("setup/pins.py", "from model.config import PRESETS"),
        ("common/paths.py", "import docs.write_options"),
    ],
)
def test_an_upward_arrow_between_rooms_is_found(file: str, text: str) -> None:
    planted = planted_in(file, text)

    assert len(wrong_between_rooms(planted)) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train/settings/sections.py", "from train.batches.plan import plan_batch"),
        ("train/optimization/step.py", "from train.stopping import deadline"),
        ("train/stopping/deadline.py", "from ..run.lock import RunLock"),
        ("train/run/lock.py", "if TYPE_CHECKING:\n    import train.checkpoints.writer"),
        ("train/checkpoints/writer.py", "from train.trainer import TrainingLoop"),
        ("train/startup/auto.py", "from train import trainer"),
        ("train/trainer.py", "import train.pretrain"),
        ("train/pretrain.py", "from train.finetune import main"),
        ("train/launching/launch_options.py", "import train.run.lock"),
    ],
)
def test_an_upward_arrow_inside_train_is_found(file: str, text: str) -> None:
    planted = planted_in(file, text)

    assert len(wrong_inside_train(planted)) == 1


def test_a_ring_is_found() -> None:
    planted = arrows([
        (Path("eval/one.py"), ast.parse("from eval import two, report")),
        (Path("eval/two.py"), ast.parse("def later():\n    import eval.three")),
        (Path("eval/three.py"), ast.parse("from .one import name")),
        (Path("eval/report.py"), ast.parse("import json")),
    ])  # fmt: skip

    assert cycle(planted) == ["eval.one", "eval.two", "eval.three", "eval.one"]
    assert cycle(planted - {("eval.three", "eval.one")}) is None
    assert cycle(ARROWS | {("common.paths", "train.pretrain")}) is not None


def planted_in(file: str, text: str) -> set[Arrow]:
    """The project's arrows with some text at the end of one of its files."""
    added = ast.parse(text)
    assert any(str(path) == file for path, _ in CODE), file
    return arrows((path, ast.Module(tree.body + added.body, []) if str(path) == file else tree) for path, tree in CODE)


def test_no_module_is_named_like_one_of_others() -> None:
    own = {part.removesuffix(".py") for path in python_files() for part in path.parts} - {"__init__"}

    assert own & taken_names() == set()
    assert {"signal", "queue", "profile"} <= taken_names()  # of the standard library
    assert {"requests", "tokenizers", "yaml", "wandb", "safetensors"} <= taken_names()  # of packages, as imported


def taken_names() -> set[str]:
    """Names that `import` finds elsewhere: the standard library, and the packages of constraints.txt."""
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {plain(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    imported = {name for name, packages in packages_distributions().items() if pins & {plain(p) for p in packages}}
    return set(sys.stdlib_module_names) | pins | imported


def plain(package: str) -> str:
    return re.sub(r"[-_.]+", "_", package.strip()).lower()


def python_files() -> list[Path]:
    rooms = [*(room for row in ROOMS for room in row), "setup", "tests", "records"]
    return [path.relative_to(PROJECT) for room in rooms for path in sorted((PROJECT / room).rglob("*.py"))]


def test_packages_are_empty() -> None:
    assert [
        str(path) for path in python_files() if path.name == "__init__.py" and (PROJECT / path).stat().st_size
    ] == []


def test_every_documented_command_stands_at_its_path() -> None:
    commands = {path.as_posix() for path in python_files() if is_command(parsed(path))}
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
    shown = set(re.findall(r"[\w-]+(?:/[\w-]+)+\.(?:py|sh)\b", "".join(p.read_text(encoding="utf-8") for p in pages)))

    assert {path for path in ENTRIES if path.endswith(".py")} <= commands
    assert [path for path in ENTRIES if not (PROJECT / path).is_file()] == []
    assert [path for path in ENTRIES if path not in shown] == []
    assert shown & commands - set(ENTRIES) <= {"slurm/requeue.py", "tests/chaos/victim.py"}  # which nobody types


def parsed(path: Path) -> ast.Module:
    return ast.parse((PROJECT / path).read_text(encoding="utf-8"))


def is_command(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
