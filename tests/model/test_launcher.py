"""Which rank a process is, by the variables that torchrun and Slurm really set."""

import pytest

from common.errors import UserError
from model.rank_environment import Place, export_place, find_place, given_gpus

STEP = {  # of the task with number 3 of `srun -N 2 --ntasks-per-node=2`
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "10013",
}
AGENT = {  # of the task in which torchrun runs, one a node
    **STEP,
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
WORKER = {
    **AGENT,
    "TORCHELASTIC_RUN_ID": "7.0",
    "GROUP_WORLD_SIZE": "2",
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
}
BATCH = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_without_a_launcher_there_is_one_rank():
    assert find_place({}) == Place(0, 1, 0, 1)


def test_torchrun_wins_over_the_task_it_runs_in():
    assert find_place(WORKER) == Place(9, 16, 1, 8)


def test_a_task_of_srun_is_a_rank():
    assert find_place(STEP) == Place(3, 4, 1, 2)


def test_uneven_tasks():
    uneven = STEP | {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"}
    assert find_place(uneven).local_world_size == 1


def test_a_batch_script_on_one_node_is_no_task():
    assert find_place(BATCH | {"SLURM_JOB_NUM_NODES": "1"}) == Place(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (BATCH, "would train alone in an allocation of 2 nodes"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, "would train alone"),
        (WORKER | {"RANK": "0", "WORLD_SIZE": "1"}, "would train alone"),
        (WORKER | {"GROUP_WORLD_SIZE": "1"}, "knows of 1 of 2 nodes"),
        (WORKER | {"SLURM_STEP_NUM_TASKS": "16"}, "needs one task a node"),
        ({name: value for name, value in STEP.items() if name != "MASTER_ADDR"}, "MASTER_ADDR"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE not set, which no launcher sets: for one process: unset RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first' in the environment, not a whole number"),
        (
            {"RANK": ""},
            "RANK is empty in the environment, not a whole number of 0 or more: for one process: unset RANK",
        ),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is empty in the environment"),
        (STEP | {"SLURM_PROCID": "-1"}, "SLURM_PROCID is '-1' .*: leave Slurm's variables as srun sets them"),
        (STEP | {"SLURM_LOCALID": ""}, "SLURM_LOCALID is empty"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "four"}, "SLURM_STEP_NUM_TASKS is 'four'"),
        (STEP | {"SLURM_STEP_NUM_NODES": "9" * 5000}, "SLURM_STEP_NUM_NODES is '999"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,x"}, "SLURM_STEP_TASKS_PER_NODE is '2,x' .*, not a list of tasks"),
        (STEP | {"SLURM_NODEID": "2"}, "SLURM_STEP_TASKS_PER_NODE has 2 nodes and SLURM_NODEID is 2"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x999999999)", "SLURM_NODEID": "999999999"}, "has 999999999 nodes"),
        (WORKER | {"GROUP_WORLD_SIZE": "one"}, "GROUP_WORLD_SIZE is 'one'"),
    ],
)
def test_what_no_launcher_sets_and_nodes_that_would_train_apart_are_refused(environment: dict[str, str], words: str):
    with pytest.raises(UserError, match=words):
        find_place(environment)


def test_empty_variables_of_slurm_are_no_step():
    assert find_place({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "", "SLURM_STEP_NUM_NODES": ""}) == Place()


def test_libraries_find_torchrun_s_variables():
    environment = dict(STEP)
    export_place(environment, find_place(STEP))
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert find_place(environment) == find_place(STEP)


@pytest.mark.parametrize(
    ("environment", "gpus", "by"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, 8, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_PER_NODE": "a100:4", "SLURM_JOB_GPUS": "0,1"}, 4, "SLURM_GPUS_PER_NODE=a100:4"),
        ({"SLURM_GPUS_PER_NODE": "a100:4,v100:2"}, 6, "SLURM_GPUS_PER_NODE=a100:4,v100:2"),
        ({"SLURM_JOB_GPUS": "0-3,6"}, 5, "SLURM_JOB_GPUS=0-3,6"),
        ({"SLURM_STEP_GPUS": "2"}, 1, "SLURM_STEP_GPUS=2"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2, "CUDA_VISIBLE_DEVICES=0,1"),  # all that older ones set
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "3"}, 1, "SLURM_GPUS_ON_NODE=8"),  # bound, or shortened
        ({"SLURM_GPUS_ON_NODE": "8", "ROCR_VISIBLE_DEVICES": "0,1"}, 2, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}, 1, "SLURM_GPUS_ON_NODE=2"),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""}, 8, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_PER_NODE": "0"}, 0, ""),  # --gpus-per-node=0
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": "1"}, 0, ""),  # of the job's nodes, another has them
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0, ""),
        ({}, 0, ""),
    ],
)
def test_the_gpus_that_slurm_has_given(environment: dict[str, str], gpus: int, by: str):
    assert given_gpus(environment | {"SLURM_JOB_ID": "7"}) == (gpus, by)
    assert given_gpus(environment) == (0, "")
