"""A sharded optimizer: the same weights to the bit, a part of the state on each rank, checkpoints for any."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.checkpoint_files import list_checkpoints
from common.errors import UserError
from model.config import preset_config
from model.ranks import Ranks, start_ranks
from model.roles import Role
from tests.helpers.manifests import FACTS
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, run_of, tiny_arguments, train, weights_hashes
from train.checkpoints.ownership import optimizer_tensors
from train.checkpoints.reader import load_on_all_ranks, load_training_state
from train.checkpoints.writer import CheckpointWriter
from train.errors import SaveFailed
from train.estimates.run_memory import optimizer_bytes, shares_of
from train.optimization import sharded
from train.optimization.optimizer import build_optimizer, set_learning_rate
from train.optimization.owners import owners
from train.optimization.sharded import Sharded
from train.progress import Progress
from train.settings.sections import Config, ModelSection, OptimConfig

KINDS: tuple[Any, ...] = ("adamw", "muon")
Exact = dict[str, bytes]


class Few(nn.Module):
    """Fewer tensors than the most ranks here, so that one owns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(7, 8))
        self.matrix = nn.Parameter(torch.ones(24, 8))
        self.scale = nn.Parameter(torch.ones(8))

    def roles(self) -> dict[str, Role]:
        return {"table": Role("embedding"), "matrix": Role("matrix", (8, 8, 8)), "scale": Role("norm")}


def build(kind: Any, ranks: Ranks | None, *, shard: bool) -> tuple[Few, torch.optim.Optimizer]:
    model = Few()
    return model, build_optimizer(model, OptimConfig(kind=kind, lr=0.01, muon_lr=0.03, shard=shard), ranks)


