"""Which nodes are remembered as sick, from what was found in a run's starts."""

import json
import time
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.run_folder import RunFolder
from slurm.findings import EXPIRY_SECONDS, remember, sick_nodes
from slurm.history import StartId, append_finding, read_starts, starts_file

NOW = 1_800_000_000.0
NODES = ["n1", "n2", "n3"]
WHATS = ["sniff_test", "hung", "lost_gpu"]


def finding(node: str, what: str = "sniff_test", restart: int = 0, days_ago: float = 0.0) -> dict[str, Any]:
    at = NOW - days_ago * 86_400
    return {"kind": "finding", "time": at, "job_id": "7", "restart_count": restart, "node": node, "what": what}


def sniff_test(restart: int, *sick: str, at: float) -> str:
    """A line of metrics.jsonl; two GPUs of each node have stood out."""
    outliers = [
        {"rank": rank, "node": node, "check": "matrix_tflops", "rate": 10.0, "median": 600.0}
        for node in sick
        for rank in range(2)
    ]
    record = {"kind": "sniff_test", "step": 0, "job_id": "7", "restart_count": restart, "sick": outliers, "time": at}
    return json.dumps(record) + "\n"


def test_two_independent_findings_are_remembered_for_a_week():
    assert sick_nodes([finding("n1"), finding("n2"), finding("n2", restart=1)], NOW) == ["n2"]
    assert sick_nodes([finding("n1"), finding("n1", "hung")], NOW) == ["n1"]  # of one start, seen in two ways
    assert sick_nodes([finding("n1"), finding("n1")], NOW) == []  # written twice
    assert sick_nodes([finding("n1", days_ago=8), finding("n1", restart=1)], NOW) == []
    both = [finding(node, restart=restart, days_ago=5 - restart) for node in ("n1", "n2") for restart in (0, 1)]
    assert sick_nodes([*both, finding("n1", "hung", restart=2)], NOW) == ["n1", "n2"]  # the latest first
    assert sick_nodes([{"kind": "finding", "time": NOW, "job_id": "7", "node": "n1"}, *both[:1]], NOW) == []


@given(
    found=st.lists(
        st.tuples(st.sampled_from(NODES), st.sampled_from(WHATS), st.integers(0, 3), st.floats(0, 14)), max_size=30
    )
)
def test_nobody_is_sick_without_two_reasons(found: list[tuple[str, str, int, float]]):
    sick = sick_nodes([finding(*one) for one in found], NOW)
    for node in NODES:
        fresh = {
            (what, restart) for name, what, restart, days in found if name == node and days * 86_400 < EXPIRY_SECONDS
        }
        assert (node in sick) is (len(fresh) >= 2)


def test_findings_of_sniff_tests_and_hangs_are_written_down_once(tmp_path: Path):
    folder, now = RunFolder(tmp_path / "run"), time.time()
    folder.path.mkdir()
    append_finding(folder, StartId("6", 0), "n3", "lost_gpu", "7 of 8")
    # the first start had a power failure, and no end in which its sniff test could have been looked at
    folder.metrics.write_text(
        sniff_test(0, "n2", at=now - 60) + sniff_test(1, at=now - 30) + '{"kind": "sniff_test"}\n'
    )
    assert remember(folder, StartId("7", 1), {}, ["n1", "n2"]) == []
    with open(folder.metrics, "a", encoding="utf-8") as metrics:
        metrics.write(sniff_test(2, "n2", at=now))
    hung = {"failure": "hung", "culprit_node": "n1", "reason": "hung for 600 s"}
    assert remember(folder, StartId("7", 2), hung, ["n1", "n2"]) == ["n1", "n2"]
    assert remember(folder, StartId("7", 2), {}, ["n1", "n2"]) == ["n2"]
    lines = [(line["node"], line["what"], line["job_id"], line["restart_count"]) for line in read_starts(folder)]
    assert lines == [
        ("n3", "lost_gpu", "6", 0), ("n2", "sniff_test", "7", 0), ("n2", "sniff_test", "7", 2), ("n1", "hung", "7", 2),
    ]  # fmt: skip
    assert json.loads(starts_file(folder).read_text().splitlines()[1])["time"] == now - 60
