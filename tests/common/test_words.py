"""The field's words hold in pages, messages, help, docstrings and comments: no phrase that readers stumbled over.

A phrase is looked for across line breaks. Of Python files only what people read is searched, not names and calls.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.source_code import PROJECT, ROOMS

# The phrase, as a regular expression in which a space is any white space; the word to use; a sentence that has it.
WORDS = [
    (r"(?:go|goes|going|went|gone) on", "resume, continue", "The run goes\non from the newest checkpoint."),
    (r"from nothing", "from scratch", "trained from nothing"),
    (r"(?:is|are|was|were) no numbers?", "NaN or inf; not a number", "A loss that is no number ends it."),
    (r"(?:let|lets|letting) (?:a|the) (?:\w+ )?model write|the model wrote", "generate", "Let a trained model write."),
    (r"(?:training|data) windows?|windows? of (?:the )?(?:data|text)", "sequence", "a training window of T tokens"),
    (r"(?<!left.)(?<!leave.)(?<!train.)(?<!me.)alone(?=[.,;:)]|$)", "only", "It depends on the step alone."),
    (r"(?:says?|said) so", "log, report, print", "The log says so."),
    (r"(?-i:begun)", "started", "The decay has begun."),
    (r"(?:job|run|trainer)s? (?:begins?|began)", "start", "The run began on another machine."),
    (r"marks? no end of text|(?:has|have) no end of text", "no end-of-text token", "The data mark no end of text."),
    (r"(?:is|are|was|were) (?:not )?heard", "is handled", "The signal is not heard."),
    (r"asks? to leave|asked to (?:save and )?leave", "requests a stop", "It was asked to save and leave."),
    (r"(?:stands?|is|are) there twice", "duplicate key", "The key stands there twice."),
    (r"(?:lay|lays|laid) over", "added after the base configuration", "laid over another configuration"),
    (r"superseded", "overwritten", "Lines that a resume superseded are dropped."),
    (r"refused by name", "refused, and the error names it", "Another optimizer is refused by name."),
]
PATTERNS = [(re.compile(rf"\b(?:{phrase})\b".replace(" ", r"\s+"), re.IGNORECASE), word) for phrase, word, _ in WORDS]


def pages() -> list[Path]:
    return [PROJECT / "README.md", PROJECT / "CHANGELOG.md", *sorted((PROJECT / "docs").glob("*.md")),
            *sorted((PROJECT / "records").glob("*/README.md"))]  # fmt: skip


def sources() -> list[Path]:
    """Python files outside tests, shell scripts, configurations."""
    kinds = ("*.py", "*.sh", "*.yaml")
    return [path for room in (*ROOMS, "records") for kind in kinds for path in sorted((PROJECT / room).rglob(kind))]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """What people read in a file: (line it starts in, text)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, text
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(_shown(part) for part in node.values)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    yield from comments(text)


def _shown(part: ast.expr) -> str:
    return part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "…"


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments on neighbouring lines are one text."""
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != first + len(block):
            yield first, "\n".join(block)
            first, block = token.start[0], []
        block.append(token.string.lstrip("# "))
    yield first, "\n".join(block)


def findings(path: Path) -> set[str]:
    """FILE:LINE: "phrase", in the field's words: …"""
    name = path.relative_to(PROJECT).as_posix() if path.is_relative_to(PROJECT) else path.name
    found = set()
    for first, text in texts(path):
        for pattern, word in PATTERNS:
            for match in pattern.finditer(text):
                line = first + text.count("\n", 0, match.start())
                found.add(f'{name}:{line}: "{" ".join(match[0].split())}", in the field\'s words: {word}')
    return found


def test_pages_messages_help_docstrings_and_comments_use_the_words_of_the_field() -> None:
    searched = [*pages(), *sources()]
    assert len(searched) > 250
    found = sorted(finding for path in searched for finding in findings(path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("word", "sentence"), [(word, sentence) for _, word, sentence in WORDS])
def test_a_phrase_is_found_wherever_people_would_read_it(tmp_path: Path, word: str, sentence: str) -> None:
    one_line = " ".join(sentence.split())
    first, rest = one_line.split(" ", 1)
    planted = {
        "page.md": f"# A page\n\n{sentence}\n",
        "script.sh": f"# {one_line}\n",
        "docstring.py": f'def f():\n    """{sentence}"""\n',
        "message.py": f'x = 3\nraise ValueError(\n    f"{{x}}: {first} "\n    f"{rest}"\n)\n',
        "comment.py": f"x = 3  # {first}\n# {rest}\n",
    }
    for name, text in planted.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = findings(tmp_path / name)
        assert any(finding.endswith(word) and re.match(rf"{name}:[1-5]: ", finding) for finding in found), name


def test_names_and_good_sentences_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(
        "begun = windows_of(text)  # a sliding window of 256 keys\n"
        "superseded = begun and not alone\n"
        'print(f"{begun} ranks would train alone, and what is newer is left alone.")\n',
        encoding="utf-8",
    )
    assert findings(tmp_path / "good.py") == set()
