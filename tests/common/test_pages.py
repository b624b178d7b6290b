"""What README.md and docs/ name is there: links, headings, files, modules, messages."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.source_code import PROJECT, ROOMS, product_code
from train.settings.command_line import field_names
from train.settings.sections import FinetuneConfig

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
LINKING = [*PAGES, PROJECT / "CHANGELOG.md", *sorted((PROJECT / "records").glob("*/README.md"))]
TOP_FOLDERS = (*ROOMS, "records", "tests")
NOT_OURS = {"slurm/site.sh", "site.sh", "tasks/my_task.yaml", "slurm.jsonl", "train/loss"}  # of a site, a user, a run


OTHERS_WORDS = ("network addresses of", "cannot be retrieved")  # torchrun's


def links(page: str) -> list[str]:
    """Targets of links and pictures that lead to files or headings of the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r'src="([^"]+)"', page)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """What GitHub makes of the headings outside code blocks: lower case, no punctuation, hyphens for spaces."""
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path) -> list[str]:
    dead = []
    for target in links(path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            dead.append(target)
    return dead


def named_paths(page: str) -> set[str]:
    """Paths in the project's folders, and names of scripts and modules, wherever they stand in a page."""
    folders = "|".join(TOP_FOLDERS)
    full = re.findall(rf"(?<![\w/.$-])((?:{folders})/[\w./*-]*[\w/*])", page)
    short = re.findall(r"`([\w-]+(?:/[\w-]+)*\.(?:py|sh))`", page)
    return {*full, *short} - NOT_OURS


def is_there(name: str) -> bool:
    """`train/configs/*.yaml`, `eval/report.py`; `startup/request.py` and `requeue.py` may be in any folder."""
    if name.startswith(tuple(f"{folder}/" for folder in TOP_FOLDERS)):
        return any(PROJECT.glob(name.rstrip("/")))
    return any(any((PROJECT / folder).glob(f"**/{name}")) for folder in TOP_FOLDERS)


def dotted_names(page: str) -> set[str]:
    """`common.publish`, `model.gpt.GPT(config)`: the part before a bracket."""
    rooms = "|".join(ROOMS)
    return set(re.findall(rf"`((?:{rooms})(?:\.\w+)+)", page)) - NOT_OURS


def is_module_or_option(name: str) -> bool:
    """A module, a name in one, or an option of the trainer."""
    parts = name.split(".")
    files = [PROJECT.joinpath(*parts[:count]).with_suffix(".py") for count in range(2, len(parts) + 1)]
    module = next((file for file in files if file.is_file()), None)
    if module is None:
        return name in field_names(FinetuneConfig) or PROJECT.joinpath(*parts).is_dir()
    inside = parts[len(module.relative_to(PROJECT).parts) :]
    return not inside or re.search(rf"\b{inside[0]}\b", module.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("path", LINKING, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_no_link_is_dead(path: Path) -> None:
    assert dead_links(path) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_files_and_modules_that_a_page_names_are_there(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert sorted(name for name in named_paths(page) if not is_there(name)) == []
    assert sorted(name for name in dotted_names(page) if not is_module_or_option(name)) == []


def test_the_readme_says_what_it_is_on_its_first_screen_and_has_words_for_the_tools_that_people_have() -> None:
    """Shorter than it was (418 lines); for whom, measured at what, one picture; details are on pages."""
    page = (PROJECT / "README.md").read_text(encoding="utf-8")
    screen, *_ = page.split("\n## ")
    assert len(page.splitlines()) <= 220 and len(screen.splitlines()) <= 24
    assert all(word in screen for word in ("students", "researchers", "tokens per second", "](records/"))
    assert screen.count("![") == 1
    words = [
        "inference",
        "library",
        "TensorBoard",
        "notebook",
        "container",
        "uv",
        "conda",
        "GGUF",
        "vLLM",
        "cite",
        "contribute",
    ]
    assert [word for word in words if not re.search(rf"\b{word}", page, flags=re.IGNORECASE)] == []
    questions = ("on my own text?", "change the architecture?", "on my cluster?", "compare two ideas?", "serve it?")
    assert [question for question in questions if question not in page] == []
    assert all((PROJECT / name).is_file() for name in ("CITATION.cff", "CONTRIBUTING.md"))


def quoted_messages(page: str) -> list[str]:
    """Messages at the start of a row or a bullet under "When something is wrong"."""
    section = "".join(
        re.findall(r"^## When something is wrong\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    )
    starts = re.findall(r"^(?:\| |- )(`[^`|]+`(?:, `[^`|]+`)*)", section, flags=re.MULTILINE)
    return [message for start in starts for message in re.findall(r"`([^`]{12,})`", start)]


def fragments(message: str) -> list[str]:
    """The words of a message between what differs each time: …, names in capitals, anything with a digit."""
    parts = re.split(r"…|\b[A-Z_:]+\b|\[k\]|\S*\d\S*|^error: |^failed: |^warning: ", message)
    return [part.strip(" :,()") for part in parts if len(part.strip(" :,()")) > 5]


@cache
def all_messages() -> str:
    """Every text in the project's Python files, and its shell scripts."""
    nodes = [node for _, tree in product_code() for node in ast.walk(tree)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    scripts = [path.read_text(encoding="utf-8") for path in sorted((PROJECT / "slurm").glob("*.sh"))]
    return "\n".join([*texts, *scripts])


def is_printed(part: str) -> bool:
    """As one text, or as two that are put together."""
    words = part.split(" ")
    halves = [(" ".join(words[:count]), " ".join(words[count:])) for count in range(len(words))]
    return any(all(half.strip(" ,") in all_messages() for half in both) for both in halves)


@pytest.mark.parametrize("name", ["training", "stopping", "cluster"])
def test_the_messages_that_a_page_explains_are_printed(name: str) -> None:
    messages = quoted_messages((PROJECT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
    assert len(messages) >= 3
    missing = [part for message in messages for part in fragments(message) if not is_printed(part)]
    assert [part for part in missing if part not in OTHERS_WORDS] == []


def test_a_message_that_nobody_prints_is_found() -> None:
    page = "## When something is wrong\n\n| `the weights of ranks [k] quarrel` | … |\n\n## Next\n"
    (message,) = quoted_messages(page)
    assert [is_printed(part) for part in fragments(message)] == [True, False]


def test_the_pages_do_link_and_name_files() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert len(links(text)) > 40
    assert len(named_paths(text)) > 100
    assert len(dotted_names(text)) > 50


@pytest.mark.parametrize(
    ("line", "dead"),
    [
        ("[a page](README.md#two-words)", []),
        ("[a heading](#two-words)", []),
        ("[elsewhere](https://example.org/x)", []),
        ("[a page](missing.md)", ["missing.md"]),
        ("[a heading](README.md#two-wrds)", ["README.md#two-wrds"]),
        ("```\n# in code\n```\n[a heading](#in-code)", ["#in-code"]),
        ('<img src="missing.png">', ["missing.png"]),
    ],
)
def test_a_dead_link_is_found(tmp_path: Path, line: str, dead: list[str]) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"# Two words\n\n{line}\n", encoding="utf-8")
    assert dead_links(page) == dead


def test_a_file_or_module_that_is_gone_is_found() -> None:
    page = "`train/pretrain.py` and `launch.py`, `train/gone.py`, `gone.py`, slurm/site.sh, `train/configs/gone-*.yaml`"
    assert {name for name in named_paths(page) if not is_there(name)} == {
        "train/gone.py",
        "gone.py",
        "train/configs/gone-*.yaml",
    }
    names = "`model.gpt.GPT(x)`, `model.block_size`, `model.gpt.Gone`, `common.gone.x`, `train.gone`"
    assert {name for name in dotted_names(names) if not is_module_or_option(name)} == {
        "model.gpt.Gone",
        "common.gone.x",
        "train.gone",
    }
