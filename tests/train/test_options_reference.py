"""docs/options.md is what the program says of itself."""

import re
import subprocess
import sys

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


def test_check_tells_by_its_status() -> None:
    script = PROJECT / "docs" / "write_options.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "is up to date" in done.stdout
