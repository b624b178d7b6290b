"""What a site gives to a job: every line of docs/cluster.md's table of sites, and what goes wrong in a site.sh."""

import json
import re
import shlex
import signal
import socket
import time
from pathlib import Path

import pytest

from slurm.submit import build_parser, setup_lines
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import PROJECT
from tests.slurm.stand_ins import Site, make_site

PAGE = (PROJECT / "docs" / "cluster.md").read_text()


def recipes() -> list[tuple[str, list[str], list[str]]]:
    """Of each row of the table: the site, the lines of its site.sh, the words after `sbatch`."""
    rows = re.search(r"\| site \| `slurm/site.sh` \| command \|\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE)
    assert rows is not None
    found = []
    for row in rows[1].splitlines():
        site, lines, command = row.strip("| ").split(" | ")
        words = shlex.split(command.strip("`"))
        assert words[0] == "sbatch"
        found.append((site, re.findall(r"`([^`]+)`", lines), words[1:]))
    return found


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    make_token_set(tmp_path / "data", train_tokens=20_000, val_tokens=500)
    return [f"--data.path={tmp_path / 'data'}", f"--run.root={tmp_path / 'runs'}"]


def test_the_table_has_the_sites_that_are_asked_for():
    wanted = {
        "JUWELS",
        "LUMI",
        "Frontier",
        "Perlmutter",
        "Snellius",
        "MareNostrum",
        "Leonardo",
        "Alliance",
        "university",
    }
    sites = " ".join(site for site, _, _ in recipes())
    assert {name for name in wanted if name not in sites} == set()


@pytest.mark.parametrize(("name", "lines", "words"), recipes(), ids=[name for name, _, _ in recipes()])
def test_a_site_s_line_brings_the_trainers_up(name: str, lines: list[str], words: list[str], site: Site, options):
    site.write_site(*lines)
    number = next(index for index, word in enumerate(words) if word.startswith("slurm/"))
    gpus = next((word.split("=")[1] for word in words[:number] if word.startswith("--gpus-per-node=")), "8")
    job_s_own = {"SLURM_TMPDIR": "/nowhere/77", "TMPDIR": str(site.folder)}
    done = site.run(*words[number:], *options, SLURM_GPUS_ON_NODE=gpus, **job_s_own)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert not (site.folder / "touched").exists()
    check, launch = site.started()
    assert f"--nproc_per_node={gpus}" in launch["argv"]
    assert [word for word in launch["argv"] if word in options or word in words] == [*words[number + 1 :], *options]
    environment, text = launch["environment"], "\n".join(lines)
    for modules in re.findall(r"^(?:module|ml) (.+)$", text, re.MULTILINE):
        assert f" {modules}" in environment["MODULES"]
    for variable, value in re.findall(r"(\w+)=(\S+)", "\n".join(line for line in lines if line.startswith("export"))):
        assert environment[variable] == value
    assert ("activate" in text) == ("CONDA_ENV" in environment)
    assert (
        ("container" in text or "apptainer" in text) == ("INSIDE" in environment) == ("INSIDE" in check["environment"])
    )
    head = f"{socket.gethostname().split('.')[0]}i" if "LONGHAUL_HEAD" in text else "127.0.0.1"
    assert f"--master_addr={head}" in launch["argv"]
    secret = json.loads(check["environment"]["LONGHAUL_BEGINNING"])["secret"]
    assert secret == environment["PET_RDZV_ID"]
    assert secret not in " ".join([*check["argv"], *launch["argv"], done.stdout])  # command lines are everybody's
    assert int(environment["SLURM_JOB_END_TIME"]) > time.time()  # which a container could not ask for
    assert environment["SLURM_EXPORT_ENV"] == "ALL"


def job(site: Site, *options: str, **environment: str) -> tuple[int, list[str]]:
    done = site.run("slurm/1p3b.sh", *options, **environment)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["true", "module() { return 3; }", "module load nothing"], "ended with status 3"),
        (["exit 0"], "ended the shell with status 0 instead of returning"),
        (["set -e", "false", "true"], "ended the shell with status 1 instead of returning"),
        (["if true; then"], "ended with status 2"),
        (["return 4"], "ended with status 4"),
        (['in_container="apptainer exec image.sif"'], "sets in_container as one word: write it as an array"),
        (["srun_options=--mpi=none"], "sets srun_options as one word: write it as an array"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("kind", ["script", "submit.py"])
def test_a_site_s_script_that_fails_is_named(kind: str, lines: list[str], words: str, site: Site):
    site.write_site(*lines)
    if kind == "script":
        status, said = job(site)
    else:
        text = "\n".join(setup_lines(build_parser().parse_args(["--config=x"]), [])) + "\necho srun\n"
        script = site.folder / "submitted.sh"
        script.write_text(text.replace(str(PROJECT), str(site.clone)))
        done = site.run(str(script))
        status, said = done.returncode, done.stderr.splitlines()
        assert "srun" not in done.stdout
    assert status == 2, said
    assert re.fullmatch(
        rf"error: \S*slurm/site.sh {words}.*: the job ends before anything is started: fix the file", said[-1]
    )
    assert site.started() == []


def test_a_command_that_fails_on_the_way_is_named_and_passed_over(site: Site, options: list[str]):
    site.write_site(
        "true",
        "false",
        "[ -d /nowhere ] && echo there",
        "cd /",
        "IFS=:",
        'MINE="$*"',
        "export MINE",
        "set -u",
        "set +u",
    )
    status, said = job(site, *options)
    assert (status, said) == (0, ["warning: slurm/site.sh, line 2: `false` ended with status 1"])
    _, launch = site.started()
    assert launch["environment"]["MINE"] == ""  # the job's own words are not site.sh's
    assert launch["argv"][-2:] == options
    assert launch["cwd"] == str(site.clone)


@pytest.mark.parametrize("before", ["", "-e", "-u", "-o pipefail", "-euo pipefail"])
def test_the_shell_is_as_it_was_before_site_sh(before: str, site: Site):
    site.write_site("set -f -o pipefail", "IFS=,", "set -- other words", "cd /")
    show = 'echo "$-|$SHELLOPTS|$IFS|$*|$PWD"'
    script = f"[ -z '{before}' ] || set {before}; {show}; . slurm/site_environment.sh; {show}"
    done = site.run("-c", script, "bash", "the job's", "words")
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:] != "", done.stderr


