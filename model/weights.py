"""Tensors on disk as safetensors, and a model out of a checkpoint's folder without a process group."""

import contextlib
import dataclasses
import errno
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint_files import COPY_AGAIN, BadCheckpoint, base_folder, read_checkpoint_manifest, verify_checkpoint
from common.checkpoint_manifest import CheckpointManifest, RecordedLora
from common.errors import UserError
from common.publish import fsync_file
from common.regular_file import open_regular
from model.config import ModelConfig, config_from_dict
from model.counts import parameter_count
from model.gpt import GPT
from model.initialisation import empty_gpt
from model.lora import add_lora, drop_lora, lora_layers, lora_tensors
from model.lora_config import LoraConfig, adapter_count

PREFIXES = {"trained": "weights-", "ema": "ema-"}  # of a checkpoint's files, by which weights they hold
SUFFIX = ".safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes of weights and optimizer state
Shapes = dict[str, tuple[int, ...]]
_OS_ERROR_CODE = re.compile(r"(?:os error|code:) (\d+)")  # as safetensors' Rust code prints an operating system's error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to one safetensors file and make it durable.

    The file appears under its final name at once: write into a folder that is published whole.

    Raises OSError where it can't be written, safetensors' own error for a full disk included.
    """
    try:
        write_safetensors(path, {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    except SafetensorError as error:
        found = _OS_ERROR_CODE.search(str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else str(error), str(path)) from None
    fsync_file(path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file`, with the permissions that any other new file gets.

    From 0.8 on it writes a temporary file that only its owner may read, whatever the umask, and renames it.
    """
    with open(path, "wb") as file:  # asks for the umask without changing it, which is the whole process's
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        save_file(dict(tensors), str(path), metadata=metadata)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    with contextlib.suppress(PermissionError):  # a file system without permissions
        os.chmod(path, mode)


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of several safetensors files, on the CPU.

    Raises UserError where a file isn't a whole safetensors file, or repeats another's tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with reading_tensors(path):
            part = load_file(str(path))
        _check_new(path, tensors, part)
        tensors.update(part)
    return tensors


def read_shapes(paths: Iterable[Path], kinds: Callable[[str], tuple[str, ...]] = lambda name: FLOATS) -> Shapes:
    """Names and shapes of the tensors of several safetensors files, by the files' headers: takes no memory for them.

    Args:
        kinds: the dtypes that tensors may have, by their names in safetensors.

    Raises UserError as `read_tensors`, and where a tensor has another dtype.
    """
    shapes: Shapes = {}
    for path in paths:
        with reading_tensors(path), safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        for name, (_, kind) in found.items():
            if kind not in (fitting := kinds(name)):
                raise UserError(f"{path} holds {name} as {kind}, not as one of {', '.join(fitting)}: {COPY_AGAIN}")
        _check_new(path, shapes, found)
        shapes |= {name: shape for name, (shape, _) in found.items()}
    return shapes


@contextlib.contextmanager
def reading_tensors(path: Path) -> Iterator[None]:
    """Whatever is wrong with a safetensors file as a UserError; only regular files are opened."""
    try:
        open_regular(path).close()
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read as safetensors ({error}): copy it again") from None


