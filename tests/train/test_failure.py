"""Which of several failures explains the others."""

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from train.launching.torchrun_agent import report


@pytest.mark.parametrize(
    ("ends", "status", "last", "memory"),
    [
        # rank: (exit code, second in which torchrun noted it)
        ({0: (1, 100), 1: (-9, 131)}, 1, "rank 0", False),  # torchrun's own kill, after its 30 s
        ({0: (1, 100), 1: (-9, 104)}, 1, "rank 0", False),  # somebody was faster
        ({0: (1, 101), 1: (-9, 100)}, 137, "rank 1", True),
        ({0: (1, 100), 1: (-9, 100)}, 137, "rank 1", True),  # noted together: its peer saw it die
        ({0: (1, 100), 1: (-9, 100), 2: (-9, 131)}, 137, "rank 1", True),
    ],
)
def test_only_a_rank_killed_before_its_peers_left_is_a_memory_case(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    ends: dict[int, tuple[int, int]],
    status: int,
    last: str,
    memory: bool,
) -> None:
    failures = {
        rank: ProcessFailure(rank, 1000 + rank, code, str(tmp_path / "none")) for rank, (code, _) in ends.items()
    }
    for rank, (_, second) in ends.items():
        failures[rank].timestamp = second
    assert report(failures) == status
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(last)
    assert ("for lack of memory" in lines[-1]) == memory
    assert not any("for lack of memory" in line for line in lines[:-1])
