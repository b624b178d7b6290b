"""Configurations in YAML and on a command line: a field of type text keeps the text that was written.

YAML 1.1 readers (PyYAML), 1.2 readers and jsonargparse each read other words as numbers, booleans, dates and null:
`12345e6`, `yes`, `1_000`, `0x10`, `1:30`, `2026-05-01`. So text is read by the field's type, whatever it looks like,
and written in quotes unless every reader reads it as text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from common.errors import UserError
from common.os_errors import refusal
from common.yaml_file import BadYaml, compose, construct, open_document, read_yaml_text

_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_PLAIN = re.compile(r"/?[A-Za-z][\w./-]*", re.ASCII)
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf", "infinity"}


def _is_text_or_list(kind: Any) -> bool:
    """Whether a field's type is text, or a list of texts; either may be null."""
    return _is_text(kind) or _is_list_of_text(kind)


def _is_text(kind: Any) -> bool:
    return kind is str or set(get_args(kind)) == {str, type(None)}


def _is_list_of_text(kind: Any) -> bool:
    return any(get_origin(one) is list and get_args(one) == (str,) for one in (kind, *get_args(kind)))


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file, read.

    Attributes:
        content: the keys and values of each section.
        texts: the values in `content` of fields of type text, by section.key.
        rest: all others, as YAML again; "" where there are none.
    """

    content: dict[str, Any]
    texts: dict[str, Any]
    rest: str


class UniqueKeysLoader(yaml.SafeLoader):
    """PyYAML's loader, which would silently forget the first of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.YAMLError(f"duplicate key {twice}: merge the two")
        return super().construct_mapping(node, deep)


def read_file(path: Path, types: dict[str, Any]) -> ConfigFile:
    """Args: types: of all fields, by section.key. Raises UserError naming the file."""
    try:
        loader = open_document(read_yaml_text(path), UniqueKeysLoader)
        try:
            node = compose(loader)
            texts = _take_texts(node, types) if isinstance(node, yaml.MappingNode) else {}
            content = construct(loader, node) or {}
        finally:
            loader.dispose()
    except OSError as error:
        raise UserError(f"configuration {refusal('read', error, path, otherwise='name another --config')}") from None
    except BadYaml as error:
        raise UserError(f"configuration {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"configuration {path} holds no sections: write some, such as model: and data:")
    found = {name: content[section][key] for name, section, key in texts}
    return ConfigFile(content, found, _without(node, {(section, key) for _, section, key in texts}))


def take_texts(arguments: list[str], types: dict[str, Any]) -> tuple[list[tuple[str, Any]], list[str]]:
    """Take the options out of a command line whose fields are text: (section.key, value) of each, and the others.

    A `+` behind the key adds to a list.
    """
    texts: list[tuple[str, Any]] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        kind = types.get(name.removesuffix("+"))
        if argument.startswith("--") and _is_text_or_list(kind) and (equals or (rest and not rest[0].startswith("-"))):
            value = value if equals else rest[0]
            taken, found = _read_option(value, kind)
            if taken or name.endswith("+"):
                texts.append((name, found if taken else [value]))
                del rest[: 0 if equals else 1]
                continue
        others.append(argument)
    return texts, others


def _read_option(text: str, kind: Any) -> tuple[bool, Any]:
    """An option's value on a command line by its field's type; (False, None) where that is neither text nor a list."""
    if text == "null" and type(None) in get_args(kind):
        return True, None
    if _is_text(kind):
        return True, text
    try:
        loader = open_document(text, UniqueKeysLoader)
    except BadYaml:
        return False, None
    try:
        node = compose(loader)
        if _is_list_of_text(kind) and isinstance(node, yaml.SequenceNode) and _make_text(node):
            return True, construct(loader, node)
    except BadYaml:
        pass
    finally:
        loader.dispose()
    return False, None


def to_text(value: dict[str, Any]) -> str:
    """A configuration as YAML that every reader reads alike."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, with quotes around every text that some reader could read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    return dumper.represent_scalar(_TEXT, text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def _take_texts(root: yaml.MappingNode, types: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Make the nodes of text fields text; return (section.key, section, key) of each."""
    found = []
    for section, values in root.value:
        for key, node in values.value if isinstance(values, yaml.MappingNode) else []:
            name = f"{section.value}.{key.value}"
            kind = types.get(name)
            is_list = isinstance(node, yaml.SequenceNode)
            is_null = isinstance(node, yaml.ScalarNode) and node.tag == _NULL and type(None) in get_args(kind)
            if (is_null and _is_text_or_list(kind)) or (
                (_is_list_of_text(kind) if is_list else _is_text(kind)) and _make_text(node)
            ):
                found.append((name, section.value, key.value))
    return found


def _make_text(node: yaml.Node) -> bool:
    """Make a scalar, or each of a list, text, whatever it looks like; False where it is null, or no scalar."""
    if isinstance(node, yaml.SequenceNode):
        return all(isinstance(item, yaml.ScalarNode) and _make_text(item) for item in node.value)
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL:
        return False
    node.tag = _TEXT
    return True


def _without(root: yaml.Node | None, taken: set[tuple[str, str]]) -> str:
    """The rest of a document as YAML."""
    if not isinstance(root, yaml.MappingNode):
        return ""
    for section, values in root.value:
        if isinstance(values, yaml.MappingNode):
            values.value = [pair for pair in values.value if (section.value, pair[0].value) not in taken]
    root.value = [pair for pair in root.value if pair[1].value]
    return yaml.serialize(root, width=10**6) if root.value else ""