def _check_new(path: Path, known: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    if repeated := sorted(known.keys() & more.keys()):
        raise UserError(
            f"{path} repeats the tensor {repeated[0]} of another file: files of several checkpoints are mixed, "
            "copy the checkpoint again"
        )


def load_weights(model: GPT, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into the model's parameters by name.

    Raises UserError naming `source`, and tensors that are missing, unknown or misshapen.
    """
    _check_and_fill(dict(model.named_parameters()), tensors, source)


def _check_and_fill(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    check_shapes(parameters, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    fill(parameters, tensors.items())


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors, which may be read one at a time, into the parameters of their names; `check_shapes` comes first."""
    for name, tensor in tensors:
        parameters[name].copy_(tensor)


def check_shapes(parameters: Mapping[str, Tensor], shapes: Shapes, source: object) -> None:
    """Compare tensors with the parameters that they are to fill, which may be on the meta device.

    Raises UserError naming `source`, and what is missing, unknown or misshapen.
    """
    missing, unknown = sorted(parameters.keys() - shapes.keys()), sorted(shapes.keys() - parameters.keys())
    wrong = [f"{what} {names[:3]}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    if wrong:
        raise UserError(f"{source} does not hold this model: {', '.join(wrong)}")
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != shapes[name]:
            instead = f"{shapes[name]} instead of {tuple(parameter.shape)}"
            raise UserError(f"{source} does not hold this model: {name} has shape {instead}")


def load_model(
    checkpoint: Path | str, device: torch.device | str = "cpu", *, verify_hashes: bool = False, weights: str = "trained"
) -> GPT:
    """The model of a checkpoint's folder, in evaluation mode; adapters are merged into the base they were trained on.

    Args:
        checkpoint: a folder with `checkpoint.json` and weights of any number of ranks.
        device: where the weights go.
        verify_hashes: also compare every file's SHA-256 (sizes always are).
        weights: trained, or ema: the exponential average that the run has kept.

    Raises UserError where a listed file is missing, short or changed, weights and configuration don't match, or there
    is no average.
    """
    model = load_adapted_model(Path(checkpoint), device, verify_hashes=verify_hashes, weights=weights)
    if any(lora_layers(model)):
        drop_lora(model)
    return model


def load_adapted_model(
    checkpoint: Path, device: torch.device | str = "cpu", *, verify_hashes: bool = False, weights: str = "trained"
) -> GPT:
    """The model of a checkpoint's folder as `load_model`, but adapters stay beside their base's weights."""
    fitting = fitting_checkpoint(checkpoint, hashes=verify_hashes, weights=weights)
    model = empty_gpt(fitting.config, device)
    load_weights(model, read_tensors(fitting.weights), checkpoint)
    if fitting.lora is not None:
        add_lora(model, fitting.lora, seed=0)
        _check_and_fill(lora_tensors(model), read_tensors(fitting.adapters), checkpoint)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class FittingCheckpoint:
    """A checkpoint whose configuration matches its files.

    Attributes:
        weights: the files of the model's weights, which are its base's where it has adapters.
        lora: the adapters' configuration. adapters: their files.
    """

    config: ModelConfig
    weights: tuple[Path, ...]
    lora: LoraConfig | None = None
    adapters: tuple[Path, ...] = ()


def fitting_checkpoint(checkpoint: Path, *, hashes: bool = False, weights: str = "trained") -> FittingCheckpoint:
    """Compare a checkpoint's configuration with its files' headers, before any memory is allocated for it.

    Args and Raises: as `load_model`.
    """
    try:
        manifest = verify_checkpoint(checkpoint, hashes=hashes)
        own, facts = weight_files(checkpoint, manifest, weights), manifest.get("lora")
        base = checkpoint if facts is None else base_folder(checkpoint, manifest)
        files = own if facts is None else weight_files(base, read_checkpoint_manifest(base))
    except BadCheckpoint as error:
        raise UserError(f"{error}: {COPY_AGAIN}") from None
    if weights == "ema" and "ema" not in manifest:
        raise UserError(
            f"{checkpoint} has no exponential average of the weights: leave --weights out, or train with "
            "--optim.ema_half_life_tokens"
        )
    config = config_from_dict(manifest["model"], checkpoint)
    model = _empty_model(config, read_shapes(files), base)
    if facts is None:
        return FittingCheckpoint(config, files)
    lora, shapes = _adapters_of(facts, checkpoint), read_shapes(own)
    stored, wanted = _count(shapes), adapter_count(config, lora)
    if stored != wanted:
        raise UserError(
            f"{checkpoint} holds {stored:,} adapter parameters, but its rank and targets make {wanted:,}: copy it again"
        )
    try:
        add_lora(model, lora, seed=0)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    check_shapes(lora_tensors(model), shapes, checkpoint)
    return FittingCheckpoint(config, files, lora, own)


def weight_files(checkpoint: Path, manifest: CheckpointManifest, weights: str = "trained") -> tuple[Path, ...]:
    """The files of weights that a manifest lists; a copy over another checkpoint leaves files of both."""
    prefix = PREFIXES[weights]
    names = sorted(name for name in manifest["files"] if name.startswith(prefix) and name.endswith(SUFFIX))
    return tuple(checkpoint / name for name in names)


def _empty_model(config: ModelConfig, shapes: Shapes, source: object) -> GPT:
    """A model on the meta device, where it takes no memory. Raises UserError where its parameters differ from the
    shapes.
    """
    stored, padding = _count(shapes), (config.padded_vocab_size - config.vocab_size) * config.n_embd
    wanted = parameter_count(config) + padding * (1 if config.tie_weights else 2)
    if wanted > 2 * stored or config.n_layer > len(shapes):  # even its layers' objects could be more than memory holds
        raise UserError(
            f"{source} does not hold this model: it has {wanted:,} parameters in {config.n_layer:,} layers, the files "
            f"{stored:,} in {len(shapes):,} tensors"
        )
    model = empty_gpt(config)
    check_shapes(dict(model.named_parameters()), shapes, source)
    return model


def _adapters_of(facts: RecordedLora, source: object) -> LoraConfig:
    try:
        new_rows = facts.get("new_rows", 0)
        return LoraConfig(facts["rank"], facts["alpha"], facts["dropout"], tuple(facts["targets"]), new_rows)
    except ValueError as error:
        raise UserError(f"{source}: its adapters are impossible: {error}") from None


def _count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
