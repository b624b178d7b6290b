"""A ladder's sizes by one dial, the number of layers: what follows from it, by which rule, and whose rule that is.

The base configuration states the reference: its width, tokens a step, learning rate and horizon belong together.

- width = depth x `width_per_layer`, rounded up to whole heads of `head_size` (64 and 64: about GPT-2's and GPT-3's
  shapes, Radford et al. 2019, Brown et al. 2020; nanochat's dial, https://github.com/karpathy/nanochat).
- tokens a step grow with the horizon D to the power of 0.383 (Bergsma et al. 2025, arXiv:2505.13738).
- the learning rate falls with the root of the width (Vaswani et al. 2017, arXiv:1706.03762, section 5.3; nanochat), and
  rises with the root of the tokens a step, as Adam's does (Malladi et al. 2022, arXiv:2205.10287).
- the horizon is the study's budget: as `tokens_per_parameter`, it grows with the model (Hoffmann et al. 2022,
  arXiv:2203.15556, find about 20).
"""

import math
from typing import Any

from train.settings.sections import Config
from train.studies.study_file import Sizes

BATCH_POWER = 0.383


def shape_of(depth: int, sizes: Sizes) -> dict[str, Any]:
    """Options of a depth that do not depend on the horizon."""
    heads = max(1, math.ceil(depth * sizes.width_per_layer / sizes.head_size))
    return {"model.n_layer": depth, "model.n_embd": heads * sizes.head_size, "model.n_head": heads}


def rates_of(reference: Config, width: int, horizon: float) -> dict[str, Any]:
    """Tokens a step and learning rates at a width and a horizon (in tokens), from those of the reference."""
    tokens = reference.batch.tokens_per_step
    stated = reference.batch.stages.tokens_after(reference.run.max_steps)
    micro = reference.batch.micro_batch
    unit = reference.model.block_size * (micro if isinstance(micro, int) else 1)
    batch = max(1, round(tokens * (horizon / stated) ** BATCH_POWER / unit)) * unit
    factor = math.sqrt(reference.model.n_embd / width) * math.sqrt(batch / tokens)
    found: dict[str, Any] = {"batch.tokens_per_step": batch, "optim.lr": _rounded(reference.optim.lr * factor)}
    if reference.optim.muon_lr is not None:
        found["optim.muon_lr"] = _rounded(reference.optim.muon_lr * factor)
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
