"""YAML that people wrote, or damaged: what can't be read is an error in one line, a bomb of aliases included."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from common.regular_file import read_at_most

MOST_BYTES = 1 << 20
MOST_NODES = 100_000  # with aliases written out
_DEEP = "it is nested too deeply"


class BadYaml(ValueError):
    """What is wrong with a YAML text, in words that follow its file's name."""


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file: mappings, lists, texts, numbers.

    Raises OSError (NotAFile for a pipe, device or folder) where it can't be read, and BadYaml where it is no YAML.
    """
    return parse_yaml(read_yaml_text(path))


def parse_yaml(text: str, *, most_nodes: int = MOST_NODES, kind: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The contents of a YAML text. Raises BadYaml where it is none, or more than `most_nodes` values."""
    loader = open_document(text, kind)
    try:
        return construct(loader, compose(loader, most_nodes))
    finally:
        loader.dispose()


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file, a byte order mark left out. Raises OSError and BadYaml."""
    try:
        return read_at_most(path, MOST_BYTES).decode("utf-8-sig")
    except (UnicodeDecodeError, OverflowError) as error:
        raise BadYaml(str(error)) from None


def open_document(text: str, kind: type[yaml.SafeLoader]) -> yaml.SafeLoader:
    """A loader on a text; the caller disposes of it. Raises BadYaml for characters that YAML does not have."""
    try:
        return kind(text)
    except yaml.YAMLError as error:
        raise BadYaml(str(error)) from None


def compose(loader: yaml.SafeLoader, most_nodes: int = MOST_NODES) -> yaml.Node | None:
    """The nodes of a loader's one document; None where it is empty.

    Raises BadYaml for what is no YAML, nested too deeply, within itself, or larger than any configuration once every
    alias is written out.
    """
    try:
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > most_nodes:
            raise BadYaml(f"with its aliases expanded it has more than {most_nodes:,} values")
    except yaml.YAMLError as error:
        raise BadYaml(str(error)) from None
    except RecursionError:
        raise BadYaml(_DEEP) from None
    return node


def construct(loader: yaml.SafeLoader, node: yaml.Node | None) -> Any:
    """The values of a loader's nodes. Raises BadYaml: for an unknown tag, a date that does not exist, …"""
    try:
        return loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise BadYaml(str(error)) from None
    except RecursionError:
        raise BadYaml(_DEEP) from None


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many nodes a node is with its aliases written out. Raises BadYaml for one that is within itself."""
    size = known.get(id(node), 0)
    if size is None:
        raise BadYaml(f"the value at line {node.start_mark.line + 1} contains itself")
    if size == 0:
        known[id(node)] = None
        inside: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif isinstance(node, yaml.MappingNode):
            inside = (part for pair in node.value for part in pair)
        size = known[id(node)] = 1 + sum(_size(part, known) for part in inside)
    return size
