"""`train/study.py --compare` on folders of runs: its figures, its refusals, what it leaves out."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.curves import Curve
from common.errors import UserError
from eval.comparison.comparing import as_text, compare
from eval.comparison.measured_runs import MeasuredRun
from eval.comparison.run_groups import parse_groups
from model.config import ModelConfig
from model.counts import flops_per_token
from tests.helpers.source_code import PROJECT
from tests.helpers.study_runs import KEPT, MODEL, RANKS, law, write_group, write_study_run
from train import study as study_command
from train.studies.older_runs import option_defaults

OLD = PROJECT / "records" / "2026-11-22-tiny-shakespeare" / "runs"
KEYS = [
    "mean", "std", "interval", "seeds", "difference", "difference_interval", "p_value", "multiplier",
    "multiplier_interval", "multiplier_from", "multiplier_tokens", "multiplier_hours", "memory_gib",
    "tokens_per_second", "sentence",
]  # fmt: skip
NOISE = (0.0, 0.003, -0.002)


def study(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "train" / "study.py"), *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, encoding="utf-8", timeout=120)


def compared(*groups: str, **options: Any) -> dict[str, Any]:
    return compare(parse_groups(groups), **options).as_json()


def test_a_planted_gain_is_found_and_no_order_changes_a_byte(tmp_path: Path) -> None:
    base = write_group(tmp_path, "base", NOISE)
    gain = write_group(tmp_path, "gain", (0.001, -0.001, 0.002), gain=1.3, optim__lr=3e-3)
    same = write_group(tmp_path, "same", (0.001, 0.003, -0.001), optim__lr=2e-3)
    outputs = []
    for order in ((base, gain, same), (same, _turned(gain), _turned(base))):
        done = study("--compare", *order, "--json", str(tmp_path / "out.json"))
        assert done.returncode == 0, done.stderr
        outputs.append((done.stdout, (tmp_path / "out.json").read_bytes()))

    assert outputs[0] == outputs[1]
    text, found = outputs[0][0], json.loads(outputs[0][1])
    assert list(found) == ["baseline", "unit", "noise_floor", "data", "missing", "variants"]
    assert (found["baseline"], found["unit"], found["missing"]) == ("base", "bits per byte", [])
    better, undecided = found["variants"]["gain"], found["variants"]["same"]
    assert list(better) == KEYS
    assert better["seeds"] == 3 and better["difference"] < 0 and better["p_value"] < 0.001
    assert better["multiplier"] == pytest.approx(1.3, rel=0.03)
    assert better["multiplier_interval"][0] < 1.3 < better["multiplier_interval"][1]
    assert better["multiplier_tokens"] == pytest.approx(better["multiplier"])
    assert better["multiplier_hours"] == pytest.approx(better["multiplier"])
    assert better["multiplier_from"] == "curve"
    assert better["memory_gib"] == 0.5 and better["tokens_per_second"] == 2000
    assert better["sentence"].startswith("gain is better than base by 0.")
    assert "bits per byte (95% interval, 3 seeds and 3 of base, p = " in better["sentence"]
    assert (
        undecided["sentence"].startswith("Undecided: ")
        and "to show half that difference takes" in undecided["sentence"]
    )
    assert 0.001 < found["noise_floor"] < 0.006
    assert found["data"]["differing"] == {"optim.lr": {"base": 1e-3, "gain": 3e-3, "same": 2e-3}}
    assert "optim.lr: 0.001 (base), 0.003 (gain), 0.002 (same)" in text
    assert better["sentence"] in text and "final: val_bits_per_byte in bits per byte" in text


def test_result_files_give_the_same_to_the_byte(tmp_path: Path) -> None:
    own = Curve("arc", "arc_accuracy", "ARC", higher_is_better=True)
    start = {"kind": "start", "step": 900, "time": 1.7e9, "world_size": 1, "curves": [own.as_json()]}
    arc = [{"kind": "arc", "step": step, "tokens": step, "arc_accuracy": step / 1000} for step in range(0, 901, 3)]
    both: dict[str, Any] = {"steps": 900, "more": [start, *arc], "kept": (*KEPT, "val_loss_masked")}
    base = write_group(tmp_path, "base", NOISE, every=1, **both)
    gain = write_group(tmp_path, "gain", NOISE, gain=1.3, **both, optim__lr=3e-3)
    leak = write_group(tmp_path, "leak", NOISE, record={"causal": False}, optim__lr=2e-3)
    old = write_group(tmp_path, "old", NOISE, kept=(), optim__lr=4e-3)
    write_study_run(tmp_path / "cut", seed=9, steps=900, reached=60, optim__lr=3e-3)
    groups = [base, f"{gain},{tmp_path / 'cut'}", leak, old]

    def found() -> list[object]:
        results = [compare(parse_groups(groups), metric=metric) for metric in ("final", "best")]
        results += [compare(parse_groups(groups[:2]), metric=name) for name in ("arc_accuracy", "val_loss_masked")]
        return [[json.dumps(result.as_json()), as_text(result)] for result in results]

    before = found()
    for path in sorted(tmp_path.iterdir()):
        run = MeasuredRun.load(path)
        path.rename(tmp_path / "aside")
        run.write_result(path)
        shutil.rmtree(tmp_path / "aside")
        assert path.stat().st_size < 50_000
        assert MeasuredRun.load(path) == run

    assert found() == before
    validations = MeasuredRun.load(tmp_path / "base1").validations
    assert len(validations) in range(200, 204) and validations[-1]["step"] == 900


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format: input should be less than or equal to 1"),
        ({"step": -1}, "step: input should be greater than or equal to 0"),
        ({"hours": [1.0]}, "hours: there are 1 of 21 validations"),
        ({"validations": [{"count": 2, "same": {}, "columns": {"step": [1]}}]}, "columns.step: there are not 2 values"),
        ({"validations": [{"count": 9**9, "same": {"x": 1}, "columns": {}}]}, "a record has no step"),
        ({"leaks": None}, "leaks: it is neither true nor false"),
    ],
)
def test_a_damaged_result_file_is_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "run.json"
    MeasuredRun.load(write_study_run(tmp_path / "run")).write_result(path)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged ({words}")):
        MeasuredRun.load(path)


def test_a_run_of_before_an_option_belongs_to_those_that_have_its_default(tmp_path: Path) -> None:
    """As where a study is continued by a later version."""
    files = []
    stated: dict[str, Any] = {"optim__muon_momentum": 0.95, "optim__shard": False}
    for seed, (options, value) in enumerate((({}, "absent"), (stated, "default"))):
        folder = write_study_run(tmp_path / value, seed=seed, **options)
        files.append(tmp_path / f"{value}.json")
        MeasuredRun.load(folder).write_result(files[-1])
    other = write_study_run(tmp_path / "other", seed=2, optim__muon_momentum=0.5)
    groups = {"a": files, "b": [other]}
    found = compare(groups, defaults=option_defaults())
    assert found.entries["a"].as_json()["seeds"] == 2
    assert found.data["differing"] == {"optim.muon_momentum": {"a": 0.95, "b": 0.5}}
    with pytest.raises(UserError, match=r"the runs of a differ in optim\.muon_momentum"):
        compare(groups)


def _turned(group: str) -> str:
    name, _, paths = group.partition("=")
    return f"{name}={','.join(reversed(paths.split(',')))}"


def test_older_runs_compare_by_the_closed_form_of_their_flops(tmp_path: Path) -> None:
    one = write_group(tmp_path, "A", NOISE, kept=())
    other = write_group(tmp_path, "B", NOISE, gain=1.3, kept=(), ranks=[*RANKS, *RANKS], optim__lr=2e-3)

    result = compare(parse_groups([one, other]))
    found = result.as_json()
    (run,) = [run for run in result.setting.baseline.runs if run.seeds[0] == 1]

    assert found["unit"] == "nats a token"
    assert run.flops(run.last) == flops_per_token(ModelConfig(**MODEL)) * 100_000
    assert found["variants"]["B"]["multiplier"] == pytest.approx(1.3, rel=0.03)
    assert found["variants"]["B"]["multiplier_hours"] is None  # of other ranks
    assert len(found["data"]["causality_unknown"]) == 6
    assert "whether they are causal is not recorded" in as_text(result)


def test_committed_runs_compare() -> None:
    seeds = ",".join(str(OLD / f"causal-seed{seed}") for seed in (1, 2, 3))

    found = compared(f"tokens={seeds}", f"positions={OLD / 'positions-norm-seed1'}", baseline="tokens")

    assert found["variants"]["tokens"]["mean"] == pytest.approx(1.7179, abs=1e-4)
    assert found["variants"]["positions"]["difference"] == pytest.approx(-0.525, abs=1e-3)
    assert found["variants"]["positions"]["p_value"] is None
    assert "No verdict on positions: positions has one seed" in found["variants"]["positions"]["sentence"]


def test_what_can_t_be_ranked_is_named_and_left_out(tmp_path: Path) -> None:
    base = write_group(tmp_path, "base", NOISE)
    leak = write_group(tmp_path, "leak", NOISE, gain=9.0, record={"causal": False}, optim__lr=2e-3)
    part = write_group(tmp_path, "part", NOISE[:2], optim__lr=3e-3)
    running = write_study_run(tmp_path / "running", seed=9, reached=60, optim__lr=3e-3)
    burst = write_study_run(tmp_path / "burst", seed=10, optim__lr=3e-3, loss=lambda tokens: float("nan"))

    found = compared(base, leak, f"{part},{running},{burst}")

    assert {entry["variant"]: entry["why"] for entry in found["missing"] if entry["variant"] == "leak"} == {
        "leak": "not causal: it sees tokens that it predicts, so its losses mean nothing"
    }
    whys = {Path(entry["run"]).name: entry["why"] for entry in found["missing"]}
    assert whys["running"].startswith("at step 60 of 100: the middle of a schedule is not ranked")
    assert whys["burst"] == "its val_bits_per_byte is not finite"
    assert len(found["missing"]) == 5
    leaky = found["variants"]["leak"]
    assert (leaky["mean"], leaky["seeds"], leaky["p_value"]) == (None, 0, None)
    assert leaky["sentence"] == "No verdict on leak: none of its runs can be ranked. 3 of its 3 runs left out."
    assert found["variants"]["part"]["seeds"] == 2
    assert "2 of its 4 runs left out" in found["variants"]["part"]["sentence"]


def test_budgets_of_the_baseline_give_the_multiplier(tmp_path: Path) -> None:
    """Each budget ends lower than a longer run is at that time, as its own schedule has come to its end."""
    groups = [
        write_group(tmp_path, f"x{steps}", NOISE, steps=steps, schedule__warmup=steps // 10)
        for steps in (50, 70, 100, 140, 200)
    ]
    variant = write_group(tmp_path, "v", NOISE, gain=1.25, optim__lr=3e-3, schedule__warmup=10)

    found = compared(*groups, variant, baseline="x100")["variants"]

    assert found["v"]["multiplier"] == pytest.approx(1.25, rel=0.01)
    assert found["v"]["multiplier_from"] == "budgets"
    assert "from final losses of several budgets" in found["v"]["sentence"]
    assert found["x200"]["sentence"].startswith("x200 is x100 at another budget: it counts for multipliers only.")
    assert found["x200"]["p_value"] is None


def test_what_else_differs_is_said(tmp_path: Path) -> None:
    base = write_group(tmp_path, "A", NOISE)
    longer = write_group(tmp_path, "B", NOISE, steps=200, gain=0.1, run__dtype="bf16", optim__lr=2e-3)

    sentence = compared(base, longer)["variants"]["B"]["sentence"]

    assert "Unequal budgets: it had 2 times the tokens and 2 times the FLOPs of A" in sentence
    assert "Mixed precision: bf16 beside fp32." in sentence


def test_other_tokens_of_the_same_text_compare_in_bits_per_byte(tmp_path: Path) -> None:
    text = {"val_text_sha256": "ee" * 32}
    one = write_group(tmp_path, "A", NOISE, record=text)
    coarse = {"val_sha256": "cd" * 32, "val_tokens": 512, "val_bytes": 3_001}
    other = write_group(tmp_path, "B", NOISE, record=coarse | text, model__vocab_size=8192)
    unknown = write_group(tmp_path, "C", NOISE, record=coarse, model__vocab_size=8192)
    shorter = write_group(tmp_path, "D", NOISE, record=coarse | text | {"val_bytes": 1_500}, model__vocab_size=8192)

    assert compared(one, other)["unit"] == "bits per byte"
    with pytest.raises(UserError, match=r"other tokens .* the texts are unknown \(no val_text_sha256\)"):
        compared(one, unknown)
    with pytest.raises(UserError, match=r"validated on 3,000 and 1,500 bytes of the same text"):
        compared(one, shorter)
    with pytest.raises(UserError, match=r"nats a token do not compare between tokenizers"):
        compared(one, other, metric="val_loss")


def test_a_figure_of_another_evaluation_is_compared(tmp_path: Path) -> None:
    def swag(value: float, sha: str = "99") -> list[dict[str, Any]]:
        return [{"kind": "hellaswag", "step": 100, "tokens": 100_000, "hellaswag_acc_norm": value,
                 "hellaswag_sha256": sha * 32, "time": 1.7e9 + 100}]  # fmt: skip

    def group(name: str, values: list[float], sha: str = "99") -> str:
        paths = [
            write_study_run(tmp_path / f"{name}{seed}", seed=seed, more=swag(value, sha), optim__lr=len(name))
            for seed, value in enumerate(values)
        ]
        return f"{name}={','.join(map(str, paths))}"

    low, high = group("A", [0.25, 0.26, 0.255]), group("BB", [0.35, 0.36, 0.352])
    found = compared(low, high, metric="hellaswag_acc_norm")["variants"]["BB"]

    assert found["sentence"].startswith("BB is better than A by 0.0990 ± ")
    assert "No compute multiplier: multipliers are of final losses." in found["sentence"]
    best = compared(low, high, metric="best")
    assert best["data"]["metric"] == "best" and best["variants"]["A"]["mean"] == pytest.approx(1.25 * law(100_000))
    with pytest.raises(UserError, match=r"no run records arc: --metric is one of final, best, hellaswag_acc_norm"):
        compared(low, high, metric="arc")
    with pytest.raises(UserError, match="was measured on something else"):
        compared(low, group("CCC", [0.3, 0.3, 0.3], sha="11"), metric="hellaswag_acc_norm")


def test_the_record_of_a_leak_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds of `leak.py`'s model against the one with a norm per token, from their result files."""
    monkeypatch.chdir(PROJECT / "records" / "2026-11-28-leak")
    names = ("per-token", "over-positions")
    groups = [f"{name}={','.join(f'runs/{name}-seed{seed}.json' for seed in (1, 2, 3))}" for name in names]
    found = compare(parse_groups(groups), baseline="per-token")
    assert as_text(found) == Path("comparison.txt").read_text(encoding="utf-8").rstrip("\n")
    recorded = json.loads(Path("comparison.json").read_text(encoding="utf-8"))
    assert [entry["variant"] for entry in recorded["missing"]] == ["over-positions"] * 3
    assert all(entry["why"].startswith("not causal") for entry in found.as_json()["missing"])
    assert found.as_json()["missing"] == recorded["missing"]


