"""fineweb.py as users run it: killed, crowded, without a network, with a hub that stands on loopback."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from common.errors import UserError
from data_prep.corpora.corpus import InputFile
from data_prep.corpora.encode_pool import START_METHODS
from data_prep.corpora.hub import HubFiles, HubSource, config_patterns, matches
from data_prep.token_sets.token_set import TokenSet
from tests.helpers.http_server import Fault, Server, hub_files
from tests.helpers.mounts import fill, make_read_only, small_disk
from tests.helpers.parquet_files import make_source, texts, write_parquet

PROJECT = Path(__file__).resolve().parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/fineweb-like"
CONFIGS = [
    {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
    {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    make_source(folder, files=3, documents=400, row_group=50)
    return folder


def command(out, *options):
    return [sys.executable, str(PROJECT / "data_prep" / "fineweb.py"), "--out", str(out), *map(str, options)]


def run(out, *options, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return subprocess.run(
        command(out, *options),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=out.parent,
        env=inherited | {"HF_TOKEN_PATH": "/nonexistent"} | environment,
    )


def small(source, *options):
    return ["--source", source, "--shard-tokens", "10K", "--val-tokens", "1000", *options]


def contents(folder):
    """Every published file's bytes: shards and manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".json")}


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    done = run(out, *small(source), "--workers", 0, "--json", out.parent / "figures.json")
    assert done.returncode == 0, done.stderr
    return out


def test_the_table_the_figures_and_the_manifest_agree(undisturbed, source):
    figures = json.loads((undisturbed.parent / "figures.json").read_text())
    opened = TokenSet.open(undisturbed, verify="full")
    manifest = opened.manifest
    assert figures["val_sha256"] == manifest.val_sha256
    assert figures["splits"]["val"]["tokens"] == manifest.total("val", "tokens") == 1000
    assert [shard.tokens for shard in manifest.splits["train"][:-1]] == [10_000] * (len(manifest.splits["train"]) - 1)
    names = [file["name"] for file in manifest.source["files"]]
    assert names == [f"sample/10BT/00{number}_00000.parquet" for number in range(3)]
    assert str(source) not in (undisturbed / "manifest.json").read_text()


