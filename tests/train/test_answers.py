"""Supervised fine-tuning: the loss of answers only, the same however the batch is cut up and as transformers has it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common.checkpoint_files import CHECKPOINT_MANIFEST, list_checkpoints, write_checkpoint_manifest
from common.errors import UserError
from common.metrics_file import read_metrics
from common.run_folder import RunFolder
from data_prep.token_sets.documents import conversations_of
from data_prep.token_sets.manifest import COUNTED, MANIFEST_FILE, NO_MARK, PREFERENCES, STARTS
from data_prep.token_sets.packing import IGNORE, PackedSequences
from data_prep.token_sets.token_set import TokenSet
from eval.summary import print_figures, print_next, summarise
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import Ranks, start_ranks
from tests.helpers.conversation_sets import make_conversation_set
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, run_of, tiny_arguments, train, train_by_path
from train.batches.loader import StepBatch, StepLoader
from train.batches.plan import BatchPlan, plan_batch
from train.batches.training_sequences import prepare_packing, training_sequences
from train.checkpoints.resume import check_same_run
from train.objectives.answers import Answers
from train.optimization.ddp import Parallel
from train.optimization.step import Stepper
from train.settings.command_line import read_config
from train.startup.announce import describe_packing

LENGTH, SEQUENCES = 64, 8
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
SFT = ("--objective=sft", "--model.block_size=64", "--batch.tokens_per_step=512", "--batch.micro_batch=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    make_conversation_set(folder)
    return folder


@pytest.fixture(scope="module")
def with_silence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of it has sequences in which nothing counts."""
    folder: Path = tmp_path_factory.mktemp("silent")
    make_conversation_set(folder, count=60, silent=12)
    prepare_packing(TokenSet.open(folder), LENGTH, ALONE)
    return folder


def small_gpt(tokens: TokenSet) -> GPT:
    size = tokens.tokenizer_spec["vocab_size"]
    model = GPT(ModelConfig(vocab_size=size, block_size=LENGTH, n_layer=2, n_head=2, n_embd=16))
    initialise(model, seed=1)
    return model


def packed_of(tokens: TokenSet) -> PackedSequences:
    sequences = training_sequences(tokens, LENGTH, stride=None, packed=True, mask_documents=True)
    assert isinstance(sequences, PackedSequences)
    return sequences


class Kept(torch.optim.Optimizer):
    """Changes nothing and keeps the gradients."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model.parameters(), {})
        self._model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        named = self._model.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def batch_of(tokens: TokenSet, plan: BatchPlan, rank: int) -> StepBatch:
    return StepLoader(packed_of(tokens), plan, rank=rank, seed=5).step_at(0)


def one_step(data: Path, world_size: int, micro_batch: int) -> tuple[float, float, int, dict[str, np.ndarray]]:
    """Loss, number of targets, this rank's micro-batches in which nothing counts, and gradients."""
    tokens, ranks = TokenSet.open(data), start_ranks("cpu")
    model = small_gpt(tokens)
    plan = plan_batch(SEQUENCES * LENGTH, LENGTH, micro_batch, world_size)
    optimizer, batch = Kept(model), batch_of(tokens, plan, ranks.rank)
    stepper = Stepper(
        Parallel(model, ranks), optimizer, ranks, plan, Answers(), dtype="fp32", grad_clip=0.0, seed=1
    )  # fmt: skip
    stepper.warm_up(LENGTH, document_mask=True)
    result = stepper(batch, 1)
    silent = int((batch.targets == IGNORE).all(dim=2).all(dim=1).sum())
    return result.loss, result.targets, silent, {n: g.numpy() for n, g in optimizer.gradients.items()}


