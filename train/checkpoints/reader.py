"""Filling model and optimizer from a checkpoint, whatever number of ranks wrote it, one tensor at a time."""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from common.checkpoint_files import read_checkpoint_manifest
from common.checkpoint_manifest import CheckpointManifest
from common.errors import UserError
from model.ranks import Ranks
from model.weights import FLOATS, SUFFIX, check_shapes, fill, read_shapes, reading_tensors
from train.checkpoints.ownership import OPTIMIZER, WEIGHTS
from train.checkpoints.resume import check_optimizer
from train.optimization.declared_state import OptimizerState, StateTensor
from train.optimization.optimizer import trained_parameters
from train.optimization.optimizer_state import dtype_of, empty_state, shapes_of, state_of
from train.optimization.sharded import own_part
from train.optimization.weight_average import EMA, WeightAverage
from train.progress import Progress


def check_training_state(
    checkpoint: Path, model: nn.Module, declared: OptimizerState, *, averaged: bool = False
) -> None:
    """Compare a checkpoint's files, by their headers, with what a model and its optimizer need.

    Args:
        model: as it will be trained; it may be on the meta device. declared: the optimizer's state.
        averaged: whether averaged weights are read too, if there are any.

    Raises UserError where it is another optimizer's, or naming the first tensor that is missing, superfluous, of
    another shape or kind of number.
    """
    manifest = read_checkpoint_manifest(checkpoint)
    check_optimizer(checkpoint, manifest, declared.name)
    parameters = trained_parameters(model)
    for kind in (WEIGHTS, EMA) if averaged and EMA in manifest else (WEIGHTS,):
        check_shapes(parameters, read_shapes(_files(checkpoint, manifest, kind)), checkpoint)
    wanted = declared.tensors(shapes_of(parameters.items()))
    state = read_shapes(_files(checkpoint, manifest, OPTIMIZER), lambda name: _kinds(wanted.get(name)))
    for name, shape in state.items():
        if name not in wanted:
            raise UserError(
                f"{checkpoint} has optimizer state {name}, which this model's training does not use: resume from "
                "another"
            )
        if shape != wanted[name].shape:
            instead = f"{shape} instead of {wanted[name].shape}"
            raise UserError(f"{checkpoint} does not hold this model: {name} has shape {instead}")
    expected = state or (manifest["step"] > 0 and not manifest.get("weights_only"))
    if expected and (absent := sorted(wanted.keys() - state.keys())):
        raise UserError(f"{checkpoint} has no optimizer state for {absent[0]}: resume from another")


def load_on_all_ranks(
    ranks: Ranks,
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
) -> Progress:
    """`load_training_state` on every rank; of a sharded optimizer, and of averaged weights, each reads only its part.

    Raises UserError on all ranks where one of them does.
    """
    problem, progress = None, None
    try:
        progress = load_training_state(checkpoint, model, optimizer, average)
    except UserError as error:
        problem = str(error)
    problems = [other for other in ranks.gather(problem) if other is not None]
    if progress is None or problems:
        raise UserError(problems[0])
    return progress


def load_training_state(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> Progress:
    """Fill model and optimizer from a verified checkpoint, one tensor at a time; return its progress.

    Averaged weights are filled as well, or start here where the checkpoint has none. Nothing of the checkpoint stays in
    memory, mapped or copied, beside the training state itself.

    Raises UserError as `check_training_state` does, and for NaN, infinities, and negative squares and counts.
    """
    check_training_state(checkpoint, model, state_of(optimizer), averaged=average is not None)
    manifest = read_checkpoint_manifest(checkpoint)
    parameters = trained_parameters(model)
    fill(parameters, _tensors(checkpoint, manifest, WEIGHTS, set()))
    _fill_optimizer(checkpoint, manifest, parameters, optimizer)
    if average is not None:
        average.start(manifest["tokens"])
        if EMA in manifest:
            average.start_tokens = manifest["ema"]["start_tokens"]
            fill(average.tensors, _tensors(checkpoint, manifest, EMA, set(), wanted=average.tensors))
    return Progress(manifest["step"], manifest["tokens"], manifest["sequences"])


def load_loss_scale(scaler: torch.amp.GradScaler, manifest: CheckpointManifest, world_size: int) -> None:
    """Continue with a checkpoint's loss scale, if it has one.

    A backward's loss is scaled by the number of ranks as well: what fitted into fp16 must fit again.
    """
    if saved := manifest.get("scaler"):
        scaler.load_state_dict({**saved, "scale": saved["scale"] * manifest["world_size"] / world_size})


def _fill_optimizer(
    checkpoint: Path,
    manifest: CheckpointManifest,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Give every parameter that is updated here its state, where and as `Optimizer.load_state_dict` would put it.

    That method would need the whole state a second time.
    """
    groups = {id(p): group for group in own_part(optimizer).param_groups for p in group["params"]}
    here = {name: parameter for name, parameter in parameters.items() if id(parameter) in groups}
    kept = state_of(optimizer).tensors(shapes_of(here.items()))
    non_negative = {name for name, item in kept.items() if item.non_negative}
    for full_name, tensor in _tensors(checkpoint, manifest, OPTIMIZER, non_negative, wanted=kept):
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = empty_state(kept[full_name], parameter, groups[id(parameter)]).copy_(tensor)


def _files(checkpoint: Path, manifest: CheckpointManifest, kind: str) -> list[Path]:
    """Those that the manifest lists; a copy over another checkpoint leaves files of both."""
    names = sorted(name for name in manifest["files"] if name.startswith(f"{kind}-") and name.endswith(SUFFIX))
    return [checkpoint / name for name in names]


def _kinds(kept: StateTensor | None) -> tuple[str, ...]:
    """The dtypes, by safetensors' names, that a tensor of state may have."""
    if kept is None or (dtype := dtype_of(kept)).is_floating_point:
        return FLOATS
    return (f"{'I' if dtype.is_signed else 'U'}{8 * dtype.itemsize}",)


def _tensors(
    checkpoint: Path,
    manifest: CheckpointManifest,
    kind: str,
    non_negative: Collection[str],
    wanted: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """One tensor at a time, on the CPU, read rather than mapped: mapped pages would count as this process's memory.

    Args: wanted: names to read; None: all.
    """
    for path in _files(checkpoint, manifest, kind):
        with reading_tensors(path), safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if wanted is not None and key not in wanted:
                    continue
                tensor = file.get_tensor(key)
                _check_numbers(path, key, tensor, non_negative=key in non_negative)
                yield key, tensor


def _check_numbers(path: Path, name: str, tensor: Tensor, *, non_negative: bool) -> None:
    """Raises UserError for values that no run saves, and that would ruin all weights at the first step."""
    low, high = (float(value) for value in torch.aminmax(tensor))  # both are NaN where one value is
    if not -math.inf < low <= high < math.inf or (non_negative and low < 0):
        raise UserError(
            f"{path} holds values in {name} that training never leaves there: resume from another checkpoint"
        )