def test_twenty_kills_at_random_moments_end_in_the_same_bytes(source, tmp_path):
    """SIGKILL of the parent or of a worker, anywhere from the start of Python to the last of some 60 shards."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "set"
    options = ["--source", source, "--shard-tokens", "2K", "--val-tokens", "1000"]
    assert run(undisturbed, *options, "--workers", 0).returncode == 0
    generator = random.Random(20)
    kills = interrupted_shards = 0
    while kills < 20:
        method = START_METHODS[-(kills % 2)]  # the quickest to start, or the default
        process = psutil.Popen(
            command(out, *options, "--workers", 2, "--start-method", method),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if kills % 2 == 0:  # counted from the start, the others from the first new shard on
            time.sleep(generator.uniform(0.1, 1.5))
        else:
            wait_for_a_new_shard(out, process)
            time.sleep(generator.uniform(0, 0.3))
        workers = []
        try:
            workers = [child for child in process.children(recursive=True) if child.is_running()]
            victim = generator.choice(workers) if workers and kills % 4 == 3 else process
            victim.kill()
            kills += 1
        except psutil.NoSuchProcess:  # it ended by itself
            pass
        process.wait(timeout=30)
        interrupted_shards += not (out / "manifest.json").exists() and bool(list(out.glob("*.bin")))
        if (out / "manifest.json").exists():  # it was faster than the kill: once more from the beginning
            assert contents(out) == contents(undisturbed)
            for path in out.iterdir():
                path.unlink()
        psutil.wait_procs(workers, timeout=10)
    assert interrupted_shards >= 5
    done = run(out, *options, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(undisturbed)


def test_what_a_kill_leaves_half_published_is_taken_away(source, tmp_path):
    """Killed while it wrote its journal or its manifest, or right before the journal would have gone."""
    out = tmp_path / "set"
    assert run(out, *small(source), "--workers", 0).returncode == 0
    before = contents(out)
    for name in ("manifest.json.0123abcd.tmp", "preparing.json.0123abcd.tmp", "preparing.json"):
        (out / name).write_text("{")
    again = run(out, *small(source), "--workers", 0)
    assert (again.returncode, "complete already" in again.stdout) == (0, True), again.stderr
    assert contents(out) == before
    assert not list(out.glob("*.tmp"))


def wait_for_a_new_shard(out, process):
    before = len(list(out.glob("*.bin"))) if out.exists() else 0
    while process.poll() is None and (not out.exists() or len(list(out.glob("*.bin"))) == before):
        time.sleep(0.005)


def test_workers_leave_when_the_parent_is_killed(tmp_path):
    write_parquet(tmp_path / "in" / "d.parquet", texts(3_000, seed=1) * 20, row_group=5_000)
    process = psutil.Popen(
        command(tmp_path / "set", "--source", tmp_path / "in", "--workers", 2, "--shard-tokens", "100K"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_a_new_shard(tmp_path / "set", process)
    children = process.children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_a_dead_worker_ends_the_command_with_its_place(tmp_path):
    write_parquet(tmp_path / "in" / "d.parquet", texts(3_000, seed=1) * 20, row_group=5_000)
    out = tmp_path / "set"
    options = ["--source", tmp_path / "in", "--workers", 2, "--shard-tokens", "100K", "--start-method", "spawn"]
    process = psutil.Popen(command(out, *options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("train-*.bin")) if out.exists() else True:
        assert process.poll() is None
        time.sleep(0.005)
    worker = max(process.children(), key=lambda child: child.cpu_times().user)
    worker.kill()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "was killed by SIGKILL at d.parquet, row group" in err
    assert "run the same command again" in err
    assert "Traceback" not in err


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    write_parquet(tmp_path / "in" / "d.parquet", texts(3_000, seed=1) * 20, row_group=5_000)
    out = tmp_path / "set"
    options = ["--source", tmp_path / "in", "--workers", 1, "--shard-tokens", "100K"]
    process = psutil.Popen(command(out, *options), stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_a_new_shard(out, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert not list(out.glob("*.tmp"))


def test_two_writers_are_kept_apart(source, tmp_path):
    from data_prep.corpora.preparation import writing_alone

    with writing_alone(tmp_path / "set"):
        done = run(tmp_path / "set", *small(source), "--workers", 0)
    assert done.returncode == 2
    assert "another command is writing" in done.stderr


@pytest.mark.parametrize(
    ("bytes_per_file", "shard_tokens", "what"),
    [(15_000, "10K", "train-00000.bin needs"), (6_000, "1K", "preparing.json (")],
)
def test_a_full_disk_is_one_line_and_room_lets_it_go_on(bytes_per_file, shard_tokens, what, source, tmp_path):
    """Full under a shard, or under the journal, which grows with the shards."""
    out, undisturbed = tmp_path / "set", tmp_path / "undisturbed"
    options = ["--source", source, "--shard-tokens", shard_tokens, "--val-tokens", "1000", "--workers", 0]
    script = (
        "import resource, runpy, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_per_file}, {bytes_per_file}))\n"
        f"sys.argv = {command(out, *options)[1:]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    full = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert full.returncode == 2, full.stderr
    assert f"the disk is full: {out}/{what}" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (out / "manifest.json").exists()
    assert run(out, *options).returncode == run(undisturbed, *options).returncode == 0
    assert contents(out) == contents(undisturbed)


def test_a_read_only_disk_is_one_line(source, tmp_path):
    with small_disk(tmp_path / "disk", 1024) as disk:
        make_read_only(disk)
        done = run(disk / "set", *small(source), "--workers", 0)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "can't be written (" in done.stderr


def test_no_room_for_the_figures_is_one_line(source, undisturbed, tmp_path):
    with small_disk(tmp_path / "disk", 8) as disk:
        fill(disk)
        done = run(undisturbed, *small(source), "--json", disk / "figures.json")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert f"{tmp_path}/disk/figures.json can't be written (No space left on device): free some space" in done.stderr


def test_a_complete_set_is_left_alone_and_other_settings_are_refused(source, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*.*")}
    again = run(undisturbed, *small(source))
    assert again.returncode == 0
    assert "complete already" in again.stdout
    other = run(undisturbed, "--source", source, "--shard-tokens", "20K", "--val-tokens", "1000")
    assert other.returncode == 2
    assert "another shard_tokens (10000, now 20000)" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("*.*")} == before


def test_a_prefix_has_the_same_validation_and_the_same_beginning(source, undisturbed, tmp_path):
    out = tmp_path / "set"
    assert run(out, *small(source), "--max-tokens", "25K", "--workers", 0).returncode == 0
    prefix, whole = TokenSet.open(out).manifest, TokenSet.open(undisturbed).manifest
    assert prefix.val_sha256 == whole.val_sha256
    assert [shard.tokens for shard in prefix.splits["train"]] == [10_000, 10_000, 5_000]
    assert prefix.splits["train"][:2] == whole.splits["train"][:2]


def test_dry_run_says_the_plan_and_writes_nothing(source, tmp_path):
    done = run(tmp_path / "set", *small(source), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "3 files" in done.stdout
    assert "needed" in done.stdout
    assert not (tmp_path / "set").exists()
    for tokenizer in ("gpt2", "byte"):  # the latter makes several times as many
        options = small(source, "--tokenizer", tokenizer, "--workers", 0)
        (planned,) = re.findall(r"about ([\d.]+)K training", run(tmp_path / tokenizer, *options).stdout)
        made = TokenSet.open(tmp_path / tokenizer).manifest.total("train", "tokens")
        assert 0.5 < float(planned) * 1e3 / made < 2
    sparse = tmp_path / "huge"
    sparse.mkdir()
    write_parquet(sparse / "d.parquet", ["text"])
    tail = (sparse / "d.parquet").read_bytes()
    with open(sparse / "d.parquet", "r+b") as file:  # a file of 100 TB, but for its holes
        try:
            file.truncate(100 << 40)
        except OSError:
            file.truncate(8 << 40)
        file.seek(-len(tail), os.SEEK_END)
        file.write(tail)
    refused = run(tmp_path / "set", "--source", sparse, "--dry-run")
    assert refused.returncode == 2
    assert "lacks disk space" in refused.stderr


def test_wrong_input_is_one_line(source, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        (["--source", tmp_path / "nowhere"], "not a folder"),
        (["--source", tmp_path / "empty"], "no parquet files"),
        (["--source", source, "--field", "body", "--workers", 0], "no column 'body'"),
        (["--source", source, "--max-tokens", "many"], "not a number"),
    ]
    for options, words in cases:
        done = run(tmp_path / "set", *options)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_little_text_takes_no_workers(source, tmp_path):
    done = run(tmp_path / "set", *small(source), "--dry-run")
    assert "workers  0 (this process encodes)" in done.stdout, done.stderr


def test_the_cpu_mask_is_respected():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no CPU masks here")
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", "from data_prep.corpora.workers import choose_workers; print(choose_workers(None))"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert done.stdout == "1\n", done.stderr


@pytest.fixture
def hub(source):
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.parquet")}
    files["data/CC-MAIN-2024-10/other.parquet"] = b"not meant"
    with Server(files=hub_files(REPO, REVISION, files, CONFIGS)) as running:
        yield running


def from_hub(out, hub, *options):
    basic = ["--repo", REPO, "--shard-tokens", "10K", "--val-tokens", "1000", "--workers", 0]
    return run(out, *basic, *options, HF_ENDPOINT=hub.url)


def online(hub):
    """The environment of a command that may ask this hub."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return environment | {"HF_ENDPOINT": hub.url}