def learn(model: Few, optimizer: torch.optim.Optimizer, step: int, without: str = "") -> None:
    """A step whose gradients and rate depend on its number only. The second one is refused."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name == without else gradient
    set_learning_rate(optimizer, 0.01 / (1 + step))
    optimizer.found_inf = torch.tensor(float(step == 1))  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def exactly(model: Few, optimizer: torch.optim.Optimizer) -> Exact:
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | optimizer_tensors(model, optimizer)
    return {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def undisturbed(kind: str, steps: int) -> Exact:
    model, optimizer = build(kind, None, shard=False)
    for step in range(steps):
        learn(model, optimizer, step)
    return exactly(model, optimizer)


def resume_learn_and_save(folder: Path, world_size: int) -> dict[str, tuple[Exact, list[Any], int]]:
    """Resume what one rank less has saved, go one step further, save; what is here, what was sent, bytes of state."""
    ranks = start_ranks("cpu")
    sent: list[Any] = []
    patch, broadcast, reduce = pytest.MonkeyPatch(), dist.broadcast, dist.all_reduce

    def noting_broadcast(tensor: Tensor, **rest: Any) -> Any:
        sent.append((tensor.numel(), rest["src"]))
        return broadcast(tensor, **rest)

    def noting_reduce(tensor: Tensor, **rest: Any) -> Any:
        sent.append(str(rest["op"]))
        return reduce(tensor, **rest)

    found = {}
    for kind in KINDS:
        model, optimizer = build(kind, ranks, shard=True)
        assert isinstance(optimizer, Sharded)
        progress = load_training_state(folder / kind / f"step-{world_size:08d}", model, optimizer)
        mine = [p for group in optimizer.own.param_groups for p in group["params"]]
        other = next((name for name, p in model.named_parameters() if all(p is not q for q in mine)), "")
        sent.clear()
        with patch.context() as noting:
            noting.setattr(dist, "broadcast", noting_broadcast)
            noting.setattr(dist, "all_reduce", noting_reduce)
            learn(model, optimizer, progress.step, without=other)  # on each rank another gradient is absent
        collectives = list(sent)
        CheckpointWriter(folder / kind, ranks, model, optimizer).save(Progress(world_size + 1), FACTS)
        state = optimizer_tensors(model, optimizer)
        found[kind] = exactly(model, optimizer), collectives, sum(tensor.nbytes for tensor in state.values())
    ranks.close()
    return found


def test_weights_and_state_are_the_same_on_any_number_of_ranks_sharded_or_not(tmp_path: Path) -> None:
    for kind in KINDS:
        model, optimizer = build(kind, None, shard=False)
        for step in range(2):
            learn(model, optimizer, step)
        CheckpointWriter(tmp_path / kind, start_ranks("cpu"), model, optimizer).save(Progress(2), FACTS)
    for world_size in (2, 3, 4):
        results = run_ranks(world_size, tmp_path / "store", resume_learn_and_save, tmp_path, world_size)
        for kind in KINDS:
            expected = undisturbed(kind, world_size + 1)
            parts = [result[kind] for result in results]
            together: Exact = {}
            for exact, sent, _ in parts:
                assert exact.items() <= expected.items()
                together |= exact
                assert sent == parts[0][1] and len(sent) == 1 + min(world_size, 3)  # one verdict
            assert together == expected
            nothing = min(len(exact) for exact, _, _ in parts) == 3
            assert nothing == (world_size == 4)
    for kind in KINDS:  # and back on a single rank, not sharded
        model, optimizer = build(kind, None, shard=False)
        load_training_state(list_checkpoints(tmp_path / kind)[0][1], model, optimizer)
        assert exactly(model, optimizer) == undisturbed(kind, 5)


def restore_what_is_damaged(checkpoint: Path) -> str:
    ranks = start_ranks("cpu")
    model, optimizer = build("adamw", ranks, shard=True)
    with pytest.raises(UserError) as caught:
        load_on_all_ranks(ranks, checkpoint, model, optimizer)
    ranks.close()
    return str(caught.value)


def test_ranks_that_do_not_read_a_damaged_tensor_stop_with_the_one_that_does(tmp_path: Path) -> None:
    model, optimizer = build("adamw", None, shard=False)
    learn(model, optimizer, 0)
    optimizer.state[model.scale]["exp_avg_sq"].sub_(1)
    checkpoint = CheckpointWriter(tmp_path, start_ranks("cpu"), model, optimizer).save(Progress(1), FACTS)
    first, second = run_ranks(2, tmp_path / "store", restore_what_is_damaged, checkpoint)
    assert first == second
    assert "holds values in scale/exp_avg_sq that training never leaves there" in first


@pytest.mark.parametrize(("lost", "words"), [("table", "no rank's share of the weights"), ("", "")])
def test_a_save_without_a_tensor_is_not_published(tmp_path: Path, lost: str, words: str) -> None:
    model, optimizer = build("muon", None, shard=False)
    learn(model, optimizer, 0)
    writer = CheckpointWriter(tmp_path, start_ranks("cpu"), model, optimizer)
    writer._mine.discard(lost)
    if not words:
        optimizer.state.pop(model.matrix)
        lost, words = "matrix/momentum_buffer", "no rank's share of the optimizer"
    with pytest.raises(SaveFailed, match=f"step 1 could not be saved: {lost} is in {words}"):
        writer.save(Progress(1), FACTS)
    assert list(tmp_path.iterdir()) == []


def sizes_of(kind: Any, preset: str = "gpt2-124m") -> Config:
    model = ModelSection(**dataclasses.asdict(preset_config(preset)))
    return Config(model=model, optim=OptimConfig(kind=kind, shard=True))


@pytest.mark.parametrize("values", [{"value_residual": True}, {"value_residual": True, "value_embeddings": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_layers_that_are_not_alike_is_counted_whole(kind: Any, values: dict[str, Any]) -> None:
    config = sizes_of(kind)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, n_layer=7, n_embd=96, **values))
    assert optimizer_bytes(config) == sum(share.state for share in shares_of(config, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_keeps_more_than_its_part_and_the_largest_tensor(kind: Any) -> None:
    config = sizes_of(kind)
    whole = optimizer_bytes(config)
    embedding = 50304 * 768 * 8 + 4
    for world_size in (2, 3, 8):
        shares = shares_of(config, world_size)
        assert sum(share.state for share in shares) == whole
        assert max(share.state for share in shares) <= whole / world_size + embedding
        most = optimizer_bytes(config, world_size)
        assert most == max(share.state for share in shares) < whole
    work = 12 * 5 * 768**3 * (4 * 6 + 2 * 18)  # four matrices of C x C and two of C x 4C in a block
    assert sum(share.flops for share in shares) == (0 if kind == "adamw" else work)
    assert not config.optim.is_sharded(1)


def test_state_decides_who_owns_what_and_elements_decide_ties() -> None:
    assert owners({"a": (8, 1), "b": (8, 1), "c": (4, 9), "d": (4, 9)}, 2) == {"a": 0, "b": 1, "c": 0, "d": 1}
    assert owners({"a": (0, 5), "b": (0, 3), "c": (0, 2)}, 2) == {"a": 0, "b": 1, "c": 1}


def test_small_tensors_travel_together_and_owners_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "BUCKET_BYTES", 4 * 10)
    sizes = dict(zip("abcdef", (4, 5, 30, 2, 6, 9), strict=True))
    parameters = {name: nn.Parameter(torch.full((size,), float(size))) for name, size in sizes.items()}
    owner = dict(zip("abcdef", (0, 0, 0, 1, 1, 0), strict=True))
    made = sharded.buckets(parameters, owner, 3)
    assert [(bucket.owner, [len(t) for t in bucket.tensors]) for bucket in made] == [
        (0, [4, 5]), (1, [2, 6]), (0, [30]), (0, [9]),
    ]  # fmt: skip
    buffer = made[0].packed(rank=0)
    assert buffer.tolist() == [4.0] * 4 + [5.0] * 5
    made[0].unpack(-buffer, rank=1)
    assert parameters["b"].tolist() == [-5.0] * 5
    assert made[2].packed(rank=1).data_ptr() == parameters["c"].data_ptr()  # one tensor needs no copy


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_token_set(tmp_path / "data", train_tokens=5_001, val_tokens=500)
    return tmp_path / "data"


def test_a_run_is_the_same_sharded_and_not_and_may_change_at_a_resume(tmp_path: Path, data: Path) -> None:
    options = ("--optim.kind=muon", "--schedule.kind=constant", "--checkpoint.every_steps=3", "--eval.every_steps=0")
    more = ("--allow-change=run.max_steps",)

    def arguments(name: str, shard: str, steps: int) -> list[str]:
        return tiny_arguments(
            tmp_path, data, name, *options, *more, f"--optim.shard={shard}", f"--run.max_steps={steps}"
        )

    train(2, tmp_path, arguments("whole", "auto", 6))
    train(2, tmp_path, arguments("parts", "true", 3))
    parts, whole = run_of(tmp_path, "parts"), run_of(tmp_path, "whole")
    log = parts.log.read_text(encoding="utf-8")
    assert "of its state on a rank at most" in log and "of Newton-Schulz (1." in log
    assert "shard false: each rank has room for the optimizer's whole state" in whole.log.read_text(encoding="utf-8")
    train(2, tmp_path, arguments("parts", "false", 6))
    assert "optim.shard: true -> false" in parts.log.read_text(encoding="utf-8")
    steps = [record for record in curve(whole) if record[1] != "None"]
    assert [record for record in curve(parts) if record[1] != "None"] == steps and len(steps) == 6
    assert all(math.isfinite(float(record[1])) for record in steps)
    last = [weights_hashes(list_checkpoints(run.checkpoints)[0][1]) for run in (parts, whole)]
    assert last[0] == last[1] and any("momentum_buffer" in name for name in last[0])
