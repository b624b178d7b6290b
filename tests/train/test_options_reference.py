"""docs/options.md is what the program says of itself."""

import re
import subprocess
import sys

import yaml

from docs.write_options import REFERENCE, reference
from tests.helpers.training import PROJECT
from train.settings.command_line import field_names
from train.settings.sections import FinetuneConfig


def test_the_page_is_up_to_date_and_names_every_option_with_words() -> None:
    text = REFERENCE.read_text()
    assert text == reference(), "run: python docs/write_options.py"
    rows = dict(re.findall(r"^\| `--([a-z0-9_.]+)` \|[^|]*\| (.*) \|$", text, re.MULTILINE))
    assert set(field_names(FinetuneConfig)) <= set(rows)
    assert all(len(words) > 5 for words in rows.values())


def test_every_option_is_set_by_a_configuration_or_explained_on_a_page() -> None:
    configurations = [
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in PROJECT.glob("train/configs/**/*.yaml")
    ]
    set_there = {f"{section}.{key}" for values in configurations for section, keys in values.items() for key in keys}
    pages = [path for path in [PROJECT / "README.md", *PROJECT.glob("docs/*.md")] if path != REFERENCE]
    explained = set(re.findall(r"[a-z]+\.[a-z0-9_]+", "".join(page.read_text(encoding="utf-8") for page in pages)))

    assert set(field_names(FinetuneConfig)) - set_there - explained == set()


def test_check_tells_by_its_status() -> None:
    script = PROJECT / "docs" / "write_options.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "is up to date" in done.stdout
