"""Pages of reports and studies in a browser, at a telephone's, a laptop's and a wide screen's width, light and dark."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from eval.comparison.study_output import write_report
from eval.report import draw_all
from eval.reporting.page import page
from eval.reporting.run_data import load_runs
from eval.reporting.svg_chart import TOP
from tests.eval.test_rank_pictures import write_times
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.recorded_runs import recorded_run
from tests.helpers.whole_study import whole_study

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
WIDTHS = (390, 1280, 1920)
CONTRAST = 4.5  # WCAG 2.1, level AA
SMALLEST = 7.0  # pixels that a line of a picture is high
MOST_EMPTY = 0.45  # of a row of a page, beside a picture
SLACK = 2.0  # pixels by which boxes of letters may touch

# Each visible line of text: its words, box, colour and the colours painted below its middle, the uppermost first.
LINES = """
(() => {
  const lines = [], seen = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest('style, title, details:not([open]) > :not(summary)')) continue;
    const range = document.createRange(), drawn = parent.closest('svg'), style = getComputedStyle(parent);
    const whole = drawn ? parent.closest('text') : node;  // an exponent belongs to its number
    if (seen.has(whole)) continue;
    seen.add(whole);
    range.selectNodeContents(node);
    for (const box of drawn ? [whole.getBoundingClientRect()] : range.getClientRects()) {
      const frame = (drawn || parent.closest('.wide, pre') || document.body).getBoundingClientRect();
      if (!box.width || !frame.width) continue;
      const below = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2).map(element => {
        const painted = getComputedStyle(element);
        const filled = element.matches('svg *') && !element.closest('text, .points, .grid');
        return filled ? painted.fill : painted.backgroundColor;
      });
      lines.push({words: whole.textContent.trim(), box: [box.left, box.top, box.right, box.bottom], drawn: !!drawn,
        frame: [frame.left, frame.top, frame.right, frame.bottom], color: drawn ? style.fill : style.color, below});
    }
  }
  return lines;
})()
"""


# Tables and code wider than their place; of rows of pictures where one is alone, what they leave empty, from 0 to 1.
LAYOUT = """
(() => {
  const parts = [...document.querySelectorAll('.wide, pre')].filter(part => part.scrollWidth > part.clientWidth + 1);
  const empty = [];
  for (const grid of document.querySelectorAll('.pictures, .across')) {
    const shown = [...grid.children].map(each => each.getBoundingClientRect()).filter(box => box.width);
    for (const box of shown)
      if (shown.filter(other => other.top < box.bottom && box.top < other.bottom).length === 1)
        empty.push(1 - box.width / grid.clientWidth);
  }
  return {wide: parts.map(part => part.textContent.slice(0, 60)), empty};
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of two runs, one of them stopped twice, with every kind of picture; a report of one; a study's."""
    root = tmp_path_factory.mktemp("pages")
    runs = [
        recorded_run(root, "modern-124m-lr-0.003", lives=[(0, 25), (20, 32), (30, 40)], hellaswag=True, own=True),
        recorded_run(root, "gpt2-124m-baseline-of-a-long-name", hellaswag=True, own=True, end_loss=2.3),
    ]
    for run in runs:
        write_times(run, [[0.1, 0.2, 0.1], [0.1, 0.12, 0.1]], first_step=30)
    for name, chosen in (("both", runs), ("one", runs[:1])):
        loaded = load_runs([run.path for run in chosen])
        (root / name).mkdir()
        (root / name / "report.html").write_text(page(loaded, draw_all(loaded), 0.0), encoding="utf-8")
    write_report(whole_study(root / "results"), root / "study")
    return {name: root / name / "report.html" for name in ("both", "one", "study")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.mark.parametrize("name", ["both", "one", "study"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_line_can_be_read(pages: dict[str, Path], browser: Browser, name: str, dark: bool) -> None:
    """No page is wider than its screen; no line lies on another or leaves its picture; each stands out enough."""
    for width in WIDTHS:
        browser.look(width=width, dark=dark)
        browser.open(pages[name])
        wide, high = browser.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert wide == width
        browser.look(width=width, dark=dark, height=high)  # in view as a whole: elementsFromPoint looks no further
        lines = browser.evaluate(LINES)
        assert len(lines) > 150
        assert overlapping(lines) == []
        assert [line["words"] for line in lines if line["drawn"] and line["box"][3] - line["box"][1] < SMALLEST] == []
        assert [line["words"] for line in lines if line["drawn"] and not is_inside(line["box"], line["frame"])] == []
        assert faint(lines) == []


@pytest.mark.parametrize("name", ["both", "one", "study"])
def test_rows_are_filled_and_nothing_scrolls_sideways(pages: dict[str, Path], browser: Browser, name: str) -> None:
    for width in (390, 800, 1085, 1920):
        browser.look(width=width)
        browser.open(pages[name])
        found = browser.evaluate(LAYOUT)
        assert found["wide"] == [], width
        assert len(found["empty"]) > 2
        assert max(found["empty"]) < MOST_EMPTY, width


def overlapping(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of visible lines whose boxes share more than the slack."""
    boxes = [(clipped(line["box"], line["frame"]), line["words"]) for line in lines]
    return [
        (words, other)
        for index, (a, words) in enumerate(boxes)
        for b, other in boxes[:index]
        if min(a[2], b[2]) - max(a[0], b[0]) > SLACK and min(a[3], b[3]) - max(a[1], b[1]) > SLACK
    ]


def clipped(box: list[float], frame: list[float]) -> tuple[float, float, float, float]:
    """What of a box shows in something that scrolls."""
    return max(box[0], frame[0]), max(box[1], frame[1]), min(box[2], frame[2]), min(box[3], frame[3])


def is_inside(box: list[float], frame: list[float]) -> bool:
    return all(abs(shown - whole) <= 1 for shown, whole in zip(clipped(box, frame), box, strict=True))


def faint(lines: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Lines that do not stand out from what is painted below them, and by how much they do."""
    found = []
    for line in lines:
        ground = next((color for color in map(channels, line["below"]) if color[3] == 1), None)
        if ground is not None:  # None: it is scrolled out of view
            high, low = sorted((luminance(channels(line["color"])), luminance(ground)), reverse=True)
            found += [(line["words"], (high + 0.05) / (low + 0.05))]
    assert len(found) > 100
    return [(words, contrast) for words, contrast in found if contrast < CONTRAST]


def channels(color: str) -> tuple[float, ...]:
    """Red, green, blue and opacity of "rgb(1, 2, 3)", each up to 1."""
    if not color.startswith("rgb"):
        return 0.0, 0.0, 0.0, 0.0
    numbers = [float(number) for number in color.split("(")[1].rstrip(")").split(",")]
    return (*(number / 255 for number in numbers[:3]), numbers[3] if len(numbers) > 3 else 1.0)


def luminance(color: tuple[float, ...]) -> float:
    """Relative, by WCAG 2.1."""
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_loss_answers_the_pointer(pages: dict[str, Path], browser: Browser) -> None:
    """The legend hides a run, the switch changes the axis, points and bars show values; own rows come first."""
    browser.look(width=1280)
    browser.open(pages["both"])

    def shown(selector: str) -> list[bool]:
        found = browser.evaluate(
            f"[...document.querySelectorAll('{selector}')].map(e => e.getBoundingClientRect().width > 0)"
        )
        assert isinstance(found, list)
        return found

    for axis in ("tokens", "flops", "hours", "steps"):
        browser.click(f".chart label:has(#axis-{axis})")
        assert [shown(f".of-{each}")[0] for each in ("tokens", "flops", "hours", "steps")].count(True) == 1
        assert shown(f".of-{axis}") == [True]
    assert shown(".of-steps .run-0") == shown(".of-steps .run-1") == [True]
    browser.click(".chart label:has(#run-0)")
    assert (shown(".of-steps .run-0"), shown(".of-steps .run-1")) == ([False], [True])
    top = browser.evaluate("document.querySelector('.chart label:has(#run-0)').getBoundingClientRect().top")
    assert 0 < top < 900, "the page has not moved away from what was clicked"
    browser.click(".chart label:has(#run-0)")
    assert shown(".of-steps .run-0") == [True]

    for point in (".of-steps .run-1 .unseen circle:last-of-type", ".pictures .figure .points circle:last-of-type"):
        opacity = f"getComputedStyle(document.querySelector('{point}')).opacity"
        assert browser.evaluate(opacity) == "0"
        browser.point_at(point)
        assert browser.evaluate(opacity) == "1"
        assert " at " in browser.evaluate(f"document.querySelector('{point}').textContent")
    assert browser.evaluate("document.querySelector('#time ~ .pictures .bars rect').textContent").startswith("comput")
    rows = "[...document.querySelector('#hellaswag ~ .wide tbody').rows].map(row => row.className)"
    classes = browser.evaluate(rows)
    assert classes[:2] == ["ours", "ours"] and set(classes[2:]) == {""}


def test_a_picture_is_small_however_long_its_run(pages: dict[str, Path]) -> None:
    figures = pages["both"].read_text(encoding="utf-8").split('<svg class="figure"')[1:]
    assert len(figures) > 8
    assert all(len(figure) < 70_000 for figure in figures)


def test_a_loss_above_the_picture_is_not_drawn_along_its_edge(pages: dict[str, Path]) -> None:
    lines = re.findall(r'<polyline points="([^"]*)"', pages["both"].read_text(encoding="utf-8"))
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in lines]
    assert any(height < TOP for line in heights for height in line)
    assert not any(a == b == TOP for line in heights for a, b in pairwise(line))