def resolve(number):
    return f"/datasets/{REPO}/resolve/{REVISION}/sample/10BT/00{number}_00000.parquet"


def test_the_hub_gives_the_same_shards_as_a_folder(hub, undisturbed, tmp_path):
    hub.faults[resolve(0)] = [Fault(status=429, retry_after="0"), Fault(cut=20_000)]
    hub.faults[resolve(2)] = [Fault(damage=True)]
    done = from_hub(tmp_path / "set", hub)
    assert done.returncode == 0, done.stderr
    manifest = TokenSet.open(tmp_path / "set", verify="full").manifest
    assert manifest.splits == TokenSet.open(undisturbed).manifest.splits
    assert manifest.source["revision"] == REVISION
    assert manifest.source["asked_revision"] == "main"
    assert all("sha256" in file["digest"] for file in manifest.source["files"])
    assert not (tmp_path / "set" / "download").exists()
    assert hub.url not in (tmp_path / "set" / "manifest.json").read_text()


def test_few_files_are_held_unless_asked(hub, tmp_path):
    most = 0
    stop = threading.Event()

    def watch():
        nonlocal most
        while not stop.is_set():
            try:
                most = max(most, len(list((tmp_path / "set" / "download").rglob("*.parquet*"))))
            except FileNotFoundError:  # it went away meanwhile
                continue
            time.sleep(0.002)

    for number in range(3, 12):  # nine more files
        data = hub.files[resolve(number % 3)]
        name = f"sample/10BT/0{number:02d}_00000.parquet"
        folder = f"/api/datasets/{REPO}/tree/{REVISION}/sample/10BT"
        hub.files[f"/datasets/{REPO}/resolve/{REVISION}/{name}"] = data
        entry = next(entry for entry in hub.files[folder] if resolve(number % 3).endswith(entry["path"]))
        hub.files[folder].append(entry | {"path": name})
    watching = threading.Thread(target=watch)
    watching.start()
    done = from_hub(tmp_path / "set", hub)
    stop.set()
    watching.join()
    assert done.returncode == 0, done.stderr
    assert len(TokenSet.open(tmp_path / "set").manifest.source["files"]) == 12
    assert 1 <= most <= 4
    kept = from_hub(tmp_path / "kept", hub, "--keep-parquet")
    assert kept.returncode == 0
    assert len(list((tmp_path / "kept" / "download").rglob("*.parquet"))) == 12


