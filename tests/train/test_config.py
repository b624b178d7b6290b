"""Configuration: YAML, then the command line; whatever is wrong is one line that helps."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.errors import UserError
from tests.helpers.training import PRETRAIN, PROJECT, train_by_path
from train.finetune import finetune_command
from train.settings import command_line as config_of
from train.settings.command_line import (
    DEFAULT_CONFIG,
    Command,
    as_dict,
    field_names,
    read_command,
    read_config,
    to_yaml,
)
from train.settings.sections import Config


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_the_command_line_wins_over_the_file_over_the_preset_over_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {preset: gpt2-355m, n_layer: 3}\noptim: {lr: 3e-4}\nrun: {seed: 5}\n")
    config, _ = read_config(["--run.seed=7", file, "--model.bias=false"])
    assert (config.model.n_embd, config.model.n_head) == (1024, 16)  # the preset's
    assert config.model.n_layer == 3  # the file's
    assert (config.run.seed, config.model.bias) == (7, False)  # the command line's
    assert config.optim.lr == 3e-4  # though YAML 1.1 takes 3e-4 for a word
    assert config.optim.beta2 == 0.95  # the default
    assert config.run.name == "mine"


def test_a_preset_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "model: {preset: gpt2-355m, n_layer: 3}\n")
    for preset in (["--model.preset", "llama-124m"], ["--model.preset=llama-124m"]):
        config, _ = read_config([file, *preset])
        assert (config.model.n_embd, config.model.norm, config.model.n_layer) == (768, "rmsnorm", 3)


def test_later_files_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optim: {lr: 1.0, beta1: 0.5}")
    second.write_text("optim: {lr: 2.0}")
    config, _ = read_config(["--config", str(first), "--config", str(second)])
    assert (config.optim.lr, config.optim.beta1, config.run.name) == (2.0, 0.5, "b")


def test_an_empty_file_changes_nothing_but_names_the_run(tmp_path: Path) -> None:
    first, empty = tmp_path / "a.yaml", tmp_path / "none.yaml"
    first.write_text("optim: {beta1: 0.5}")
    empty.write_text("# nothing here yet\n")
    config, _ = read_config(["--config", str(first), "--config", str(empty)])
    assert (config.optim.beta1, config.run.name) == (0.5, "none")
    assert read_config(["--config", str(empty)])[0].optim == Config().optim


def test_without_a_file_it_is_the_124m_run_on_fineweb_edu() -> None:
    config, _ = read_config([])
    assert DEFAULT_CONFIG.stem == config.run.name == "gpt2-124m"
    assert config.data.path == "data/fineweb-edu"
    assert (config.model.n_layer, config.model.n_embd, config.run.max_steps) == (12, 768, 19_073)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {lrr: 1.0}", "unknown key optim.lrr, did you mean optim.lr?"),
        ("optin: {lr: 1.0}", "unknown section 'optin', did you mean optim?"),
        ("optim: 3", "section optim must hold keys and values"),
        ("- 3", "holds no sections"),
        ("optim: {lr: [", "is not YAML"),
        ("optim: {lr: fast}", "optim.lr"),
        ("optim: {lr: 1.0}\nrun: {}\noptim: {beta1: 0.5}", "is not YAML: duplicate key optim: merge the two"),
        ("optim:\n  lr: 1.0\n  beta1: 0.5\n  lr: 2.0", "is not YAML: duplicate key lr: merge the two"),
        ("optim:\n  lr:\n  beta1: 0.5", "optim.lr has no value: give one, or leave it out"),
        ("optim: {lr: .nan}", "optim.lr is nan: use a finite number"),
        ("schedule: {warmup: .inf}", "schedule.warmup is inf: use a finite number"),
        ("model: {n_layer: 2.5}", "model.n_layer"),
        ("model: {norm: batchnorm}", "model.norm"),
        ("model: {preset: gpt5}", "model.preset is 'gpt5': use one of"),
        ("model: {n_embd: 100, n_head: 3}", "model.n_embd is 100, not a multiple of model.n_head 3: use"),
        ("batch: {micro_batch: 0}", "batch.micro_batch is 0"),
        ("batch: {micro_batch: some}", "batch.micro_batch"),
        ("schedule: {warmup: 2.5}", "schedule.warmup is 2.5"),
        ("run: {name: a/b}", "run.name is 'a/b'"),
        ("data: {stride: 0}", "data.stride is 0"),
        ("data: {stride: 0.5}", "data.stride"),
        (
            "data: {stride: 2000}",
            "data.stride is 2000, which leaves out tokens between sequences of model.block_size 1024",
        ),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config([write(tmp_path, content)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr=1"], "unknown option --optim.lrr, did you mean --optim.lr?"),
        (["--optim.lr=fast"], "optim.lr"),
        (["--optim.lr=fast"], "optim.lr is fast: use a number (see --help)"),
        (["--batch.micro_batch=many"], "batch.micro_batch is many: use a whole number or auto (see --help)"),
        (["--model.window=wide"], "model.window is wide: use a whole number or null (see --help)"),
        (["--eval.prompts=Hello"], 'eval.prompts is Hello: use a list such as ["a", "b"] (see --help)'),
        (["--allow-change=model.n_embdd"], "no such option, did you mean model.n_embd?"),
        (["--lr=1"], "unknown option --lr, did you mean --optim.lr?"),
        (["train/configs/smoke.yaml"], "unexpected argument train/configs/smoke.yaml: use --config FILE"),
        (["--config"], "--config has no file: give the name of a YAML file"),
        (["--config=nowhere.yaml"], "nowhere.yaml can't be read (No such file or directory): name another --config"),
        (["--eval.choices=[1]"], 'eval.choices is [1]: use a mapping such as {"name": "value"} (see --help)'),
        (["--optim.lr=1e400"], "optim.lr is inf: use a finite number"),
        (["--run.lock_patience_seconds=.nan"], "run.lock_patience_seconds is nan: use a finite number"),
        (["stray"], "stray"),
        (["--model.n_layer"], "expected one argument"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(arguments)
    assert message in str(caught.value)


def test_a_file_of_something_else_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(b"\x90\xff\x00\x01")
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is not YAML"):
        read_config([f"--config={file}"])


def test_a_mistake_leaves_with_2_and_without_a_traceback(tmp_path: Path) -> None:
    done = train_by_path("--optim.lrr=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["error: unknown option --optim.lrr, did you mean --optim.lr? (see --help)"]
    assert list(tmp_path.iterdir()) == []


def test_what_print_config_prints_is_a_configuration(tmp_path: Path) -> None:
    arguments = ["--model.preset=llama-355m", "--optim.lr=3e-4", "--run.max_steps=5"]
    done = train_by_path("--print_config", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "gpt2-124m.yaml"
    path.write_text(done.stdout)
    assert read_config([f"--config={path}"])[0] == read_config(arguments)[0]


def test_a_shipped_configuration_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = read_config(["--config", "gpt2-355m", "--config=llama"])
    assert (config.model.n_embd, config.model.norm, config.run.name) == (1024, "rmsnorm", "llama")
    with pytest.raises(UserError, match=r"--config is gpt2-125m, .* did you mean gpt2-124m\?"):
        read_config(["--config=gpt2-125m"])
    Path("smoke").write_text("model: {n_layer: 3}")
    assert read_config(["--config=smoke"])[0].model.n_layer == 3, "a file of that name comes first"


def test_every_shipped_configuration_is_valid_and_survives_a_round_trip(tmp_path: Path) -> None:
    files = sorted((PROJECT / "train" / "configs").glob("**/*.yaml"))
    assert {"smoke", "demo", "gpt2-124m"} <= {file.stem for file in files}
    for file in files:
        command: Command[Any] = config_of.PRETRAIN
        if file.stem == "finetune":
            command = replace(finetune_command(""), base_of=None)
        config, _ = read_command(command, [f"--config={file}"])
        assert yaml.safe_load(to_yaml(config)) == as_dict(config)


def test_help_documents_every_option() -> None:
    command = [sys.executable, str(PRETRAIN)]
    short = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert short.returncode == 0
    assert len(short.stdout.splitlines()) < 80 and "--help-all shows all" in short.stdout
    assert "--optim.lr" in short.stdout and "--optim.betas" not in short.stdout
    done = subprocess.run([*command, "--help-all"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for name in field_names(Config):
        assert f"--{name} " in done.stdout, name
    described = done.stdout.split("options:")[1]
    undocumented = [line for line in described.splitlines() if line.strip().startswith("(type:")]
    assert not [name for name in field_names(Config) if _undocumented(described, name)], undocumented


def _undocumented(text: str, name: str) -> bool:
    """Whether an option's entry begins with its type: then it has no words of its own."""
    entry = text.split(f"--{name} ", 1)[1].split("\n  --", 1)[0]
    words = entry.split(None, 1)[1] if " " in entry else ""
    return words.lstrip().startswith("(type")
