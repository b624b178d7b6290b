"""What is written into a configuration is read back, and text is the text that was written, whatever it looks like."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from train.settings.command_line import DEFAULT_CONFIG, as_dict, read_config, to_yaml
from train.settings.sections import Config, DataConfig, EvalConfig, LogConfig, RunConfig

# numbers, booleans, dates and nothing to YAML 1.1, to 1.2, or to jsonargparse alone; and YAML's own signs
WORDS = """
12345e6 3e-4 1e3 12 -7 007 0o17 0x10 0b11 1_000 1.5 .5 1. +1 .inf -.INF .nan NaN inf 1:30 190:20:30.15 yes No ON off y N
true False null NULL ~ 2026-05-01 2026-05-01T06:00:00Z
= << - ? : [a] {a} *a &a !a %a @a `a #x a:b | > 'q' "q" \\n é 😀 ~/x
"""
LOOKALIKES = [*WORDS.split(), "", " ", " x", "x ", "a: b", "a #b", "- a", "\n", "a\nb", "\t", "\udc80"]
NO_TEXT_IN_YAML_1_2 = re.compile(  # its core schema
    r"|~|null|Null|NULL|true|True|TRUE|false|False|FALSE|[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+"
    r"|[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
TEXTS = st.sampled_from(LOOKALIKES) | st.text(max_size=150) | st.text(alphabet="0123456789eE.+-_xob:aT Z", max_size=12)
NAMES = TEXTS.filter(lambda name: bool(name) and "/" not in name and not name.startswith("."))


def read_text(text: str, *more: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return read_config([f"--config={path}", *more])[0]


@settings(max_examples=50, deadline=None)
@given(name=NAMES, path=TEXTS, stage_to=TEXTS.filter(bool) | st.none(), prompts=st.lists(TEXTS, max_size=3))
@example(name="12345e6", path="12345e6", stage_to="null", prompts=["12345e6", "yes", "null"])
def test_what_is_written_is_read_back(name: str, path: str, stage_to: str | None, prompts: list[str]) -> None:
    default, _ = read_config([])
    config = Config(
        model=default.model,
        data=DataConfig(path=path, stage_to=stage_to),
        eval=EvalConfig(prompts=prompts, hellaswag_data=stage_to),
        log=LogConfig(wandb_project=path),
        run=RunConfig(root=path, name=name),
    )
    text = to_yaml(config)
    assert read_text(text) == config
    assert yaml.safe_load(text) == as_dict(config)  # YAML 1.1, as reports read it
    assert text.isascii()
    for word in plain_texts(yaml.compose(text, yaml.SafeLoader)):
        assert not NO_TEXT_IN_YAML_1_2.fullmatch(word)


def plain_texts(node: Any) -> list[str]:
    """What stands without quotes and is text to PyYAML."""
    if isinstance(node, yaml.ScalarNode):
        return [node.value] if node.style is None and node.tag.endswith(":str") else []
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    return [word for part in parts for word in plain_texts(part)]


@settings(max_examples=40, deadline=None)
@given(name=NAMES.filter(lambda name: name != "null"), prompts=st.lists(TEXTS, max_size=3))
def test_text_on_the_command_line_is_that_text(name: str, prompts: list[str]) -> None:
    listed = yaml.dump(prompts, default_style='"', default_flow_style=True, width=10**6)
    config, _ = read_config([f"--run.name={name}", f"--log.wandb_project={name}", f"--eval.prompts={listed}"])
    assert (config.run.name, config.log.wandb_project, config.eval.prompts) == (name, name, prompts)


def test_each_lookalike_reads_as_text_where_a_user_writes_it_plainly() -> None:
    for word in LOOKALIKES:
        try:
            plain = yaml.compose(f"run: {{name: {word}}}", yaml.SafeLoader)
        except yaml.YAMLError:
            continue
        node = plain.value[0][1].value[0][1]
        if not isinstance(node, yaml.ScalarNode) or node.tag.endswith("null") or node.value.startswith((".", "~/")):
            continue
        assert read_text(f"run: {{name: {word}}}").run.name == node.value, word
    config = read_text("eval: {prompts: [12345e6, yes, 2026-05-01]}\noptim: {lr: 3e-4}\nrun: {max_steps: 1_000}")
    assert config.eval.prompts == ["12345e6", "yes", "2026-05-01"]
    assert (config.optim.lr, config.run.max_steps) == (3e-4, 1000)  # numbers are numbers


def test_lists_null_and_precedence(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("data: {stage_to: 1e3}\neval: {prompts: [one]}\nrun: {name: 7}")
    second.write_text("data: {stage_to: null}\nrun: {root: 0x10}")
    files = [f"--config={first}", f"--config={second}"]
    config, _ = read_config(files)
    assert (config.data.stage_to, config.eval.prompts, config.run.name, config.run.root) == (None, ["one"], "7", "0x10")
    config, _ = read_config([*files, "--eval.prompts+=2", "--eval.prompts+", "[yes, no]", "--run.name", "8"])
    assert (config.eval.prompts, config.run.name) == (["one", "2", "yes", "no"], "8")
    assert read_config([*files, "--data.stage_to=x", "--data.stage_to=null"])[0].data.stage_to is None
    with pytest.raises(UserError, match=r"data.stage_to is empty"):
        read_config(["--data.stage_to="])
    with pytest.raises(UserError, match=r"run.name is \['a'\]: use text or null"):
        read_config(["--config", str(DEFAULT_CONFIG), f"--config={_written(tmp_path, 'run: {name: [a]}')}"])
    with pytest.raises(UserError, match=r"is not YAML: month must be in 1\.\.12"):
        read_config([f"--config={_written(tmp_path, 'optim: {lr: 2026-13-01}')}"])


def _written(folder: Path, text: str) -> Path:
    path = folder / "written.yaml"
    path.write_text(text)
    return path
