"""The GPU campaign on a CPU with tiny sizes, so that it is ready when there is a GPU."""

import importlib
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.errors import UserError
from tests.helpers.training import PROJECT
from train.benchmarks import gpu_campaign
from train.benchmarks.campaign import probe
from train.benchmarks.campaign.checks import CHECKS, CPU_TESTS, GPU_TESTS
from train.benchmarks.campaign.data import make_tokens
from train.benchmarks.campaign.figures import PROBE, STEP
from train.benchmarks.campaign.parity import difference
from train.benchmarks.campaign.running import EVERY_PART, Campaign, Check, Figure
from train.benchmarks.campaign.summary import line_of, table
from train.benchmarks.step_cases import build_parser, read_cases
from train.settings.command_line import read_config

SCRIPT = PROJECT / "train" / "benchmarks" / "gpu_campaign.py"
PARTS = (1, 2, 3)
SMALLEST_SLACK = 10.0  # seconds of a part's 560 that no check is planned for


def python(code: str) -> tuple[str, str]:
    return ("-c", code)


def check(name: str, code: str, *figures: Figure, seconds: float = 20, tiny: bool = True) -> Check:
    """A check of part 1. In its code, braces are doubled."""
    return Check(name, 1, seconds, python(code), "", figures, python(code) if tiny else "needs a GPU")


def campaign(folder: Path, *checks: Check, seconds: float = 60, tiny: bool = True) -> dict[str, Any]:
    """The record, which is also what the file holds."""
    work, out = folder / "work", folder / "out"
    for made in (work, out):
        made.mkdir(exist_ok=True)
    record = Campaign(1, checks, out, work, work / "tokens", seconds, tiny).run()
    assert json.loads((out / "part-1.json").read_text(encoding="utf-8")) == record
    return record


def statuses(record: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["status"] for row in record["checks"]}


