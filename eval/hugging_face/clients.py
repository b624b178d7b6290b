"""Which programs read an export, and what of a model each loses: the one table of classes, options and programs.

docs/generation.md shows `table()`, exports refuse or warn by `losses()`. Entries were tried: logits after the same
ids were compared with ours, and tokens of a text. docs/generation.md has when, and what was read in code only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from eval.hugging_face.hf_config import GPT2, LLAMA, MISTRAL, QWEN3, STARCODER2, home_of
from model.config import ModelConfig

OPTIONS: Mapping[str, tuple[str, str, str, str]] = {  # positions, norm, MLP, and what else a class takes
    GPT2: ("learned", "LayerNorm", "GELU, exact GELU, ReLU²", ""),
    STARCODER2: ("rotary", "LayerNorm", "GELU, exact GELU, ReLU²", "grouped or multi-query, one window"),
    LLAMA: ("rotary", "RMSNorm", "SwiGLU", "grouped or multi-query"),
    MISTRAL: ("rotary", "RMSNorm", "SwiGLU", "grouped or multi-query, one window, no biases"),
    QWEN3: ("rotary", "RMSNorm", "SwiGLU", "QK-norm, grouped or multi-query, windows by layer, no biases"),
}


@dataclass(frozen=True)
class Loss:
    """Something of a model that a program does not compute: in words that follow its name, and for which models."""

    words: str
    affects: Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Client:
    """A program that reads exports.

    Attributes:
        version: the one that was tried. reads: what of an export.
        refuses: classes that it doesn't load and reports. losses: what else it computes otherwise, or can't load.
    """

    name: str
    version: str
    reads: str
    refuses: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()


def _windowed(config: ModelConfig) -> bool:
    return any(window is not None and window < config.block_size for window in config.windows)


def _of_mlp(*mlps: str, home: str | None = None) -> Callable[[ModelConfig], bool]:
    """Whether a model has one of these MLPs, and is of this class if one is named."""
    return lambda config: config.mlp in mlps and home in (None, home_of(config))


def _untied_gpt2(config: ModelConfig) -> bool:
    return home_of(config) == GPT2 and not config.tie_weights


WINDOWS = Loss("ignores windows", _windowed)
TRANSFORMERS = Client("transformers", "5.23.0", "the folder")
LLAMA_CPP = Client(
    "llama.cpp", "xllamacpp 2026.10.11549, llama-cpp-python 0.3.36", "the GGUF file",
    losses=(
        WINDOWS,
        Loss("computes the tanh form of GELU instead of exact GELU and ReLU²", _of_mlp("gelu_exact", "relu2")),
    ),
)  # fmt: skip
MLX = Client(
    "mlx-lm", "0.32.2 with mlx 0.32.4 (CPU)", "the folder",
    losses=(
        WINDOWS,
        Loss("computes GPT-2 with the tanh form of GELU", _of_mlp("gelu_exact", "relu2", home=GPT2)),
        Loss("computes Starcoder2 with exact GELU", _of_mlp("gelu", "relu2", home=STARCODER2)),
        Loss("can't load a GPT-2 with a head of its own", _untied_gpt2),
    ),
)  # fmt: skip
CTRANSLATE2 = Client(
    "CTranslate2", "4.8.5", "the folder, by its converter", refuses=(STARCODER2,),
    losses=(
        WINDOWS,
        Loss("ignores Llama 3's scaling of rotary positions", lambda config: config.rope_scaling == "llama3"),
        Loss("can't load ReLU²", _of_mlp("relu2")),
    ),
)  # fmt: skip
ONNX = Client("onnxruntime", "1.32.0", "torch.onnx.export of the loaded folder")
OPTIMUM = Client("optimum-onnx", "0.1.0 with transformers 4.57.6", "the folder, by its converter", (STARCODER2,))
TRANSFORMERS_JS = Client("transformers.js", "4.3.2", "the folder with either file as onnx/model.onnx")
MISTRAL_RS = Client(
    "mistral.rs", "0.9.5 (greedy texts compared)", "the folder", refuses=(GPT2,),
    losses=(
        Loss("ignores windows that differ between layers", lambda config: len(set(config.windows)) > 1),
        Loss("gives other texts for a Llama with biases", lambda config: config.bias and home_of(config) == LLAMA),
    ),
)  # fmt: skip
CLIENTS = (TRANSFORMERS, ONNX, OPTIMUM, TRANSFORMERS_JS, LLAMA_CPP, MLX, CTRANSLATE2, MISTRAL_RS)


def losses(config: ModelConfig, client: Client) -> list[str]:
    """What a program computes otherwise than this model, in words that follow its name; [] where nothing."""
    refused = ["doesn't have this class"] if home_of(config) in client.refuses else []
    return refused or [loss.words for loss in client.losses if loss.affects(config)]


def table() -> str:
    """The table of docs/generation.md, in Markdown."""
    lines = ["| class | positions | norm | MLP | more |", "|---|---|---|---|---|"]
    lines += [f"| `{home}` | {' | '.join(options)} |".replace("|  |", "| |") for home, options in OPTIONS.items()]
    lines += ["", "| program, version | reads | classes | what it loses |", "|---|---|---|---|"]
    for client in CLIENTS:
        classes = "all" if not client.refuses else f"all but {', '.join(f'`{home}`' for home in client.refuses)}"
        lost = "; ".join(loss.words for loss in client.losses) or "nothing"
        lines.append(f"| {client.name}, {client.version} | {client.reads} | {classes} | {lost} |")
    return "\n".join(lines) + "\n"