def test_a_busy_hub_is_asked_again_from_the_first_question_on(hub, tmp_path):
    hub.faults[f"/api/datasets/{REPO}/revision/main"] = [Fault(status=429, retry_after="0"), Fault(status=503)]
    hub.faults[f"/api/datasets/{REPO}/tree/{REVISION}/sample/10BT"] = [Fault(status=429, retry_after="0")]
    done = from_hub(tmp_path / "set", hub, "--dry-run")
    assert done.returncode == 0, done.stderr


def test_a_stalled_download_keeps_nobody_from_leaving(hub, tmp_path):
    """The file fetched ahead comes no further: a minute would pass before that counts as a broken connection."""
    hub.faults[resolve(1)] = [Fault(cut=70_000, stall=True)]
    out = tmp_path / "set"
    options = ["--repo", REPO, "--shard-tokens", "10K", "--val-tokens", "1000", "--workers", 0]
    process = subprocess.Popen(command(out, *options), stderr=subprocess.PIPE, text=True, env=online(hub))
    while not list((out / "download").rglob("*.part")) or not hub.asked(resolve(1)):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, "Traceback" in err) == (130, False), err


def test_a_worker_that_dies_during_a_download_ends_the_command(hub, tmp_path):
    hub.faults[resolve(0)] = [Fault(cut=70_000, stall=True)]
    out = tmp_path / "set"
    options = ["--repo", REPO, "--shard-tokens", "10K", "--val-tokens", "1000"]
    process = subprocess.Popen(
        command(out, *options, "--workers", 2, "--start-method", "spawn"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=online(hub),
    )  # fmt: skip
    while not (out / "download").exists() or not list((out / "download").rglob("*.part")):
        assert process.poll() is None
        time.sleep(0.005)
    children = psutil.Process(process.pid).children()
    next(child for child in children if "resource_tracker" not in " ".join(child.cmdline())).kill()
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, "Traceback" in err) == (2, False), err
    assert "was killed by SIGKILL without work: run the same command again" in err


@pytest.mark.parametrize("number", [0, 1])  # before the first shard, and after some
def test_a_killed_download_goes_on_at_the_pinned_revision(number, hub, undisturbed, tmp_path):
    hub.faults[resolve(number)] = [Fault(cut=66_000), *[Fault(status=404)] * 3]
    first = from_hub(tmp_path / "set", hub)
    assert first.returncode == 2
    assert "no such file" in first.stderr
    part = next((tmp_path / "set" / "download").rglob("*.part"))
    assert part.stat().st_size > 0
    for path in [path for path in hub.files if path.startswith("/api/")]:
        del hub.files[path]  # the hub moves on: main is another commit now
    second = from_hub(tmp_path / "set", hub)
    assert second.returncode == 0, second.stderr
    assert TokenSet.open(tmp_path / "set").manifest.splits == TokenSet.open(undisturbed).manifest.splits
    assert number == 0 or len(hub.asked(resolve(0))) == 1
    assert hub.asked(resolve(number))[-1].range is not None


def test_a_download_of_another_revision_is_not_taken_for_this_one(hub, undisturbed, tmp_path):
    out = tmp_path / "set"
    hub.faults[resolve(1)] = [Fault(status=404)] * 3
    assert from_hub(out, hub).returncode == 2  # begun, and left with the source's first file
    kept = out / "download" / "sample" / "10BT" / "000_00000.parquet"
    write_parquet(kept, texts(400, seed=99), row_group=50)  # which had other contents in that revision
    done = from_hub(out, hub, "--force")
    assert done.returncode == 0, done.stderr
    assert TokenSet.open(out).manifest.splits == TokenSet.open(undisturbed).manifest.splits


