"""State of every form is saved, sized and read by its declaration; another optimizer's is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint_files import (
    BadCheckpoint,
    list_checkpoints,
    read_checkpoint_manifest,
    verify_checkpoint,
    write_checkpoint_manifest,
)
from common.errors import UserError
from model.config import preset_config
from model.counts import Shape
from model.gpt import GPT
from model.ranks import start_ranks
from model.weights import load_model, read_tensors
from tests.helpers.manifests import FACTS
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import run_of, tiny_arguments, train, train_by_path
from tests.model.small import small_model
from train.checkpoints.ownership import checkpoint_bytes, optimizer_tensors
from train.checkpoints.reader import load_training_state
from train.checkpoints.retention import keep_weights
from train.checkpoints.writer import CheckpointWriter
from train.estimates.run_memory import optimizer_bytes
from train.optimization.declared_state import ADAMW, OptimizerState, StateTensor
from train.optimization.optimizer_state import DECLARED, shapes_of, state_of
from train.progress import Progress
from train.settings.sections import Config, FinetuneConfig, ModelSection


class Factored(torch.optim.Optimizer):
    """Adafactor's way: of a matrix the means of squares by row and by column, a whole number of steps; else nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad
                if parameter.dim() == 2:
                    state = self.state[parameter]
                    if not state:
                        state["count"] = torch.zeros((), dtype=torch.int64)
                        state["row"] = parameter.new_zeros(parameter.shape[0])
                        state["column"] = parameter.new_zeros(parameter.shape[1], dtype=torch.bfloat16)
                    state["count"] += 1
                    state["row"].lerp_(update.square().mean(1), 0.1)
                    state["column"].lerp_(update.square().mean(0).bfloat16(), 0.1)
                    scale = state["row"][:, None] * state["column"].float() / state["row"].mean()
                    update = update / scale.sqrt() / state["count"]
                parameter.sub_(update, alpha=0.01)


def kept_by_factored(name: str, shape: Shape) -> dict[str, StateTensor]:
    if len(shape) != 2:
        return {}
    return {
        "count": StateTensor((), "int64", non_negative=True, is_count=True),
        "row": StateTensor(shape[:1], non_negative=True),
        "column": StateTensor(shape[1:], "bfloat16", non_negative=True),
    }


KINDS: dict[str, tuple[Any, OptimizerState]] = {
    "factored": (Factored, OptimizerState("factored", kept_by_factored)),
    "sgd": (torch.optim.SGD, OptimizerState("sgd", lambda name, shape: {})),
    "adamw": (torch.optim.AdamW, ADAMW),
}


def declare() -> None:
    """In a rank's process."""
    DECLARED.update(dict(KINDS.values()))


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    for optimizer, state in KINDS.values():
        monkeypatch.setitem(DECLARED, optimizer, state)


def stepped(kind: str, steps: int, seed: int = 0) -> tuple[GPT, torch.optim.Optimizer]:
    """A small model after some steps of an optimizer, with gradients that depend on the step's number only."""
    model = small_model(seed)
    optimizer = KINDS[kind][0](model.parameters())
    for step in range(steps):
        learn(model, optimizer, step)
    return model, optimizer