def transformers_step(data: Path) -> tuple[float, int, dict[str, np.ndarray]]:
    """The same conversations, each in a padded row of its own, through transformers' GPT-2 and its loss for labels."""
    transformers = pytest.importorskip("transformers")
    from eval.hugging_face.hf_config import to_config
    from eval.hugging_face.hf_tensors import to_tensors

    tokens = TokenSet.open(data)
    model = small_gpt(tokens)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**to_config(model.config, None))).eval()
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    theirs.load_state_dict(to_tensors(model.config, own), strict=False)
    batch = batch_of(tokens, plan_batch(SEQUENCES * LENGTH, LENGTH, SEQUENCES, 1), 0)
    stream, marks = tokens.split("train"), tokens.marks("train")
    assert marks is not None
    chosen = {
        tuple(batch.tokens[0, row][batch.document_ids[0, row] == n].tolist())  # type: ignore[index]
        for row in range(SEQUENCES)
        for n in range(40)
    }
    rows, place = [], 0
    for ids in conversations_of(stream, marks):
        counted = marks.read(place, place + len(ids)) == COUNTED
        place += len(ids)
        if tuple(ids[:-1].tolist()) in chosen:
            chosen.discard(tuple(ids[:-1].tolist()))
            rows.append((ids.astype(np.int64), counted))
    width = max(len(ids) for ids, _ in rows)
    inputs, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE)
    for row, (ids, counted) in enumerate(rows):
        inputs[row, : len(ids)], mask[row, : len(ids)] = torch.from_numpy(ids), 1
        labels[row, : len(ids)] = torch.from_numpy(np.where(counted, ids, IGNORE))
    count = int((labels != IGNORE).sum())
    loss = theirs(inputs, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
    loss.backward()
    return loss.item(), count, {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}


def test_gradients_are_transformers_for_any_ranks_and_micro_batches(with_silence: Path, tmp_path: Path) -> None:
    from eval.hugging_face.hf_tensors import to_tensors

    loss, count, expected = transformers_step(with_silence)
    config = small_gpt(TokenSet.open(with_silence)).config
    silent = 0
    for world_size, micro_batch in ((1, 8), (1, 1), (2, 1), (2, 2)):
        ranks = run_ranks(
            world_size, tmp_path / f"{world_size}-{micro_batch}", one_step, with_silence, world_size, micro_batch
        )
        for its_loss, its_count, its_silent, gradients in ranks:
            assert its_loss == pytest.approx(loss, abs=1e-5)
            assert its_count == count
            silent += its_silent
            mapped = to_tensors(config, {name: torch.from_numpy(value) for name, value in gradients.items()})
            for name, value in expected.items():
                np.testing.assert_allclose(mapped[name].numpy(), value, atol=1e-5, err_msg=name)
    assert silent, "some micro-batches have no answer"


def test_a_step_without_an_answer_has_no_gradient(with_silence: Path) -> None:
    tokens, ranks = TokenSet.open(with_silence), start_ranks("cpu")
    model, plan = small_gpt(tokens), plan_batch(2 * LENGTH, LENGTH, 1, 1)
    optimizer, batch = Kept(model), batch_of(tokens, plan, 0)
    silent = replace(batch, targets=torch.full_like(batch.targets, IGNORE), total_target_count=0)
    result = Stepper(Parallel(model, ranks), optimizer, ranks, plan, Answers(), dtype="fp32", grad_clip=0.0, seed=1)(
        silent, 1
    )
    assert (result.loss, result.targets, result.grad_norm) == (0.0, 0.0, 0.0)
    assert not any(gradient.any() for gradient in optimizer.gradients.values())


@pytest.mark.parametrize(("split", "fill"), [("train", NO_MARK), ("val", NO_MARK), ("train", STARTS)])
def test_marks_that_were_not_prepared_are_refused(tmp_path: Path, split: str, fill: int) -> None:
    """Though hashes and sizes fit: they would teach the model to talk as the user, or nothing."""
    folder = make_conversation_set(tmp_path / "data", count=40, val_count=9).folder
    for path in folder.glob(f"{split}-marks-*.bin"):
        marks = np.fromfile(path, dtype=np.uint16)
        np.where(marks == COUNTED, fill, marks).astype(np.uint16).tofile(path)
    done = train_by_path(*tiny_arguments(tmp_path, folder, "it", *SFT))
    assert done.returncode == 2, done.stderr
    assert f"the marks of the {split} split of {folder} are not those that were prepared: copy" in done.stderr


def test_only_answers_and_their_ends_are_targets(data: Path) -> None:
    tokens = TokenSet.open(data)
    prepare_packing(tokens, LENGTH, ALONE)
    packed = packed_of(tokens)
    numbers = np.arange(packed.count)
    rows = packed.rows(numbers)
    counted = rows.targets != IGNORE
    assert packed.target_count(numbers) == counted.sum() == tokens.manifest.conversations["train"]["answer_tokens"]  # type: ignore[index]
    from tests.helpers.conversation_sets import short_tokenizer

    tokenizer = short_tokenizer()
    texts = tokenizer.decode(rows.targets[counted]).split("<|end|>")
    assert texts.pop() == ""
    assert all(text.isdigit() for text in texts)
    assert len(texts) == np.count_nonzero(rows.inputs == tokenizer.special_spellings["<|bot|>"])
    assert packed.facts.left_out == 0 and "left out" not in describe_packing(packed)[0]


def test_the_log_counts_conversations_longer_than_a_sequence(data: Path) -> None:
    tokens = TokenSet.open(data)
    marks = tokens.marks("train")
    assert marks is not None
    targets = [len(ids) - 1 for ids in conversations_of(tokens.split("train"), marks)]
    length = int(np.median(targets))
    prepare_packing(tokens, length, ALONE)
    packed = training_sequences(tokens, length, stride=None, packed=True, mask_documents=True)
    assert isinstance(packed, PackedSequences)
    longer = sum(count > length for count in targets)
    assert 0 < longer < len(targets)
    (line,) = describe_packing(packed)
    assert f"packing: {len(targets) - longer:,} conversations in " in line
    assert f"{longer:,} conversations longer than one left out" in line


def steps(run: RunFolder) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run.metrics) if "grad_norm" in record]


