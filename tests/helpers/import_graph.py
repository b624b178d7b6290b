"""Which module of the project imports which, by syntax tree: also by imports inside functions, or for types only."""

import ast
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

Arrow = tuple[str, str]  # importer, imported: dotted names of modules


def module_name(path: Path) -> str:
    """A file's module, from its path in the project: `train/run/lock.py` is train.run.lock."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def arrows(code: Iterable[tuple[Path, ast.Module]]) -> set[Arrow]:
    """Every import of one of these files by another; what belongs to other projects is left out."""
    files = {module_name(path): (path, tree) for path, tree in code}
    return {
        (name, imported)
        for name, (path, tree) in files.items()
        for imported in imported_by(tree, path, files.keys())
        if imported in files and imported != name
    }


def outside_imports(tree: ast.Module) -> set[str]:
    """Top-level names of all that a file imports, its own project's among them."""
    return {name.split(".")[0] for name in imported_by(tree, Path("x.py"), ())}


def imported_by(tree: ast.Module, path: Path, modules: Collection[str]) -> Iterator[str]:
    """What a file imports: dotted names, of modules where those are known, else of what they are imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: len(path.parts) - node.level] if node.level else ()
            source = ".".join([*parents, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in modules else source


def cycle(found: set[Arrow]) -> list[str] | None:
    """Modules that import each other in a ring, the first one again at its end; None where there is no ring."""
    imports: dict[str, list[str]] = {}
    for importer, imported in sorted(found):
        imports.setdefault(importer, []).append(imported)
    done: set[str] = set()

    def search(module: str, way: list[str]) -> list[str] | None:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return None
        for imported in imports.get(module, ()):
            if ring := search(imported, [*way, module]):
                return ring
        done.add(module)
        return None

    return next((ring for module in sorted(imports) if (ring := search(module, []))), None)