def learn(model: GPT, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def save_as_rank(folder: Path, kind: str) -> None:
    declare()
    ranks = start_ranks("cpu")
    CheckpointWriter(folder, ranks, *stepped(kind, 2)).save(Progress(2), FACTS)
    ranks.close()


def exactly(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, bytes]]:
    """Kind and bits of all weights and state, by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | optimizer_tensors(model, optimizer)
    return {
        name: (str(t.dtype), t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()
    }


def resume_as_rank(checkpoint: Path, kind: str) -> dict[str, tuple[str, bytes]]:
    """Resume from a checkpoint and go one step further."""
    declare()
    ranks = start_ranks("cpu")
    model, optimizer = stepped(kind, 0, seed=1)
    progress = load_training_state(checkpoint, model, optimizer)
    learn(model, optimizer, progress.step)
    ranks.close()
    return exactly(model, optimizer)


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_state_of_every_form_is_resumed_at_any_number_of_ranks(
    tmp_path: Path, kind: str, writers: int, readers: int
) -> None:
    run_ranks(writers, tmp_path / "store", save_as_rank, tmp_path / "checkpoints", kind)
    [(_, checkpoint)] = list_checkpoints(tmp_path / "checkpoints")
    assert len(list(checkpoint.glob("optimizer-*"))) == writers
    undisturbed = exactly(*stepped(kind, 3))
    assert any("/" in name for name in undisturbed) is (kind != "sgd")
    assert run_ranks(readers, tmp_path / "store", resume_as_rank, checkpoint, kind) == [undisturbed] * readers


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_takes_the_declared_bytes(tmp_path: Path, kind: str) -> None:
    told = checkpoint_bytes(*stepped(kind, 0))
    model, optimizer = stepped(kind, 1)
    checkpoint = CheckpointWriter(tmp_path, start_ranks("cpu"), model, optimizer).save(Progress(1), FACTS)
    tensors = 4 * len(list(model.parameters()))
    taken = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert told[0] - 65_536 - 256 * tensors < taken <= told[0]
    kept = read_tensors(checkpoint.glob("optimizer-*"))
    assert state_of(optimizer).nbytes(shapes_of(model.named_parameters())) == sum(t.nbytes for t in kept.values())


def test_adamws_bytes_are_two_moments_and_a_count() -> None:
    padded = 124_439_808 + 47 * 768
    tensors = sum(1 for _ in GPT(preset_config("gpt2-124m")).parameters())
    assert optimizer_bytes(Config()) == 8 * padded + 4 * tensors
    adapted = FinetuneConfig(model=ModelSection(n_layer=3, n_head=2, n_embd=8))
    trained = adapted.adapter_count()
    assert trained is not None
    assert optimizer_bytes(adapted) == 8 * trained + 4 * 3 * 4 * 2  # two tensors for each of 4 matrices in 3 blocks


def test_only_other_optimizers_checkpoints_are_of_format_2(tmp_path: Path) -> None:
    manifests = {}
    for kind in KINDS:
        writer = CheckpointWriter(tmp_path / kind, start_ranks("cpu"), *stepped(kind, 1))
        checkpoint = writer.save(Progress(1), {**FACTS, "model": vars(small_model().config)})
        manifests[kind] = verify_checkpoint(checkpoint)
        kept = keep_weights(checkpoint, 1)  # which are evaluated whatever optimizer they were trained with
        assert read_checkpoint_manifest(kept).get("optimizer") == manifests[kind].get("optimizer")
        assert load_model(kept).wte.weight.equal(stepped(kind, 1)[0].wte.weight)
    assert {kind: manifest["format_version"] for kind, manifest in manifests.items()} == {
        "factored": 2,
        "sgd": 2,
        "adamw": 1,
    }
    assert [manifest.get("optimizer") for manifest in manifests.values()] == ["factored", "sgd", None]
    checkpoint = tmp_path / "sgd" / "step-00000001"
    for change, message in (
        ({"optimizer": None}, "damaged"),
        ({"optimizer": "sgd\n"}, r"damaged \(optimizer"),
        ({"format_version": 3}, "checkpoint format 3, this version of Longhaul reads formats 1 and 2"),
    ):
        write_checkpoint_manifest(checkpoint, {**manifests["sgd"], **change})
        with pytest.raises(BadCheckpoint, match=message):
            read_checkpoint_manifest(checkpoint)
    nameless = {key: value for key, value in manifests["sgd"].items() if key != "optimizer"}
    write_checkpoint_manifest(checkpoint, nameless)
    with pytest.raises(BadCheckpoint, match="optimizer: it is missing, and format 2 needs it"):
        read_checkpoint_manifest(checkpoint)


@pytest.mark.parametrize(("theirs", "ours"), [("factored", "adamw"), ("sgd", "factored"), ("adamw", "sgd")])
def test_another_optimizers_state_is_refused_by_name(tmp_path: Path, theirs: str, ours: str) -> None:
    checkpoint = CheckpointWriter(tmp_path, start_ranks("cpu"), *stepped(theirs, 1)).save(Progress(1), FACTS)
    words = f"trained with the optimizer {theirs}, but this run has {ours}: resume it with"
    with pytest.raises(UserError, match=words):
        load_training_state(checkpoint, *stepped(ours, 0))


def test_negative_squares_and_other_kinds_of_numbers_are_refused(tmp_path: Path) -> None:
    model, optimizer = stepped("factored", 1)
    optimizer.state[model.wte.weight]["row"].neg_()
    checkpoint = CheckpointWriter(tmp_path / "negative", start_ranks("cpu"), model, optimizer).save(Progress(1), FACTS)
    with pytest.raises(UserError, match=r"holds values in wte\.weight/row that training never"):
        load_training_state(checkpoint, *stepped("factored", 0))
    model, optimizer = stepped("factored", 1)
    optimizer.state[model.wte.weight]["count"] = torch.tensor(1.0)
    checkpoint = CheckpointWriter(tmp_path / "float", start_ranks("cpu"), model, optimizer).save(Progress(1), FACTS)
    with pytest.raises(UserError, match=r"holds wte\.weight/count as F32, not as one of I64"):
        load_training_state(checkpoint, *stepped("factored", 0))


def test_what_is_not_as_declared_is_not_saved(tmp_path: Path) -> None:
    """It could never be read."""
    model, optimizer = stepped("factored", 1)
    optimizer.state[model.wte.weight]["more"] = torch.zeros(3)
    with pytest.raises(AssertionError, match="keeps other state than it declares"):
        CheckpointWriter(tmp_path, start_ranks("cpu"), model, optimizer).save(Progress(1), FACTS)
    with pytest.raises(TypeError, match="Adagrad declares no state"):
        checkpoint_bytes(model, torch.optim.Adagrad(model.parameters()))


def test_a_run_is_not_resumed_with_another_optimizer(tmp_path: Path) -> None:
    """The real command: one line that names both, exit status 2, and nothing touched."""
    make_token_set(tmp_path / "data", train_tokens=2_001, val_tokens=500)
    command = tiny_arguments(tmp_path, tmp_path / "data", "run", "--schedule.kind=constant")
    train(1, tmp_path, [*command, "--run.max_steps=2"])
    run = run_of(tmp_path, "run")
    [(_, checkpoint)] = list_checkpoints(run.checkpoints)
    manifest = read_checkpoint_manifest(checkpoint)
    write_checkpoint_manifest(checkpoint, {**manifest, "format_version": 2, "optimizer": "muon"})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    done = train_by_path(*command, "--run.max_steps=4")
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: {checkpoint} was trained with the optimizer muon, but this run has adamw: resume it with muon, or "
        "start another run from its weights with train/finetune.py"
    )
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
