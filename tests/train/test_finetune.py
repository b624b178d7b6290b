"""Fine-tuning: adapters or all weights, from our own checkpoints; killed, resumed, moved, written with and exported."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoint_files import (
    find_checkpoint,
    list_checkpoints,
    read_checkpoint_manifest,
    write_checkpoint_manifest,
)
from common.errors import UserError
from eval import summary
from eval.reporting import page_sections
from eval.reporting.run_data import load_run
from eval.shared.loading import load_checkpoint
from model.config import ModelConfig
from model.counts import flops_per_token, parameter_count
from model.gpt import GPT
from model.lora import add_lora, lora_tensors
from model.lora_config import LoraConfig, adapter_count
from model.weights import load_model, read_tensors
from tests.eval.checkpoints import write_checkpoint
from tests.helpers.forked_command import run_command
from tests.helpers.mounts import small_disk
from tests.helpers.ranks import RankGroup
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT, curve, losses, run_of, tiny_arguments, train, weights_hashes
from tests.model.small import random_tokens
from train.finetune import finetune_command
from train.settings.command_line import read_command
from train.settings.sections import LoraSection

FINETUNE = PROJECT / "train" / "finetune.py"
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False, "n_kv_head": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), block_size=16, dropout=0.1)


def arguments(base: Path, folder: Path, data: Path, name: str, *more: str) -> list[str]:
    """The command line of a tiny fine-tuning: the tiny run's, whose section model the base replaces."""
    tiny_arguments(folder, data, name)
    config = folder / "finetune.yaml"
    text = (folder / "tiny.yaml").read_text()
    config.write_text("\n".join(line for line in text.splitlines() if not line.startswith("model:")))
    options = [f"--config={config}", f"--data.path={data}", f"--run.root={folder / 'runs'}", f"--run.name={name}"]
    return [str(base), *options, *more]


def finetune_as_rank(command: list[str]) -> None:
    """`train/finetune.py` with these arguments, in this (rank's) process."""
    from common.errors import exit_on_user_error
    from train.finetune import main

    sys.argv = [str(FINETUNE), *command]
    exit_on_user_error(main)


def start(world_size: int, folder: Path, command: list[str]) -> RankGroup:
    return RankGroup(world_size, folder / "store", finetune_as_rank, command)


def finetune(world_size: int, folder: Path, command: list[str]) -> None:
    assert start(world_size, folder, command).join() == [0] * world_size


def refusal(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> str:
    from train.finetune import main

    monkeypatch.setattr(sys, "argv", [str(FINETUNE), *command])
    with pytest.raises(UserError) as error:
        main()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_begins_as_its_base_changes_adapters_alone_and_is_merged_to_evaluate(
    tmp_path: Path, data: Path, base: Path
) -> None:
    command = arguments(base, tmp_path, data, "tuned", "--lora.rank=2", "--lora.dropout=0.1", "--run.max_steps=10")
    finetune(1, tmp_path, command)
    run = run_of(tmp_path, "tuned")
    found = losses(run)
    assert found[10] < found[1] - 0.05
    checkpoint = list_checkpoints(run.checkpoints)[0][1]
    saved = read_tensors(checkpoint.glob("weights-*"))
    given, kept = load_model(base), load_model(run.checkpoints / "base", verify_hashes=True)
    for name, value in given.named_parameters():
        assert torch.equal(kept.get_parameter(name), value), name
    assert set(saved) == {f"{name}.{part}" for name, part in lora_names(given.config)}
    add_lora(kept, LoraConfig(rank=2), seed=99)
    for name, adapter in lora_tensors(kept).items():
        adapter.data.copy_(saved[name])
    merged, tokens = load_model(checkpoint), random_tokens(2, 16, vocab=257)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in given.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), kept.eval()(tokens), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(merged(tokens), given(tokens), atol=1e-3)
    config = ModelConfig(**json.loads((checkpoint / "checkpoint.json").read_text())["model"])
    assert sum(value.numel() for value in saved.values()) == adapter_count(config, LoraConfig(rank=2))


