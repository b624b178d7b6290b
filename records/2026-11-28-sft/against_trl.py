"""The loss and the gradients of a step on conversations, against trl's SFTTrainer with `assistant_only_loss`.

    python records/2026-11-28-sft/against_trl.py --out DIR [--json FILE]

Needs trl beside this project's packages: a Python environment of its own. Both read the same JSONL: ours through
data_prep/conversations.py, packed, one micro-batch of one sequence after another; trl through `apply_chat_template` of
the exported folder, all conversations as padded rows of one batch, on transformers' model.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run by path: put the project, not this folder, first on sys.path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.publish import write_json_output
from data_prep.token_sets.packing import PackedSequences
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization.loading import load_tokenizer
from eval.hugging_face.export import export
from eval.hugging_face.hf_tensors import to_tensors
from eval.shared.loading import load_checkpoint
from model.ranks import start_ranks
from tests.eval.checkpoints import write_checkpoint
from train.batches.loader import StepLoader
from train.batches.plan import plan_batch
from train.batches.training_sequences import prepare_packing, training_sequences
from train.objectives.answers import Answers
from train.optimization.ddp import Parallel
from train.optimization.step import Stepper

PROJECT = Path(__file__).resolve().parents[2]
LENGTH, COUNT = 128, 40
# ChatML, with the marks by which transformers tells the assistant's tokens: content and end of turn
MARKED = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Kept(torch.optim.Optimizer):
    """Changes nothing and keeps the gradients."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self._model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        named = self._model.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def write_talks(path: Path) -> None:
    """Conversations of one to three turns, some with a system message."""
    generator = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(COUNT):
            messages = [{"role": "system", "content": "Be brief."}] if number % 3 == 0 else []
            for _ in range(generator.randint(1, 3)):
                a, b = generator.randrange(100), generator.randrange(100)
                messages.append({"role": "user", "content": f"{number}: {a}+{b}" + "?" * generator.randint(0, 4)})
                messages.append({"role": "assistant", "content": f"{a + b}"})
            file.write(json.dumps({"messages": messages}) + "\n")


def our_step(model: Any, tokens: TokenSet) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Loss, number of targets, gradients of all conversations of the training split, packed, as one step."""
    ranks = start_ranks("cpu")
    prepare_packing(tokens, LENGTH, ranks)
    packed = training_sequences(tokens, LENGTH, stride=None, packed=True, mask_documents=True)
    assert isinstance(packed, PackedSequences) and packed.facts.left_out == 0
    plan = plan_batch(packed.count * LENGTH, LENGTH, 1, 1)
    optimizer = Kept(model)
    stepper = Stepper(Parallel(model, ranks), optimizer, ranks, plan, Answers(), dtype="fp32", grad_clip=0.0, seed=1)
    stepper.warm_up(LENGTH, document_mask=True)
    result = stepper(StepLoader(packed, plan, rank=0, seed=1).step_at(0), 1)
    return result.loss, int(result.targets), optimizer.gradients


def trl_step(folder: Path, talks: Path, used: int) -> tuple[float, int, dict[str, torch.Tensor]]:
    """The same of trl, on the first `used` conversations."""
    import datasets
    import transformers
    import trl  # type: ignore[import-not-found]  # no requirement of the project

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = MARKED
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [json.loads(line) for line in talks.read_text(encoding="utf-8").splitlines()]
    options = trl.SFTConfig(
        output_dir=str(folder.parent / "trl"), assistant_only_loss=True, per_device_train_batch_size=used,
        max_length=None, packing=False, use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False,
        save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=options, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    (batch,) = trainer.get_train_dataloader()
    model.eval()  # no dropout
    count = int((batch["labels"][:, 1:] != -100).sum())
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(count))
    loss.backward()
    return loss.item(), count, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_talks(out / "talks.jsonl")
    command = [sys.executable, str(PROJECT / "data_prep" / "conversations.py"), str(out / "talks.jsonl")]
    more = ["--tokenizer=byte", "--template=chatml", "--out", str(out / "data"), "--workers=0", "--val-one-in=8"]
    subprocess.run([*command, *more, "--force"], check=True)
    tokens = TokenSet.open(out / "data")
    spec = load_tokenizer(tokens.tokenizer_spec).spec
    checkpoint = write_checkpoint(out / "checkpoints", tokenizer=spec, noise=0.3, block_size=LENGTH)
    loaded = load_checkpoint(checkpoint)
    export(checkpoint, out / "exported")
    loss, count, gradients = our_step(loaded.model.train(), tokens)
    kept = training_rows(out / "talks.jsonl", tokens)
    theirs, their_count, their_gradients = trl_step(out / "exported", kept, len(kept.read_text().splitlines()))
    mapped = to_tensors(loaded.model.config, gradients)
    differences = {name: float((mapped[name] - value).abs().max()) for name, value in their_gradients.items()}
    largest = max(float(value.abs().max()) for value in their_gradients.values())
    import transformers
    import trl

    figures = {
        "trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__,
        "conversations": len(kept.read_text().splitlines()), "targets": count, "targets_of_trl": their_count,
        "loss": loss, "loss_of_trl": theirs, "largest_gradient": largest, "tensors": len(differences),
        "largest_difference_of_gradients": max(differences.values()),
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    if arguments.json:
        write_json_output(arguments.json, figures)


def training_rows(talks: Path, tokens: TokenSet) -> Path:
    """The lines of the file that are in the training split: those whose ids its tokens hold."""
    from data_prep.chat.chat_tokenizer import ChatTokenizer
    from data_prep.chat.messages import conversation_of
    from data_prep.token_sets.documents import conversations_of

    tokenizer, marks = load_tokenizer(tokens.tokenizer_spec), tokens.marks("train")
    assert isinstance(tokenizer, ChatTokenizer) and marks is not None
    there = {tuple(ids.tolist()) for ids in conversations_of(tokens.split("train"), marks)}
    lines = talks.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if tuple(tokenizer.render(conversation_of(json.loads(line))).ids.tolist()) in there]
    assert len(kept) == len(there)
    path = talks.with_name("training.jsonl")
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
