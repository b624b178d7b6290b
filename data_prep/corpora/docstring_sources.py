"""Where the embedded corpus comes from: docstrings in installed sources, found by parsing, never by importing."""

import ast
import importlib.metadata
import importlib.util
import inspect
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.errors import UserError

MIN_CHARACTERS = 40  # shorter docstrings carry too little text
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, order=True)
class SourceFile:
    """A Python file under a name that is the same on every machine: `package/inner/path.py`."""

    name: str
    path: str


def required_distributions(requirements: Path) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that a requirements file names and those they need, by canonical name.

    Environment markers and extras are followed; what is installed for other reasons (test tools) is left out. Raises
    UserError where the file, or a distribution that it names, is missing.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = deque((requirement, True) for requirement in _read_requirements(requirements))
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement, named = waiting.popleft()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if named:
                raise UserError(
                    f"{requirement.name} is named in {requirements} but not installed: pip install -r {requirements}"
                ) from None
            continue  # of a dependency: its own concern
        found[key[0]] = distribution
        needed = map(Requirement, distribution.requires or [])
        waiting.extend((need, False) for need in needed if _applies(need, requirement.extras))
    return dict(sorted(found.items()))


def _read_requirements(path: Path) -> Iterator[Requirement]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): name the requirements with --requirements") from None
    for line in lines:
        text = line.split("#", 1)[0].strip()
        if text and not text.startswith("-"):
            requirement = Requirement(text)
            if _applies(requirement, set()):
                yield requirement


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""})


def source_files(distributions: dict[str, importlib.metadata.Distribution]) -> list[SourceFile]:
    """Python files of the standard library and of the distributions, without tests, sorted by name."""
    library = Path(sysconfig.get_path("stdlib"))
    files = {
        SourceFile(f"python/{path.relative_to(library).as_posix()}", str(path))
        for path in library.rglob("*.py")
        if not _SKIPPED_FOLDERS & set(path.relative_to(library).parts)
    }
    for name, distribution in distributions.items():
        for file in distribution.files or []:
            parts = PurePosixPath(file.as_posix()).parts
            if file.suffix == ".py" and ".." not in parts and not _SKIPPED_FOLDERS & set(parts):
                files.add(SourceFile(f"{name}/{file.as_posix()}", str(distribution.locate_file(file))))
    return sorted(files)


def topics() -> list[str]:
    """The language reference as `help("topic")` shows it; none where Python came without it."""
    if importlib.util.find_spec("pydoc_data.topics") is None:
        return []
    from pydoc_data.topics import topics as texts

    return [texts[name].strip() for name in sorted(texts)]


def docstrings_in(file: SourceFile) -> list[str]:
    """Docstrings of a file in the order of its lines: modules, classes, functions and what `add_docstr`-like calls set.

    A file that can't be read or parsed (another Python's syntax, a template) has none.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's sources
            tree = ast.parse(Path(file.path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
            line = getattr(node, "lineno", 0)
        elif isinstance(node, ast.Call) and "doc" in _called_name(node):
            text = max((inspect.cleandoc(text) for text in _strings(node.args)), key=len, default=None)
            line = node.lineno
        else:
            continue
        if text and len(text) >= MIN_CHARACTERS:
            found.append((line, _encodable(text).strip()))
    return [text for _, text in sorted(found, key=lambda item: item[0])]


def _called_name(call: ast.Call) -> str:
    return str(getattr(call.func, "id", "") or getattr(call.func, "attr", ""))


def _strings(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Tuple | ast.List):  # add_newdoc("module", "class", ("method", "text"))
            yield from _strings(node.elts)
        elif text := _string_value(node):
            yield text


def _string_value(node: ast.expr) -> str | None:
    """The text of a literal, of a sum of them, or of a `.format(…)` template with its {names} left in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _string_value(node.left), _string_value(node.right)
        return None if left is None and right is None else (left or "") + (right or "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        template = _string_value(node.func.value)
        return template and template.replace("{{", "{").replace("}}", "}")
    return None


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
