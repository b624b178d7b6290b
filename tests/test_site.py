"""docs/ as a site: it builds without a complaint, its links lead somewhere, and it loads nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

from docs.site_links import on_page_markdown
from tests.helpers.source_code import PROJECT


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr

    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > 25
    for path, page in pages.items():
        for target in re.findall(r'href="([^"]+)"', page):
            name, _, anchor = unquote(target).partition("#")
            if re.match("[a-z]+:", target) or path.name == "404.html":
                continue
            file = (path.parent / name).resolve() if name else path
            assert file.exists(), (path.name, target)
            if anchor and file.suffix == ".html":
                assert f'id="{anchor}"' in pages[site / file.relative_to(site.resolve())], (path.name, target)
        assert (
            re.findall(r'<(?:script|img)[^>]* src="(https?:[^"]+)"|<link[^>]*stylesheet[^>]*"(http[^"]+)"', page) == []
        )


def test_links_out_of_the_pages_lead_to_the_repository_where_it_is_known() -> None:
    page = "See [the `loop`](../train/trainer.py) and ![a plot](../records/a.png), [here](data.md#x)."

    without = on_page_markdown(page, config={})
    known = on_page_markdown(page, config={"repo_url": "https://host/us/longhaul/"})

    assert without == "See the `loop` and a plot (records/a.png), [here](data.md#x)."
    assert "[the `loop`](https://host/us/longhaul/blob/main/train/trainer.py)" in known
    assert "![a plot](https://host/us/longhaul/raw/main/records/a.png)" in known
