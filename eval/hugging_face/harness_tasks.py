"""Tasks of lm-evaluation-harness on a checkpoint that is exported for it; nothing is downloaded."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.plain_text import others_bars
from common.publish import write_json_output
from eval.generation.conversation import chat_tokenizer_of
from eval.hugging_face.export import load_plain, verify, write_files
from eval.shared.loading import Loaded, device_for


def evaluate(arguments: argparse.Namespace) -> None:
    """Run the tasks that eval/harness.py's arguments name, and print the scores. Raises UserError."""
    device = device_for(arguments.device)
    manager, names = find_tasks(arguments)
    loaded = load_plain(arguments.run, weights=arguments.weights)
    if arguments.chat:
        chat_tokenizer_of(loaded)
    with tempfile.TemporaryDirectory(prefix="longhaul-harness-") as folder:
        export(loaded, Path(folder))
        begins_contexts = loaded.tokenizer.begins_contexts
        results = run_tasks(folder, names, manager, arguments, str(device), begins_contexts=begins_contexts)
    show(loaded, results)
    if arguments.json:
        write_json_output(arguments.json, describe(loaded, results))


def find_tasks(arguments: argparse.Namespace) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names asked for. Raises UserError for a task that it doesn't know."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"  # read when the libraries are imported
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from lm_eval.tasks import TaskManager

    include = None if arguments.include_path is None else str(arguments.include_path)
    manager = TaskManager(include_path=include)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise UserError(f"lm-eval has no task {', '.join(unknown) or '(none given)'}: 'lm-eval ls tasks' lists them")
    return manager, names


def export(loaded: Loaded, folder: Path) -> None:
    """The checkpoint as `transformers` loads it, verified."""
    write_files(loaded, folder)
    verify(loaded, folder)


def run_tasks(
    folder: str,
    names: list[str],
    manager: Any,
    arguments: argparse.Namespace,
    device: str,
    *,
    begins_contexts: bool,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns.

    Args:
        begins_contexts: the tokenizer's own; else no id precedes a context, as in eval/hellaswag.py, though the
            exported tokenizer puts one before a text.

    Raises UserError where a task's data are not at hand.
    """
    import lm_eval
    from datasets.exceptions import DatasetNotFoundError

    # a template has the id itself
    opening = {} if begins_contexts and not arguments.chat else {"add_bos_token": False}
    try:
        with others_bars():
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": folder, "dtype": "float32"} | opening,
                tasks=names,
                task_manager=manager,
                num_fewshot=arguments.fewshot,
                batch_size=arguments.batch,
                device=device,
                limit=arguments.limit,
                apply_chat_template=arguments.chat,
            )
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"a task's data are not at hand and nothing is downloaded here ({reason}): load them once where there is a "
            "network, with the same HF_HOME"
        ) from None
    except (ImportError, ValueError) as error:
        raise UserError(f"lm-eval can't run {', '.join(names)}: {' '.join(str(error).split())[:300]}") from None
    assert results is not None
    return dict(results)


def show(loaded: Loaded, results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    print(f"{loaded.checkpoint}, step {loaded.manifest['step']}")
    print(make_table(results))


def describe(loaded: Loaded, results: dict[str, Any]) -> dict[str, Any]:
    """The figures as JSON, and for each task each example's answers."""
    samples = {
        task: [
            {
                "index": sample["doc_id"],
                "target": sample["target"],
                "answers": [answer[0] for answer in sample["filtered_resps"]] if _are_pairs(sample) else None,
                **{metric: sample[metric] for metric in sample.get("metrics", []) if metric in sample},
            }
            for sample in sorted(found, key=lambda sample: sample["doc_id"])
        ]
        for task, found in results.get("samples", {}).items()
    }
    return {
        **loaded.facts,
        "results": _plain(results["results"]),
        "versions": _plain(results.get("versions", {})),
        "samples": _plain(samples),
    }


def _are_pairs(sample: dict[str, Any]) -> bool:
    """Whether the answers are (log-likelihood, whether it is the greedy choice)."""
    return all(isinstance(answer, (list, tuple)) and len(answer) == 2 for answer in sample["filtered_resps"])


def _plain(value: Any) -> Any:
    """A value as JSON; what JSON lacks becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return value.item() if hasattr(value, "item") else str(value)
