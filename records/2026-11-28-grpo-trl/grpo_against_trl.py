"""The loss and the gradients of a GRPO step, against trl's GRPOTrainer on the same answers and rewards.

    python records/2026-11-28-grpo-trl/grpo_against_trl.py [--json FILE]

Needs trl beside this project's packages: a Python environment of its own. Answers are sampled by us, ragged, some cut;
trl is given them in place of its generation, and works out advantages, log-probabilities, masks and losses itself, on
transformers' model of the same weights. In a second update of a step the weights have moved by then.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.publish import write_json_output, write_json_whole
from data_prep.token_sets.token_set import TokenSet
from eval.hugging_face.hf_config import to_config
from eval.hugging_face.hf_tensors import to_tensors
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import start_ranks
from tests.helpers.conversation_sets import make_conversation_set
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch
from train.batches.prompts import PromptOrder, prompt_sequences
from train.objectives import grpo
from train.objectives.policy import group_advantages, kl_loss
from train.objectives.rewards import Reward
from train.objectives.rollout import Rollout, Sampler
from train.optimization.ddp import Parallel
from train.optimization.step import Stepper
from train.settings.sections import RolloutConfig

LENGTH = 48
PLAIN = RolloutConfig(prompts_per_step=4, samples=4, max_tokens=12, prompts_per_block=2, temperature=1.3, kl=0.0)
LLAMA: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
GPT2: dict[str, Any] = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}
LOSS_TYPES = {"answers": "grpo", "tokens": "dapo", "constant": "dr_grpo"}


@dataclass(frozen=True)
class Case:
    """second: the loss is a second update's, from weights that the first has moved. corrected: trl's KL is weighted by
    the ratio of probabilities, its default; else it is as in Shao et al. shao_kl: ours is replaced by that, too.
    """

    config: RolloutConfig
    parts: dict[str, Any]
    second: bool = False
    corrected: bool = True
    shao_kl: bool = False
    alike: bool = True


CASES = {
    "grpo": Case(PLAIN, LLAMA),
    "grpo, no deviation": Case(replace(PLAIN, deviation_term=False), LLAMA),
    "dapo": Case(replace(PLAIN, length_term="tokens"), LLAMA),
    "dapo, cut answers masked": Case(replace(PLAIN, length_term="tokens", mask_cut=True), LLAMA),
    "dr_grpo, no deviation": Case(replace(PLAIN, length_term="constant", deviation_term=False), LLAMA),
    "grpo, second update": Case(replace(PLAIN, epochs=2), LLAMA, second=True),
    "dapo, second update": Case(replace(PLAIN, epochs=2, length_term="tokens"), LLAMA, second=True),
    "grpo, beta 0.5": Case(replace(PLAIN, kl=0.5), LLAMA),
    "grpo, beta 0.5, second update": Case(replace(PLAIN, kl=0.5, epochs=2), LLAMA, second=True),
    "grpo, beta 0.5, Shao's KL in both": Case(replace(PLAIN, kl=0.5), LLAMA, corrected=False, shao_kl=True),
    "grpo, beta 0.5, Shao's KL in trl": Case(replace(PLAIN, kl=0.5), LLAMA, corrected=False, alike=False),
    "grpo, cut answers masked": Case(replace(PLAIN, mask_cut=True), LLAMA, alike=False),
    "grpo, learned positions": Case(PLAIN, GPT2, alike=False),
}


class Kept(torch.optim.Optimizer):
    """Changes nothing and keeps the gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self._model = model
        self.gradients: dict[str, Tensor] = {}

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        named = self._model.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


class Watched(grpo.Grpo):
    """Keeps the rollout."""

    rollout: Rollout

    def _judged(self, rows: Any, rollout: Rollout) -> Any:
        self.rollout = rollout
        return super()._judged(rows, rollout)


def policy(tokens: TokenSet, seed: int, parts: dict[str, Any]) -> GPT:
    vocab_size = tokens.tokenizer_spec["vocab_size"]
    model = GPT(ModelConfig(vocab_size, block_size=LENGTH, n_layer=2, n_head=2, n_embd=16, vocab_multiple=1, **parts))
    initialise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    return model