def still_runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_parts(out: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """What each part prints, and its record. They run at the same time, as most of their time is waiting."""
    command = [sys.executable, str(SCRIPT), "--tiny", f"--out={out}", "--part"]
    started = {
        part: subprocess.Popen([*command, str(part)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for part in PARTS
    }
    printed = {part: process.communicate()[0].decode() for part, process in started.items()}
    assert {part: process.returncode for part, process in started.items()} == dict.fromkeys(PARTS, 0), printed
    return {part: (printed[part], json.loads((out / f"part-{part}.json").read_text("utf-8"))) for part in PARTS}


@pytest.mark.slow
def test_every_check_runs_or_is_skipped_with_a_reason_and_finds_its_figures(tmp_path: Path) -> None:
    """In one test: a fixture would run all parts once in each of pytest's processes."""
    parts = run_parts(tmp_path)
    for part, (printed, record) in parts.items():
        asked = [check for check in CHECKS if check.part in (EVERY_PART, part)]
        assert [row["name"] for row in record["checks"]] == [check.name for check in asked]
        for one, row in zip(asked, record["checks"], strict=True):
            assert row["status"] == ("skipped" if isinstance(one.tiny, str) else "passed"), row
            assert row.get("reason") == (one.tiny if isinstance(one.tiny, str) else None)
            assert f"\n{one.name}: {row['status']}" in f"\n{printed}"
            if row["status"] == "passed" and one.name != "gpu tests" and one.name != "facts":
                assert row["result"]
        assert record["facts"]["packages"]["torch"]
        assert re.fullmatch(r"[0-9a-f]{64}", record["facts"]["sources_sha256"])

    missing = {
        f"{row['name']}: {figure['name']}"
        for _, record in parts.values()
        for row in record["checks"]
        for figure in row["figures"]
        if figure["measured"] is None and row["status"] == "passed"
    }
    gpus = re.compile(
        r"MFU|compiled|flash|cudnn|cuDNN|efficient|idle share, least|nanoGPT|transformers'$|ceiling|head$"
    )
    assert {name for name in missing if not gpus.search(name)} == set()
    check_part_1({row["name"]: row for row in parts[1][1]["checks"]})


def check_part_1(rows: dict[str, Any]) -> None:
    """What its checks show of a sound trainer. Args: rows: by name."""
    resume = rows["resume"]["result"]
    assert resume["stop"]["state"]["status"] == "preempted" and resume["steps"] == [60, 60]
    assert (resume["differing_steps"], resume["same_weights"]) == (0, True)
    smoke = rows["smoke"]["result"]
    assert set(smoke["validation"]) == {"eager", "two ranks"} and smoke["errors"] == {}
    losses = rows["parity"]["result"]["losses"]["cpu fp32"]
    assert losses[-1] < losses[0] - 0.3
    assert "skipped" in rows["gpu tests"]["last_lines"][-1] or "passed" in rows["gpu tests"]["last_lines"][-1]
    waited = rows["saves"]["result"]
    assert all(len(waited[name]["saves"]) == 3 for name in ("asynchronous", "waited for"))


def test_what_fails_or_hangs_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    sleep = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    hang = f"import subprocess, sys; it = {sleep}; open(r'{{json}}', 'w').write(str(it.pid)); print('hangs'); it.wait()"
    record = campaign(
        tmp_path,
        check("fails", "print('before'); raise SystemExit(3)"),
        check("dies", "import os; print('alive', flush=True); os.kill(os.getpid(), 9)"),
        check("hangs", hang, seconds=2),
        check("good", "print('well')"),
        tiny=False,
    )
    assert statuses(record) == {"fails": "failed", "dies": "failed", "hangs": "out of time", "good": "passed"}
    fails, dies, hangs, good = record["checks"]
    assert (fails["reason"], fails["last_lines"]) == ("exit status 3", ["before"])
    assert (dies["reason"], dies["last_lines"]) == ("signal 9", ["alive"])
    assert (hangs["reason"], hangs["last_lines"]) == ("stopped after 3 s", ["hangs"])
    assert not still_runs(hangs["result"]), "what a check has started ends with it"
    assert good["last_lines"] == ["well"]
    assert "    before" in line_of(fails)


def test_the_record_is_whole_before_during_and_after_a_check(tmp_path: Path) -> None:
    copy = "import shutil; shutil.copy(r'{out}/part-1.json', r'{json}')"
    record = campaign(tmp_path, check("first", copy), check("second", copy), check("gpu's", "", tiny=False))
    seen = [statuses(row["result"]) for row in record["checks"][:2]]
    assert seen == [
        {"first": "running", "second": "waiting", "gpu's": "skipped"},
        {"first": "passed", "second": "running", "gpu's": "skipped"},
    ]
    assert record["checks"][2]["reason"] == "needs a GPU"


def test_what_the_time_does_not_reach_is_marked(tmp_path: Path) -> None:
    record = campaign(
        tmp_path,
        check("long", "", seconds=1000),
        check("short", "", seconds=1),
        seconds=30,
        tiny=False,
    )
    assert statuses(record) == {"long": "not reached", "short": "passed"}
    assert record["checks"][0]["reason"] in ("30 s were left", "29 s were left")
    assert record["checks"][0]["seconds"] is None
    assert "1 not reached, 1 passed" in table(record)


def test_predictions_stand_beside_what_is_found_and_limits_are_held(tmp_path: Path) -> None:
    write = "import json; json.dump({{'speed': 90.0, 'share': 1.3, 'text': 'no number'}}, open(r'{json}', 'w'))"
    figures = (
        Figure("speed", lambda result: result["speed"], 100.0),
        Figure("share", lambda result: result["share"], 1.0, 0.85, 1.15),
        Figure("text", lambda result: result["text"]),
    )
    record = campaign(tmp_path, check("off", write, *figures), check("missing", "", *figures), tiny=False)
    off, missing = record["checks"]
    assert off["status"] == missing["status"] == "off"
    assert off["reason"] == "beyond its limits, or not found: share"
    assert [figure["measured"] for figure in off["figures"]] == [90.0, 1.3, None]
    assert [figure["holds"] for figure in off["figures"]] == [None, False, None]
    assert re.search(r"^off +speed +100 +90$", table(record), re.M)
    assert re.search(r"share +1 +1\.3  beyond its limits$", table(record), re.M)


def test_a_check_sees_local_caches_and_no_network_and_on_a_cpu_no_gpu(tmp_path: Path) -> None:
    names = ["LONGHAUL_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"]
    write = f"import json, os; json.dump([os.environ.get(name) for name in {names}], open(r'{{json}}', 'w'))"
    (row,) = campaign(tmp_path, check("variables", write))["checks"]
    work = tmp_path / "work"
    assert row["result"] == [str(work / "cache"), str(work / "inductor"), str(work / "triton"), "1", ""]


def test_the_table_is_sound() -> None:
    for part in PARTS:
        checks = [check for check in CHECKS if check.part in (EVERY_PART, part)]
        assert len({check.name for check in checks}) == len(checks)
        assert sum(check.seconds for check in checks) <= 560 - SMALLEST_SLACK
    for one in CHECKS:
        for command in (one.command, () if isinstance(one.tiny, str) else one.tiny):
            for argument in command:
                if argument.endswith(".py") or argument.startswith("--config="):
                    assert (PROJECT / argument.removeprefix("--config=")).is_file(), argument
    marked = [
        path.relative_to(PROJECT).as_posix()
        for path in sorted((PROJECT / "tests").rglob("test_*.py"))
        if re.search(r"^(pytestmark|    pytest|@pytest).*mark\.gpu\b", path.read_text(encoding="utf-8"), re.M)
    ]
    assert sorted(GPU_TESTS) == marked
    assert all((PROJECT / file).is_file() for file in CPU_TESTS)


@pytest.mark.parametrize("one", CHECKS, ids=lambda check: check.name)
def test_commands_for_a_gpu_are_ones_that_their_scripts_take(one: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as can be seen without one: options and configurations."""
    script, *rest = (part.format(json="answer.json", work="work", out="out", data="data") for part in one.command)
    monkeypatch.setattr(sys, "argv", [script, *rest])
    if script == STEP:
        cases, _ = read_cases(build_parser(""), rest)
        assert cases and all(case.accumulation == 1 for case in cases)
    elif script == PROBE:
        options = probe.parse_arguments()[1]
        read_config(options)
    elif script != "-m":
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        assert module.parse_arguments().json == Path("answer.json")


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        (["--part=2", "--only", "resume"], "--only resume: part 2 has steps-124m,"),
        (["--part=1", "--seconds=0"], "--seconds is 0: give more than 0"),
        (["--part=1"], "PyTorch sees no GPU here: --tiny runs the checks on the CPU"),
    ):
        monkeypatch.setattr("model.devices.visible_gpus", lambda: 0)
        monkeypatch.setattr(sys, "argv", ["gpu_campaign.py", f"--out={tmp_path}", *options])
        with pytest.raises(UserError, match=re.escape(message)):
            gpu_campaign.main()
        assert not list(tmp_path.iterdir())


def test_made_tokens_of_gpt2_s_vocabulary_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.benchmarks.campaign.data.TRAIN_TOKENS", 20_000)
    monkeypatch.setattr("train.benchmarks.campaign.data.VAL_TOKENS", 2_000)
    tokens = make_tokens(tmp_path / "tokens", tiny=False)
    ids = tokens.split("train").read(0, 20_000).astype(int)
    assert (len(ids), ids[0]) == (20_000, 50_256)
    steps = (ids[1:] - ids[:-1]).tolist()
    assert steps.count(1) / len(steps) == pytest.approx(0.7, abs=0.02)


def test_differences_are_relative_and_a_loss_that_is_no_number_is_infinitely_far() -> None:
    assert difference([4.0, 2.0], [4.0, 1.0]) == 1.0
    assert difference([4.0, float("nan")], [4.0, 1.0]) == float("inf")


def test_the_wheels_to_carry_bring_all_that_they_require() -> None:
    listed = (PROJECT / "setup" / "wheels-gpu.txt").read_text(encoding="utf-8")
    names = {line for line in listed.splitlines() if not line.startswith("#")}
    pinned = (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"\n{name}==" not in pinned] == []
    required = {
        canonicalize_name(requirement.name)
        for name in names
        for requirement in map(Requirement, metadata.requires(name) or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": "signatures"})
    }
    assert required - names == {"pyyaml"}, "which such machines have"
