"""Which nodes a job's next start does without, by Slurm's answers alone."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.host_list import expand
from slurm.spare_nodes import LeftOut, cap, choose, parse_nodes

JOB = {"NumNodes": "2", "NodeList": "n[1-2]", "ExcNodeList": "(null)", "ReqNodeList": "(null)", "Features": "(null)"}


def sinfo(**states: str) -> str:
    """What sinfo prints of nodes that are alike."""
    return "".join(f"{name}|{state}|64|500000|gpu:h100:8(S:0-1)|(null)\n" for name, state in states.items())


FOUR = sinfo(n1="allocated", n2="allocated", n3="idle", n4="mixed")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("(null)", []),
        ("n1", ["n1"]),
        ("n[1-3,7],login1", ["n1", "n2", "n3", "n7", "login1"]),
        ("gpu[008-010]", ["gpu008", "gpu009", "gpu010"]),
        ("r[1-2]c[3,5]", ["r1c3", "r1c5", "r2c3", "r2c5"]),
        ("n1,n[1-2]", ["n1", "n2"]),
    ],
)
def test_slurm_s_short_lists(text: str, names: list[str]):
    assert expand(text) == names


@pytest.mark.parametrize(
    ("job", "printed", "found"),
    [
        ({}, FOUR, LeftOut(("n2",), "n2")),
        ({"ExcNodeList": "n[5-6]"}, FOUR, LeftOut(("n2",), "n5,n6,n2")),  # the user's own stay
        ({"ExcNodeList": "n[2,5]"}, FOUR, LeftOut()),  # the user has left it out already
        ({}, FOUR.replace("mixed", "idle*").replace("idle\n", "drained"), LeftOut(("n2",), "n2")),
        ({"ReqNodeList": "n2"}, FOUR, "n2 can't be left out: the job asks for it (--nodelist)"),
        ({"Reservation": "class"}, FOUR, "n2 can't be left out: the job is in a reservation"),
        ({}, "", "n2 can't be left out: Slurm does not answer"),
        ({}, sinfo(n1="allocated", n2="allocated"), "needs 2 nodes, and only 1 others would do"),
        ({}, sinfo(n1="allocated", n2="allocated", n3="drained"), "only 1 others"),
        ({}, sinfo(n1="allocated", n2="allocated", n3="idle*"), "only 1 others"),  # it does not respond
        ({}, sinfo(n1="allocated", n2="allocated") + "n3|idle|64|500000|gpu:a100:8|(null)", "only 1 others"),
        ({}, sinfo(n1="allocated", n2="allocated") + "n3|idle|64|250000|gpu:h100:8|(null)", "only 1 others"),
        ({}, sinfo(n1="allocated", n2="allocated") + "n3|idle|64|500000|gpu:h100:8|nvme", LeftOut(("n2",), "n2")),
        ({"Features": "old"}, sinfo(n1="mixed", n2="mixed") + "n3|idle|64|500000|gpu:h100:8|x", "only 1 others"),
    ],
)
def test_a_node_is_left_out_where_the_job_can_do_without(job: dict[str, str], printed: str, found: LeftOut | str):
    left_out = choose(["n2"], [], JOB | job, parse_nodes(printed))
    if isinstance(found, LeftOut):
        assert left_out == found
    else:
        assert found in left_out.complaint
        assert (left_out.nodes, left_out.excluded) == ((), None)


def test_what_an_earlier_requeue_left_out_comes_back():
    job = JOB | {"NodeList": "n[1,3]", "ExcNodeList": "n[2,9]"}  # the last one is the user's
    nodes = parse_nodes(FOUR)
    assert choose([], ["n2"], job, nodes) == LeftOut((), "n9")
    assert choose(["n3", "n2"], ["n2"], job, nodes).nodes == ("n3", "n2")
    assert choose(["n2", "gone"], ["n2"], job, nodes) == LeftOut(("n2",))  # Slurm has it already, and knows no other


@given(
    states=st.lists(st.sampled_from(["idle", "mixed", "down", "drained*", "idle~"]), min_size=1, max_size=30),
    needed=st.integers(1, 20),
    data=st.data(),
)
def test_the_job_keeps_what_it_needs_and_the_user_s_own_list(states: list[str], needed: int, data: st.DataObject):
    names = [f"n{number}" for number in range(len(states))]
    mine = names[:needed]
    printed = sinfo(**dict(zip(names, itertools.chain(["allocated"] * needed, states[needed:]), strict=False)))
    own = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=5))
    wanted = data.draw(st.lists(st.sampled_from(names), max_size=10))
    before = data.draw(st.lists(st.sampled_from([name for name in names if name not in own] or ["x"]), unique=True))
    job = {"NumNodes": str(needed), "NodeList": ",".join(mine), "ExcNodeList": ",".join([*own, *before])}
    found = choose(wanted, before, job, parse_nodes(printed))
    excluded = {*own, *before} if found.excluded is None else {*expand(found.excluded)}
    assert excluded == {*own, *found.nodes}
    assert set(found.nodes) <= set(wanted) - set(own)
    assert len(found.nodes) <= cap(needed)
    if found.nodes:
        left = [node.name for node in parse_nodes(printed) if node.usable and node.name not in excluded]
        assert len(left) >= needed