@pytest.mark.parametrize("name", ["../evil.parquet", "/evil.parquet", "a/../../evil.parquet", "a\\..\\evil.parquet"])
def test_a_hub_that_lists_files_of_other_folders_is_not_believed(name, tmp_path):
    with pytest.raises(UserError, match="which is not a name inside a folder"):
        HubFiles(HubSource(REPO, "x", REVISION, (InputFile(name, 1, {}),)), tmp_path / "download", keep=False)


def test_force_removes_nothing_before_the_source_is_there(source, tmp_path):
    out = tmp_path / "set"
    assert run(out, *small(source), "--workers", 0, "--max-tokens", "20K").returncode == 0
    before = contents(out)
    with Server() as gone:
        url = gone.url
    done = run(out, "--force", HF_ENDPOINT=url)
    assert (done.returncode, "can't be reached" in done.stderr) == (2, True), done.stderr
    assert contents(out) == before
    assert run(out, *small(source), "--workers", 0, "--max-tokens", "5K", "--force").returncode == 0
    assert TokenSet.open(out).manifest.total("train", "tokens") == 5_000


def test_a_token_is_sent_to_the_hub(hub, tmp_path):
    options = ["--repo", REPO, "--max-tokens", "1K", "--val-tokens", "0", "--workers", 0]
    done = run(tmp_path / "set", *options, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert hub.asked(resolve(0))[0].authorization == "Bearer hf_secret"
    assert "hf_secret" not in done.stdout + done.stderr + (tmp_path / "set" / "manifest.json").read_text()


def test_hub_mistakes_are_one_line(hub, tmp_path):
    cases = [
        (["--repo", REPO, "--config", "sample-99BT"], "choose one of default, sample-10BT"),
        (["--repo", "someone/else"], "answers 404 for someone/else: check its name"),
    ]
    for options, words in cases:
        done = run(tmp_path / "set", *options, "--dry-run", HF_ENDPOINT=hub.url)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        assert "Traceback" not in done.stderr
    with Server() as gone:
        url = gone.url
    done = run(tmp_path / "set", "--dry-run", HF_ENDPOINT=url)
    assert done.returncode == 2
    assert "--source DIR" in done.stderr
    assert done.stderr.count("\n") == 1


def test_patterns_of_a_card():
    card = {
        "configs": [
            {"config_name": "a", "data_files": "a/*.parquet"},
            {"config_name": "b", "data_files": [{"split": "train", "path": ["b/1.parquet", "b/c/**"]}]},
            {"config_name": "c", "data_files": [{"split": "test", "path": "c/*"}, {"split": "train", "path": "d/*"}]},
        ]
    }
    assert config_patterns(card, "a", "x") == ["a/*.parquet"]
    assert config_patterns(card, "b", "x") == ["b/1.parquet", "b/c/**"]
    assert config_patterns(card, "c", "x") == ["d/*"]
    with pytest.raises(UserError, match="choose one of a, b, c"):
        config_patterns(card, "z", "x")
    assert matches("b/c/d/e.parquet", ["b/c/**"])
    assert matches("a/x.parquet", ["a/*.parquet"])
    assert not matches("a/b/x.parquet", ["a/*.parquet"])
    assert not matches("a/x.json", ["a/*"])


def test_a_copy_of_the_repository_is_read_by_configuration(source, tmp_path):
    copy = tmp_path / "copy"
    write_parquet(copy / "sample" / "10BT" / "0.parquet", texts(50, seed=0))
    write_parquet(copy / "data" / "CC" / "0.parquet", texts(50, seed=1))
    card = "configs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n"
    (copy / "README.md").write_text(f"---\n{card}---\n# A copy\n")
    assert run(tmp_path / "set", "--source", copy, "--workers", 0, "--val-tokens", "0").returncode == 0
    files = TokenSet.open(tmp_path / "set").manifest.source["files"]
    assert [file["name"] for file in files] == ["sample/10BT/0.parquet"]
    for broken in (b"configs: [\n", b"configs:\n- data_files: x\n", b"configs: true\n", b"\xe4: [\n"):
        (copy / "README.md").write_bytes(b"---\n" + broken + b"---\n")
        done = run(tmp_path / "other", "--source", copy, "--dry-run")
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert "README.md is a data set's card that can't be read" in done.stderr
    assert pq.ParquetFile(copy / "sample" / "10BT" / "0.parquet").metadata.num_rows == 50
