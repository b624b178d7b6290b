"""Longhaul as a library: a run's weights, losses of texts and generated texts, from a notebook or another program.

    import longhaul

    model = longhaul.load("runs/demo")
    print(model.loss("Return a new array."), model.generate("Return a new array with"))

and `model.answer("2+2?")` of a model that was trained on conversations, `model.score(messages)` of a reward model.

`pip install -e .` in the project makes it importable from anywhere. Importing it takes no torch, which comes with
`load`. What is here calls the functions of the other folders, which can be imported in the same way (docs/library.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.version import VERSION as __version__

if TYPE_CHECKING:  # a notebook's first cell needs none of it
    import numpy as np
    import numpy.typing as npt
    import torch

    from data_prep.chat.chat_tokenizer import ChatTokenizer
    from data_prep.chat.messages import Message
    from data_prep.tokenization.tokenizer import Tokenizer
    from eval.generation.options import Sampling
    from model.gpt import GPT

__all__ = ["Model", "__version__", "load", "metrics"]


@dataclass(frozen=True)
class Model:
    """A trained model and its tokenizer.

    Attributes:
        gpt: the model, a torch module in evaluation mode: gpt(tokens (B, T) int64) gives logits (B, T, V).
        tokenizer: `encode(text)` gives an array of ids, `decode(ids)` a text.
        checkpoint: the folder that the weights are from.
        step, tokens: how far it had been trained.
    """

    gpt: GPT
    tokenizer: Tokenizer
    checkpoint: Path
    step: int
    tokens: int

    @property
    def device(self) -> torch.device:
        return next(self.gpt.parameters()).device

    def losses(self, text: str) -> npt.NDArray[np.float32]:
        """The loss of every token of a text, (n,) in nats: how surprising it is after the ones before it.

        Where the tokenizer marks the start of a document, the first token is predicted from that mark; else it is not
        among them. A text longer than the model's context is cut into sequences, each of which starts with the token
        that the one before it ends with.

        Raises UserError for a character that the vocabulary lacks, and for a text without anything to predict.
        """
        import numpy as np
        import torch

        from common.errors import UserError

        ids = self.tokenizer.prompt(text)
        if len(ids) < 2:
            raise UserError("the text has no token to predict: give a longer one")
        length = self.gpt.config.block_size
        found: list[npt.NDArray[np.float32]] = []
        with torch.no_grad():
            for start in range(0, len(ids) - 1, length):
                part = torch.tensor([ids[start : start + length + 1]], device=self.device)  # (1, ≤T+1)
                losses = self.gpt(part[:, :-1], part[:, 1:], reduction="none")  # (1, ≤T)
                found.append(losses[0].float().cpu().numpy())
        return np.concatenate(found)

    def loss(self, text: str) -> float:
        """The mean of `losses`, in nats per token."""
        return float(self.losses(text).mean(dtype="float64"))

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> str:
        """What the model generates after a prompt; the same seed gives the same text.

        Args:
            max_tokens: of the text; it is shorter where the model ends it. The context slides when it is full.
            temperature: 0 takes the likeliest token. top_k, top_p: as in `eval/generate.py --help`.

        Raises UserError for impossible values, an empty prompt where the tokenizer marks no documents, and predictions
        that are NaN or inf.
        """
        from eval.generation.options import Sampling

        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        slide = max(1, self.gpt.config.block_size // 2)
        ids = self._continue(self.tokenizer.prompt(prompt), sampling, max_tokens, seed, slide)
        return self.tokenizer.decode(ids, continues=bool(prompt))

    def answer(
        self,
        conversation: str | Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> str:
        """What a model that was trained on conversations answers to a message, or to a whole conversation.

        Args:
            conversation: a text, or messages such as {"role": "user", "content": "2+2?"}, the last one a user's.
            max_tokens, temperature, top_k, top_p, seed: as of `generate`. The answer also ends where the context is
                full.

        Raises UserError where the model has no chat template, or the conversation can't be used or is too long.
        """
        from data_prep.chat.messages import USER
        from eval.generation.options import Sampling

        if isinstance(conversation, str):
            conversation = [{"role": USER, "content": conversation}]
        tokenizer, turns = self._conversation(conversation, last=USER)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        return tokenizer.decode(
            self._continue(tokenizer.prompt_of(turns), sampling, max_tokens, seed, slide=None), continues=True
        )

    def score(self, conversation: Sequence[Mapping[str, str]]) -> float:
        """A reward model's score of the last answer of a conversation; only differences mean something.

        Args: conversation: messages such as {"role": "assistant", "content": "4"}, the last one an assistant's.

        Raises UserError where this is no reward model, or the conversation can't be used or is too long.
        """
        from common.errors import UserError
        from data_prep.chat.messages import ASSISTANT
        from eval.reward_task.scoring import judged_ids, scores_of

        if not self.gpt.config.scalar_head:
            raise UserError(
                f"{self.checkpoint} is no reward model: train one with train/finetune.py --objective reward"
            )
        tokenizer, turns = self._conversation(conversation, last=ASSISTANT)
        ids, room = judged_ids(tokenizer, turns), self.gpt.config.block_size
        if len(ids) > room:
            raise UserError(f"the conversation takes {len(ids):,} tokens, and the context holds {room:,}: shorten it")
        return float(scores_of(self.gpt, [ids], micro_batch=1, dtype="fp32")[0])

    def _continue(self, ids: list[int], sampling: Sampling, count: int, seed: int, slide: int | None) -> list[int]:
        """The ids that the model generates after some."""
        from eval.generation.decoding import Decoding

        decoding = Decoding(
            self.gpt, [ids], sampling, count=count, seed=seed, end_ids=self.tokenizer.end_ids, slide=slide
        )
        for _ in decoding:
            pass
        return list(decoding.rows[0].continuation)

    def _conversation(
        self, messages: Sequence[Mapping[str, str]], last: str
    ) -> tuple[ChatTokenizer, tuple[Message, ...]]:
        """Checked. Raises UserError where the model has no template, or the last message is of another role."""
        from common.errors import UserError
        from data_prep.chat.chat_tokenizer import ChatTokenizer
        from data_prep.chat.messages import conversation_of

        if not isinstance(self.tokenizer, ChatTokenizer):
            raise UserError(
                f"{self.checkpoint} has no chat template: train it on conversations first (docs/after-pretraining.md)"
            )
        turns = conversation_of({"messages": list(messages)})
        if turns[-1].role != last:
            raise UserError(f"the last message is of the role {turns[-1].role}: it has to be of {last}")
        return self.tokenizer, turns


def load(run_or_checkpoint: str | Path, *, device: str = "cpu", dtype: Literal["fp32", "bf16"] = "fp32") -> Model:
    """The model of a run's newest good checkpoint, or of this checkpoint.

    Args:
        run_or_checkpoint: a folder such as "runs/demo" or "runs/demo/checkpoints/step-00001000".
        device: such as "cuda". dtype: of the weights.

    Raises UserError, in one line, where there is none, or it is damaged.
    """
    import torch

    from common.paths import expand_path
    from eval.shared.loading import load_checkpoint

    loaded = load_checkpoint(expand_path(run_or_checkpoint), device)
    gpt = loaded.model.to(torch.bfloat16) if dtype == "bf16" else loaded.model
    return Model(gpt, loaded.tokenizer, loaded.checkpoint, loaded.manifest["step"], loaded.manifest["tokens"])


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, running or done: steps, validations and others, in their order.

    A list of dictionaries, as pandas.DataFrame takes it. Lines that a resume has overwritten are left out.

    Raises UserError where the folder is no run's.
    """
    from common.errors import UserError
    from common.metrics_file import read_metrics
    from common.paths import expand_path
    from common.run_folder import RunFolder

    folder = RunFolder(expand_path(run))
    if not folder.metrics.is_file():
        raise UserError(f"{folder.path} is not a run's folder: it has no {folder.metrics.name}")
    return read_metrics(folder.metrics)