SHARDED, MUON = "--optim.shard=true", "--optim.kind=muon"


@pytest.mark.parametrize(("ranks", "more"), [(2, ()), (2, (SHARDED,)), (2, (MUON, SHARDED)), (1, (MUON,))], ids=str)
def test_a_run_is_the_same_for_any_ranks_and_interruptions(
    ranks: int, more: tuple[str, ...], tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*SFT, *more, "--schedule.kind=constant", "--run.max_steps=8")
    train(ranks, tmp_path, tiny_arguments(tmp_path, data, "two", *options))
    train(ranks, tmp_path, tiny_arguments(tmp_path, data, "cut", *options, "--run.max_steps=3"))
    train(ranks, tmp_path, tiny_arguments(tmp_path, data, "cut", *options))
    two = run_of(tmp_path, "two")
    assert [row for row in curve(run_of(tmp_path, "cut")) if row[-1] != "None"] == [
        row for row in curve(two) if row[-1] != "None"
    ]
    if more:
        return
    samples = ("--eval.sample_every_steps=4", "--eval.sample_tokens=4", '--eval.prompts=["1+1"]')
    options = (*options, "--model.dropout=0", "--run.max_steps=4")
    train(1, tmp_path, tiny_arguments(tmp_path, data, "one", *options, *samples))
    assert '"prompt": "1+1"' in run_of(tmp_path, "one").samples.read_text()
    assert "objective: sft, the answers of conversations" in two.log.read_text()
    print_figures(summarise(two))
    print_next(two, summarise(two))
    shown = capsys.readouterr().out
    assert "tokens of answers of sha256" in shown and f"eval/chat.py {two.path} " in shown
    train(2, tmp_path, tiny_arguments(tmp_path, data, "dry", *options))
    one, dry = steps(run_of(tmp_path, "one")), steps(run_of(tmp_path, "dry"))
    np.testing.assert_allclose([s["loss"] for s in one], [s["loss"] for s in dry], atol=1e-5)
    for key in ("sequences", "answer_tokens"):
        assert [record[key] for record in one] == [record[key] for record in dry]
    (plan,) = data.glob("packing-*-64-*")
    tokens = TokenSet.open(data)
    packed = PackedSequences.read(tokens.split("train"), plan, marks=tokens.marks("train"))
    for record in steps(two):
        assert record["answer_tokens"] == packed.target_count(np.array(record["sequences"]))
    validations = [record for record in read_metrics(two.metrics) if "val_loss" in record]
    assert validations[-1]["val_tokens"] <= tokens.manifest.conversations["val"]["answer_tokens"]  # type: ignore[index]
    assert validations[-1]["val_loss"] < validations[0]["val_loss"]
    written = yaml.safe_load(two.config.read_text())
    assert (written["objective"]["kind"], written["data"]["packing"]) == ("sft", "whole_documents")
    # another objective on resume is refused by name; one that a checkpoint doesn't name was language modelling
    checkpoint = list_checkpoints(two.checkpoints)[0][1]
    other = written | {"objective": {"kind": "language_modelling"}}
    with pytest.raises(UserError, match=r'objective\.kind "sft", this run has "language_modelling"'):
        check_same_run(checkpoint, other, tokens.identity, [], optimizer="adamw")
    manifest = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_text())
    del manifest["config"]["objective"]
    write_checkpoint_manifest(checkpoint, manifest)
    with pytest.raises(UserError, match=r'objective\.kind "language_modelling", this run has "sft"'):
        check_same_run(checkpoint, written, tokens.identity, [], optimizer="adamw")