def moved(model: GPT) -> None:
    """Far enough that some ratios are clipped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.02)


def worth(prompts: list[str], completions: list[str], fields: list[dict[str, Any]]) -> list[float]:
    return [len(set(text)) / 4 + sum(character.isdigit() for character in text) for text in completions]


def k3(log_probs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
    """The KL of Shao et al. in the loss, with its gradient."""
    return (reference - log_probs).exp() - (reference - log_probs) - 1


def our_step(case: Case, tokens: TokenSet) -> tuple[Rollout, float, dict[str, Tensor], dict[str, float]]:
    config, ranks = case.config, start_ranks("cpu")
    model, reference = policy(tokens, 1, case.parts), policy(tokens, 2, case.parts)
    plan = plan_batch(config.sequences * LENGTH, LENGTH, 2, 1)
    sequences = prompt_sequences(tokens, LENGTH, samples=config.samples, max_tokens=config.max_tokens)
    rewards = [Reward("worth", 1.0, worth, "0" * 64)]
    sampler = Sampler(
        model, sequences.prompts, rewards, ranks, max_tokens=config.max_tokens,
        prompts_per_block=config.prompts_per_block, seed=3, dtype="fp32",
    )  # fmt: skip
    objective, optimizer = Watched(config), Kept(model)
    objective.prepare(sampler, model, reference if config.kl else None, ranks, plan, "fp32", trims=True)
    stepper = Stepper(Parallel(model, ranks), optimizer, ranks, plan, objective, dtype="fp32", grad_clip=0.0, seed=1)
    stepper.warm_up(LENGTH)
    order = PromptOrder(sequences.prompts.count, config.samples, 5)
    parts = iter(objective.updates(StepLoader(sequences, plan, rank=0, seed=5, order=order).step_at(0), 1))
    part = next(parts)
    if case.second:
        part = next(parts)
        moved(model)
    with patch.object(grpo, "kl_loss", k3 if case.shao_kl else kl_loss):
        result = stepper(part, 1)
    mapped = to_tensors(model.config, optimizer.gradients)
    return objective.rollout, float(result.loss), mapped, {name: float(v) for name, v in result.terms.items()}


def in_transformers(model: GPT, folder: Path) -> Any:
    import transformers

    folder.mkdir()
    tensors = to_tensors(model.config, {name: p.detach().float() for name, p in model.named_parameters()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json_whole(folder / "config.json", to_config(model.config, None))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def some_tokenizer(vocab_size: int) -> Any:
    """trl needs one for its padding; its texts are not looked at."""
    import tokenizers
    import transformers

    words = {f"t{number}": number for number in range(vocab_size - 1)} | {"<pad>": vocab_size - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="t1")


def trl_step(case: Case, tokens: TokenSet, rollout: Rollout, out: Path) -> tuple[float, dict[str, Tensor], Tensor]:
    """Loss, gradients and advantages of these answers."""
    import datasets
    import trl  # type: ignore[import-not-found]  # no requirement of the project

    config, tokenizer = case.config, some_tokenizer(tokens.tokenizer_spec["vocab_size"])
    rows, (answers, lengths, ended) = config.sequences, rollout.answers
    asked = [rollout.prompts[row // config.samples].ids.tolist() for row in range(rows)]
    given = [answers[row, : lengths[row]].tolist() for row in range(rows)]

    class Fixed(trl.GRPOTrainer):
        def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
            return asked, given, None, ["" for _ in given], None, {}, None, None

    def rewards(prompts: list[Any], completions: list[Any], **more: Any) -> list[float]:
        return rollout.rewards.tolist()

    options = trl.GRPOConfig(
        output_dir=str(out / "trl"), per_device_train_batch_size=rows, num_generations=config.samples,
        max_completion_length=config.max_tokens, temperature=config.temperature, beta=config.kl, epsilon=config.clip,
        loss_type=LOSS_TYPES[config.length_term], scale_rewards="group" if config.deviation_term else "none",
        mask_truncated_completions=config.mask_cut, use_bias_correction_kl=case.corrected,
        num_iterations=config.epochs, use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_dropout=True,
    )  # fmt: skip
    model = policy(tokens, 1, case.parts)
    trainer = Fixed(
        model=in_transformers(model, out / "policy"), reward_funcs=rewards, args=options, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"prompt": "t2"}] * rows),
    )  # fmt: skip
    trainer.eos_token_ids = sorted({int(given[row][-1]) for row in range(rows) if ended[row]})
    if config.kl:
        start = in_transformers(policy(tokens, 2, case.parts), out / "reference")
        trainer.ref_model.load_state_dict(start.state_dict())
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "t2"}] * rows)
    if case.second:
        moved(model)
        there = in_transformers(model, out / "moved").state_dict()
        trainer.model.load_state_dict(there)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad for name, p in named if p.grad is not None}, inputs["advantages"]


def compare(case: Case, tokens: TokenSet) -> dict[str, Any]:
    rollout, ours, mapped, terms = our_step(case, tokens)
    with tempfile.TemporaryDirectory() as folder:
        theirs, gradients, advantages = trl_step(case, tokens, rollout, Path(folder))
    own = group_advantages(rollout.rewards, case.config.samples, deviation=case.config.deviation_term)
    difference = {name: float((mapped[name] - value).abs().max()) for name, value in gradients.items()}
    return {
        "alike_by_design": case.alike,
        "loss": ours,
        "loss_of_trl": theirs,
        "difference_of_loss": abs(ours - theirs),
        "largest_gradient": max(float(value.abs().max()) for value in gradients.values()),
        "largest_difference_of_gradients": max(difference.values()),
        "largest_difference_of_advantages": float(np.abs(own.advantages - advantages.double().numpy()).max()),
        "tensors": len(difference),
        "clip_share": terms["clip_share"],
        "cut_share": float((~rollout.answers.ended).mean()),
    }


def advantages_of_equal_rewards() -> dict[str, float]:
    """The largest of a group of eight equal rewards, by trl's arithmetic (float32) and by ours."""
    found = {}
    for reward in (0.1, 0.3, 0.7):
        rewards = torch.full((8,), reward)
        found[f"trl_{reward}"] = float(((rewards - rewards.mean()) / (rewards.std() + 1e-4)).abs().max())
        ours = group_advantages(np.full(8, reward), 8, deviation=True)
        found[f"ours_{reward}"] = float(np.abs(ours.advantages).max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import transformers
    import trl

    found: dict[str, Any] = {
        "trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_conversation_set(Path(folder))
        for name, case in CASES.items():
            found[name] = compare(case, tokens)
            print(name, json.dumps(found[name]), flush=True)
    found["advantages_of_equal_rewards"] = advantages_of_equal_rewards()
    print(json.dumps(found["advantages_of_equal_rewards"]))
    if arguments.json:
        write_json_output(arguments.json, found)


if __name__ == "__main__":
    main()