def test_runs_of_a_group_differ_in_seed_and_name_only(tmp_path: Path) -> None:
    base = write_group(tmp_path, "base", NOISE)
    odd = write_study_run(tmp_path / "odd", seed=8, optim__lr=0.5)
    twin = write_study_run(tmp_path / "twin", seed=2)
    other = write_study_run(tmp_path / "other", seed=1)

    with pytest.raises(UserError, match=r"the runs of base differ in optim.lr \(.*0.5 in .*odd"):
        compared(f"{base},{odd}", f"v={other}")
    with pytest.raises(UserError, match=r"base1 and .*twin of base have the same run.seed, 2"):
        compared(f"{base},{twin}", f"v={other}")
    apart = [write_study_run(tmp_path / f"apart{order}", seed=2, data__seed=order) for order in (2, 3, 4)]
    with pytest.raises(UserError, match=r"base1 and .*apart2 of v have the same run.seed, 2|apart2 and .*base1"):
        compared(f"v={tmp_path / 'base1'},{apart[0]}", f"w={other}")
    assert compared(base.replace("base=", "v=", 1), f"w={apart[1]},{apart[2]}")["variants"]["w"]["seeds"] == 2
    with pytest.raises(UserError, match="twice"):
        compared(base, f"v={tmp_path / 'base0'}")
    with pytest.raises(UserError, match="--paired: v has other seeds than base"):
        compared(base, f"v={other},{write_study_run(tmp_path / 'seven', seed=7)}", in_pairs=True)
    assert compared(base, write_group(tmp_path, "w", NOISE), in_pairs=True)["data"]["paired"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["A=a"], "two groups of runs or more"),
        (["A=a", "A=b"], "names A twice"),
        (["A=a", "B"], "use NAME=RUN,RUN,…"),
        (["A=no-run", "B=none"], "no-run is not a run's folder"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compared(*arguments)


def test_a_baseline_that_is_not_there_is_refused(tmp_path: Path) -> None:
    groups = [write_group(tmp_path, name, NOISE[:2]) for name in "AB"]
    with pytest.raises(UserError, match="--baseline is C: use one of A, B"):
        compared(*groups, baseline="C")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a STUDY.yaml, or --compare"),
        (["a.yaml", "--compare", "A=a", "B=b"], "give a STUDY.yaml, or --compare"),
        (["a.yaml", "--paired"], "--paired is for --compare"),
        (["a.yaml", "--baseline", "A"], "--baseline is for --compare and --report"),
        (["--compare", "A=a", "B=b", "--jobs", "2"], "--jobs is for a STUDY.yaml"),
    ],
)
def test_options_of_the_one_use_are_refused_in_the_other(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    with pytest.raises(UserError, match=words):
        study_command.parse_arguments()