def test_the_objective_is_fixed_and_fits_the_data(tmp_path: Path, data: Path) -> None:
    texts = make_token_set(tmp_path / "texts").folder
    arguments = tiny_arguments(tmp_path, data, "it", *SFT)
    config, _ = read_config(["--objective", "sft"])
    assert config.objective.kind == "sft"

    def refused(*more: str) -> str:
        done = train_by_path(*arguments, *more)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "does not mark answers" in refused(f"--data.path={texts}")
    assert "add --objective sft" in refused("--objective.kind=language_modelling")
    with_pairs = tmp_path / "pairs"
    shutil.copytree(data, with_pairs)
    manifest = json.loads((with_pairs / MANIFEST_FILE).read_text())
    (with_pairs / MANIFEST_FILE).write_text(json.dumps(manifest | {"source": {"name": PREFERENCES}}))
    assert "would learn the rejected answers" in refused(f"--data.path={with_pairs}")
    assert "data.stride doesn't go with --objective sft" in refused("--data.stride=8")


def test_sets_of_conversations_are_mixed_and_staged(tmp_path: Path) -> None:
    """Each on the node's disk, to the bit when interrupted, the same for two ranks; a set of texts is refused."""
    mix = []
    for seed, name in enumerate(("sums", "more")):
        make_conversation_set(tmp_path / name, count=150 - 50 * seed, val_count=20 + 10 * seed, seed=seed)
        mix.append({"name": name, "path": str(tmp_path / name), "weight": 3.0 - 2 * seed})
    file = tmp_path / "mix.yaml"
    file.write_text(yaml.safe_dump({"data": {"mix": mix}}), encoding="utf-8")
    staged, options = f"--data.stage_to={tmp_path / 'disk'}", (*SFT, "--schedule.kind=constant", "--model.dropout=0")

    def arguments(name: str, *more: str) -> list[str]:
        config, _, *others = tiny_arguments(tmp_path, tmp_path, name, *options, "--run.max_steps=6", *more)
        return [config, f"--config={file}", *others]

    train(1, tmp_path, arguments("calm"))
    train(1, tmp_path, arguments("cut", staged, "--run.max_steps=2"))
    train(1, tmp_path, arguments("cut", staged))
    train(2, tmp_path, arguments("two", staged))
    calm, cut, two = (run_of(tmp_path, name) for name in ("calm", "cut", "two"))
    of_mix = [[(s["loss"], s["sequences"], s["answer_tokens"]) for s in steps(run)] for run in (calm, cut)]
    assert of_mix[0] == of_mix[1]
    for one, other in zip(steps(calm), steps(two), strict=True):
        assert (one["sequences"], one["answer_tokens"]) == (other["sequences"], other["answer_tokens"])
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert {name for step in steps(calm) for name, _ in step["sequences"]} == {"sums", "more"}
    assert len([path for path in (tmp_path / "disk").iterdir() if list(path.glob("train-marks-*.bin"))]) == 2
    last = [record for record in read_metrics(calm.metrics) if "val_loss" in record][-1]
    by_source = last["val_loss_by_source"]
    assert last["val_loss"] == pytest.approx(0.75 * by_source["sums"] + 0.25 * by_source["more"])

    mix[1]["path"] = str(make_token_set(tmp_path / "texts").folder)
    file.write_text(yaml.safe_dump({"data": {"mix": mix}}), encoding="utf-8")
    done = train_by_path(*arguments("refused"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