def lora_names(config: ModelConfig) -> list[tuple[str, str]]:
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    return [(f"h.{i}.{name}", part) for i in range(config.n_layer) for name in layers for part in ("lora_a", "lora_b")]


def test_its_report_counts_its_work_and_names_commands_that_work(
    tmp_path: Path, data: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(1, tmp_path, arguments(base, tmp_path, data, "tuned", "--run.max_steps=5"))
    run = load_run(run_of(tmp_path, "tuned").path)
    model = load_model(base).config
    assert run.flops_per_token == flops_per_token(model, adapters=adapter_count(model, LoraConfig()))
    (again,) = re.findall(r"^python (train/.*)", html.unescape(page_sections.provenance([run])), flags=re.MULTILINE)
    done = subprocess.run(
        [sys.executable, *shlex.split(again.removesuffix("</pre>"))],
        cwd=PROJECT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, (again, done.stderr)
    assert losses(run_of(tmp_path, "tuned-again")) == losses(run.folder)
    summary.print_next(run.folder, summary.summarise(run.folder))
    proposed = capsys.readouterr().out
    assert f"train/finetune.py {base} --config" in proposed
    assert "pretrain.py" not in proposed and "wider" not in proposed


def test_its_validation_before_the_first_step_is_the_bases(tmp_path: Path, data: Path, base: Path) -> None:
    for name, rank in (("adapters", 2), ("all", 0)):
        finetune(1, tmp_path, arguments(base, tmp_path, data, name, f"--lora.rank={rank}", "--run.max_steps=1"))
    first = [curve(run_of(tmp_path, name))[0] for name in ("adapters", "all")]
    assert first[0] == first[1]
    assert first[0][4] != "None"
    assert "WARNING" not in run_of(tmp_path, "all").log.read_text()


@pytest.mark.parametrize(("world_size", "rank"), [(2, 2), (1, 0)])
def test_killed_it_goes_on_to_the_bit(tmp_path: Path, data: Path, base: Path, world_size: int, rank: int) -> None:
    given = tmp_path / "given" / base.name
    shutil.copytree(base, given)
    more = ("--checkpoint.every_steps=4", "--run.max_steps=12", f"--lora.rank={rank}")
    finetune(world_size, tmp_path, arguments(given, tmp_path, data, "calm", *more))
    command = arguments(given, tmp_path, data, "killed", *more)
    killed = run_of(tmp_path, "killed")
    group = start(world_size, tmp_path, command)
    while not list_checkpoints(killed.checkpoints):
        assert group.processes[0].is_alive(), "the run ended before it could be killed"
    group.kill()
    shutil.rmtree(given)  # a run needs nothing outside its folder any more
    finetune(world_size, tmp_path, command)
    assert curve(killed) == curve(run_of(tmp_path, "calm"))
    ends = [weights_hashes(list_checkpoints(run_of(tmp_path, name).checkpoints)[0][1]) for name in ("calm", "killed")]
    assert ends[0] == ends[1]


def test_a_moved_run_is_whole_and_adapters_without_their_base_are_named(tmp_path: Path, data: Path, base: Path) -> None:
    finetune(1, tmp_path, arguments(base, tmp_path, data, "moved", "--run.max_steps=2"))
    folder = tmp_path / "elsewhere" / "run"
    shutil.move(run_of(tmp_path, "moved").path, folder)
    assert isinstance(load_checkpoint(folder).model, GPT)
    checkpoint = find_checkpoint(folder)
    lonely = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, lonely)
    with pytest.raises(UserError, match="copy the run's folder whole"):
        load_checkpoint(lonely)
    weights = next((checkpoint.parent / "base").glob("weights-*"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="has changed since"):
        find_checkpoint(folder)


def test_a_base_that_is_damaged_or_finds_no_room_is_one_line(
    tmp_path: Path, data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(base, tmp_path, data, "full")
    run = run_of(tmp_path, "full")
    with small_disk(run.path, 40):
        assert refusal(monkeypatch, command).endswith(
            "can't be written (No space left on device): free some space, or name a path on another disk"
        )
        assert list(run.checkpoints.iterdir()) == []
    manifest = run.checkpoints / "base" / "checkpoint.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text((base / "checkpoint.json").read_text()[:100])  # a copy of the run that was cut short
    assert "base/checkpoint.json is damaged: without its base" in refusal(monkeypatch, command)
    facts = read_checkpoint_manifest(base)
    write_checkpoint_manifest(manifest.parent, facts)
    assert "base/checkpoint.json is damaged (identity: it is missing): without" in refusal(monkeypatch, command)
    shutil.rmtree(manifest.parent)
    manifest.parent.symlink_to("nowhere")
    assert "base/checkpoint.json can't be read" in refusal(monkeypatch, command)


def test_a_base_that_does_not_hold_its_model_leaves_no_run_behind(
    tmp_path: Path, data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    facts = read_checkpoint_manifest(other)
    facts["model"]["n_layer"] += 1
    write_checkpoint_manifest(other, facts)
    for rank in (0, 2):
        command = arguments(other, tmp_path, data, "new", f"--lora.rank={rank}")
        assert f"{other} does not hold this model: missing" in refusal(monkeypatch, command)
        assert not run_of(tmp_path, "new").path.exists()


def test_a_llama_is_tuned_on_shorter_texts_tuned_again_and_exported(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from eval import export_hf

    llama = write_checkpoint(tmp_path, **LLAMA)
    first = arguments(llama, tmp_path, data, "first", "--run.max_steps=2", "--model.block_size=8", "--lora.rank=1")
    finetune(1, tmp_path, first)
    again = arguments(run_of(tmp_path, "first").path, tmp_path, data, "again", "--run.max_steps=2", "--lora.alpha=4")
    again += ["--lora.targets=[q, v, gate]"]
    finetune(1, tmp_path, again)
    monkeypatch.setattr(sys, "argv", ["export", str(run_of(tmp_path, "again").path), str(tmp_path / "out")])
    assert export_hf.main() == 0  # which compares logits with transformers' own
    assert load_checkpoint(run_of(tmp_path, "again").path).model.config.block_size == 8


def test_learned_positions_are_cut_to_shorter_texts(tmp_path: Path, data: Path, base: Path) -> None:
    finetune(1, tmp_path, arguments(base, tmp_path, data, "short", "--run.max_steps=1", "--model.block_size=8"))
    model, given = load_checkpoint(run_of(tmp_path, "short").path).model, load_model(base)
    assert torch.equal(model.get_parameter("wpe.weight"), given.get_parameter("wpe.weight")[:8])


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (("--lora.rank=-1",), "or 0 to train all weights"),
        (("--lora.dropout=1",), "lora.dropout is 1"),
        (("--lora.alpha=0",), "lora.alpha is 0"),
        (('--lora.targets=["q_proj"]',), "choose from c_attn"),
        (('--lora.targets=["q", "gate"]',), "has no gate"),
        (("--lora.rnk=4",), "did you mean --lora.rank"),
        (("--model.n_layer=3",), "the base has 2"),
        (("--model.preset=gpt2-124m",), "leave section model out"),
        (("--model.block_size=32",), "learned 16 positions"),
        (("--resume=never", "--run.max_steps=0"), "run.max_steps is 0"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, data: Path, base: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], names: str
) -> None:
    assert names in refusal(monkeypatch, arguments(base, tmp_path, data, "refused", *more))
    assert not run_of(tmp_path, "refused").path.exists()


def test_bases_and_runs_that_do_not_belong_together_are_refused(
    tmp_path: Path, data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "missing RUN_OR_CHECKPOINT" in refusal(monkeypatch, arguments(base, tmp_path, data, "x")[1:])
    assert "is not a folder" in refusal(monkeypatch, arguments(tmp_path / "no", tmp_path, data, "x"))
    other_data = tmp_path / "other-data"
    make_token_set(other_data, vocab_size=65)
    mixed = refusal(monkeypatch, arguments(base, tmp_path, other_data, "x"))
    assert f"prepare the data again with --tokenizer {base}" in mixed
    finetune(1, tmp_path, arguments(base, tmp_path, data, "begun", "--run.max_steps=1"))
    other_base = write_checkpoint(tmp_path / "other", block_size=16, seed=1)
    begun = run_of(tmp_path, "begun")
    assert "started from another base" in refusal(monkeypatch, arguments(other_base, tmp_path, data, "begun"))
    train(1, tmp_path, tiny_arguments(tmp_path, data, "pretrained", "--run.max_steps=1"))
    pretrained = arguments(base, tmp_path, data, "pretrained")
    assert "not a run of finetune.py" in refusal(monkeypatch, pretrained)
    step = find_checkpoint(begun.path)
    codes = RankGroup(
        1, tmp_path / "store", finetune_as_rank, arguments(base, tmp_path, data, "begun", "--lora.rank=4")
    )
    assert codes.join() == [2]  # the adapters' rank is part of what makes the run
    from train.pretrain import main

    monkeypatch.setattr(sys, "argv", ["pretrain", *tiny_arguments(tmp_path, data, "y", f"--resume={step}")])
    with pytest.raises(UserError, match=r"resume it with train/finetune\.py"):
        main()


@pytest.mark.parametrize("options", [{}, LLAMA, {"attention": "differential"}], ids=str)
@pytest.mark.parametrize("targets", [("c_attn",), ("c_proj", "c_fc"), ("q", "v"), ("k", "o", "up", "gate", "down")])
def test_adapters_are_counted_in_closed_form(options: dict[str, object], targets: tuple[str, ...]) -> None:
    from tests.model.small import small_model

    model, config = small_model(**options), LoraConfig(rank=3, targets=targets)
    add_lora(model, config, seed=0)
    count = sum(value.numel() for value in lora_tensors(model).values())
    assert adapter_count(model.config, config) == count
    active = parameter_count(model.config) - (0 if options == LLAMA else model.config.block_size * model.config.n_embd)
    saved = flops_per_token(model.config) - flops_per_token(model.config, adapters=count)
    assert saved == 2 * active - 6 * count


def test_all_weights_have_no_adapters(tmp_path: Path, base: Path) -> None:
    assert LoraSection(rank=0).adapters() is None
    assert LoraSection().adapters() == LoraConfig()
    # as docs/finetuning.md has it, on top of the default file, whose dropout is for adapters
    config, _ = read_command(finetune_command(str(base)), ["--lora.rank=0", f"--run.root={tmp_path}"])
    assert config.adapter_count() is None


def test_every_command_of_the_page_works(tmp_path: Path) -> None:
    """On a tiny GPT-2 in place of the demo, and with settings for its size."""
    text = (PROJECT / "docs" / "finetuning.md").read_text()
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    write_checkpoint(tmp_path / "runs" / "demo" / "checkpoints", tokenizer="gpt2", block_size=16, n_layer=1)
    (tmp_path / "notes").mkdir()
    for number in range(200):  # one in 32 is for validation
        (tmp_path / "notes" / f"{number}.txt").write_text(f"Note {number}: words upon words, and one more word. " * 3)
    smaller = {
        "data_prep/text_files.py": ["--val-tokens", "300", "--workers", "0"],
        "train/finetune.py": ["--batch.tokens_per_step=64", "--eval.tokens=64", "--run.max_steps=2"],
        "eval/generate.py": ["--max-tokens", "4"],
    }
    assert len(lines) == 6
    for line in lines:
        python, script, *options = shlex.split(line)
        assert python == "python"
        done = run_command([script, *options, *smaller.get(script, [])], tmp_path)
        assert done.status == 0, (line, done)