def test_settings_in_site_sh_need_no_export(site: Site, options: list[str]):
    site.write_site("LONGHAUL_RANKS_PER_NODE=3", "LONGHAUL_FRUITLESS_STARTS=none")
    status, said = job(site, *options)
    assert (status, len(said)) == (2, 1)
    assert said[0].startswith("error: LONGHAUL_FRUITLESS_STARTS is 'none'")
    site.write_site("LONGHAUL_RANKS_PER_NODE=3")
    assert job(site, *options) == (0, [])
    assert "--nproc_per_node=3" in site.started()[-1]["argv"]
    site.write_site("LONGHAUL_RANKS_PER_NODE='$(echo 4)'")
    assert job(site, *options)[1] == ["error: LONGHAUL_RANKS_PER_NODE is '$(echo 4)': use a whole number"]


def test_what_begin_prints_must_arrive(site: Site, options: list[str]):
    site.write_site('in_container=(bash -c \'case $2 in *start_job.py) "$@" > /dev/null ;; *) "$@" ;; esac\' bash)')
    status, said = job(site, *options)
    assert status == 2
    assert "its output has not come here" in said[-1]
    assert site.started() == []


def test_a_wrong_node_list_is_named(site: Site):
    status, said = job(site, SLURM_JOB_NUM_NODES="3")
    assert status == 2
    assert "scontrol show hostnames n[1-2] gave no list of 3 nodes: n1\nn2" in "\n".join(said)


def test_a_line_break_in_a_folder_is_one_line(site: Site, options: list[str], tmp_path: Path):
    status, said = job(site, *options, f"--run.root={tmp_path}/two\nlines")
    assert (status, len(said)) == (2, 1)
    assert said[0].startswith("error: run_folder is ")


def test_a_node_s_own_folder_that_the_job_does_not_know_is_named(site: Site, options: list[str]):
    status, said = job(site, *options, "--data.stage_to=$NOT_SET/x")
    assert (status, len(said)) == (2, 1)
    assert said[0].startswith("error: $NOT_SET/x: the environment variable NOT_SET is not set")
    assert site.started() == []


def test_the_script_requeues_where_the_task_could_not(site: Site):
    """slurm/training_task.py leaves with 75 where it has no scontrol."""
    script = 'cd "$SLURM_SUBMIT_DIR" && . slurm/requeue.sh && (exit 75); end_job $?'
    assert site.run("-c", script).returncode == -9  # as Slurm ends a job that it requeues
    assert (site.folder / "requeued").read_text() == "requeue 77\n"
    assert site.run("-c", script.replace("75", "3")).returncode == 3


@pytest.mark.parametrize("answer", ["taken", "refused"])
def test_the_script_leaves_nodes_out_and_is_requeued_either_way(answer: str, site: Site):
    """Slurm's SIGTERM comes with the requeue, and ends the job only afterwards."""
    script = 'cd "$SLURM_SUBMIT_DIR" && . slurm/requeue.sh && sleep() { :; } && end_job 75 n2,n3'
    done = site.run("-c", script, LEFT_OUT=answer)
    assert done.returncode == -signal.SIGTERM
    asked = (site.folder / "requeued").read_text().splitlines()
    assert asked[:2] == ["requeue 77", "update JobId=77 ExcNodeList=n2,n3"]
    words = "does without nodes: n2,n3" if answer == "taken" else "get any node, as Slurm refused to leave out n2,n3: "
    assert words in done.stdout
