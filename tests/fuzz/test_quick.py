"""A quick part of the fuzzing campaign, and the judge's own judgement.

The whole campaign: python tests/fuzz/campaign.py --inputs 2000 --seed 1
"""

import random
from pathlib import Path

import pytest

from tests.fuzz import judge
from tests.fuzz.campaign import KINDS, cases_of, run_cases
from tests.fuzz.cases import Case
from tests.fuzz.judge import run_case
from tests.fuzz.mutations import json_bytes, mutate_bytes, mutate_json

QUICK_INPUTS, QUICK_SEED, QUICK_JOBS = 20, 7, 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_input_ends_in_more_than_a_sentence(tmp_path: Path, kind: str) -> None:
    cases = list(cases_of(kind, QUICK_SEED, QUICK_INPUTS, tmp_path / "bases"))
    assert len(cases) == QUICK_INPUTS
    numbered = [(f"{kind}:{number}", case) for number, case in enumerate(cases)]
    fallen = [
        f"{number} {verdict.fault}: {verdict.case.label}: {verdict.case.arguments}\n{verdict.detail}"
        for number, verdict in run_cases(numbered, tmp_path, QUICK_JOBS)
        if verdict.fault
    ]
    assert not fallen, "\n\n".join(fallen)


ENDINGS = {
    "raise KeyError('x')": "traceback",
    "import os; os.abort()": "status",
    "import sys; sys.exit(1)": "status",
    "import sys; sys.exit(2)": "status",  # without a sentence
    "import time; time.sleep(600)": "hang",
    "x = bytearray(3 << 30); import time; time.sleep(600)": "memory",
    "import tempfile; tempfile.mkdtemp()": "leftovers",
    "open('a.tmp', 'w')": "leftovers",
    "import subprocess; subprocess.Popen(['sleep', '600'])": "leftovers",
    "import sys; open('new', 'w'); sys.exit('error: no') if 0 else print('error: no') or sys.exit(2)": "leftovers",
    "import sys; open('given', 'w'); print('error: no'); sys.exit(2)": "leftovers",
    "import sys; print('error: no'); sys.exit(2)": "",
    "import sys; sys.exit(130)": "",
    "open('new', 'w')": "",
}


@pytest.mark.parametrize(("code", "fault"), ENDINGS.items())
def test_the_judge_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, fault: str) -> None:
    entry = tmp_path / "entry.py"
    entry.write_text(code, encoding="utf-8")
    if fault == "hang":
        monkeypatch.setattr(judge, "HANG_SECONDS", 0.5)

    def make(folder: Path) -> None:
        (folder / "given").write_text("given", encoding="utf-8")

    verdict = run_case(Case("made up", code, [str(entry)], make), tmp_path / "case")
    assert verdict.fault == fault, verdict
    assert (tmp_path / "case").exists() == bool(fault)


def test_mutations_are_the_same_for_the_same_seed_and_can_be_written() -> None:
    value = {"a": [1, {"b": "c"}], "d": 0.5}
    first, again = random.Random(3), random.Random(3)
    changed = 0
    for _ in range(300):
        mutated, label = mutate_json(first, value)
        content = json_bytes(mutated)
        assert (content, label) == (json_bytes(mutate_json(again, value)[0]), label)
        assert mutate_bytes(first, content) == mutate_bytes(again, content)
        changed += content != json_bytes(value)
    assert changed > 270
    assert value == {"a": [1, {"b": "c"}], "d": 0.5}
