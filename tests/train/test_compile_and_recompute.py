"""torch.compile, activation checkpointing, DDP and weight tying, in all combinations; none changes what is learnt."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint_files import list_checkpoints
from common.run_folder import RunFolder
from data_prep.token_sets.token_set import TokenSet
from model.config import ModelConfig
from model.gpt import GPT
from model.initialisation import initialise
from model.ranks import start_ranks
from tests.eval.hellaswag_files import official_rows, write_official
from tests.helpers.ranks import run_ranks
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import losses, run_of, tiny_arguments, train, train_by_path, weights_hashes
from train.batches.plan import plan_batch
from train.evaluations.evaluation import WHOLE, Tools
from train.evaluations.validation import Validation
from train.optimization.compilation import compile_blocks
from train.optimization.ddp import BUCKET_MIB, Parallel
from train.progress import Progress
from train.run.recorder import Recorder
from train.settings.sections import Config, ModelSection

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler on CPUs"
)
COMBINATIONS = [
    (compile_, recompute, tie)
    for compile_ in ("false", "true")
    for recompute in ("none", "full", "every")
    for tie in ("true", "false")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_token_set(folder, train_tokens=5_000, val_tokens=500)
    return folder


def train_all(folder: Path, data: Path) -> None:
    """Three steps of every combination, in this rank."""
    import sys

    from train.pretrain import main

    for compile_, recompute, tie in COMBINATIONS:
        sys.argv = [
            "pretrain.py",
            *tiny_arguments(folder, data, f"{compile_}-{recompute}-{tie}", "--run.max_steps=3"),
            f"--run.compile={compile_}",
            f"--recompute.mode={recompute}",
            f"--model.tie_weights={tie}",
        ]
        assert main() == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_all_combinations_learn_the_same(tmp_path: Path, data: Path, world_size: int) -> None:
    (tmp_path / "runs").mkdir()
    tiny_arguments(tmp_path, data, "any")  # writes the configuration before the ranks race for it
    run_ranks(world_size, tmp_path / "store", train_all, tmp_path, data)
    for tie in ("true", "false"):
        reference = losses(run_of(tmp_path, f"false-none-{tie}"))
        assert sorted(reference) == [1, 2, 3]
        names = set(weights_hashes(list_checkpoints(run_of(tmp_path, f"false-none-{tie}").checkpoints)[0][1]))
        for recompute in ("none", "full", "every"):
            assert losses(run_of(tmp_path, f"false-{recompute}-{tie}")) == reference  # to the bit
            compiled = run_of(tmp_path, f"true-{recompute}-{tie}")
            assert losses(compiled) == pytest.approx(reference, abs=1e-5)
            assert set(weights_hashes(list_checkpoints(compiled.checkpoints)[0][1])) == names


def test_recomputing_draws_the_same_dropout(tmp_path: Path, data: Path) -> None:
    for mode in ("none", "full", "every"):
        arguments = tiny_arguments(tmp_path, data, mode, f"--recompute.mode={mode}", "--recompute.norms=true")
        train(1, tmp_path, [*arguments, "--run.max_steps=5", "--model.dropout=0.2"])
    assert losses(run_of(tmp_path, "full")) == losses(run_of(tmp_path, "none"))
    assert losses(run_of(tmp_path, "every")) == losses(run_of(tmp_path, "none"))


def gradients(compiled: bool, recompute_every: int) -> dict[str, np.ndarray]:
    """Of two micro-batches of a small model with dropout, each with its own seed."""
    config = ModelConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.3)
    model = GPT(config)
    initialise(model, seed=1)
    model.recompute_every = recompute_every
    if compiled:
        compile_blocks(model)
    tokens = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(3))
    for seed in (11, 12):
        torch.manual_seed(seed)
        model(tokens, tokens).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}


@needs_compiler
@pytest.mark.slow
def test_compiled_dropout_draws_the_same_masks_recomputed_or_not(tmp_path: Path) -> None:
    """Inductor's own random numbers differ from eager mode's, and on GPUs once between a block's two forwards."""
    cases = [(False, 0), (True, 0), (True, 1)]
    eager, compiled, recomputed = (run_ranks(1, tmp_path / "store", gradients, *case)[0] for case in cases)
    for name, gradient in compiled.items():
        assert np.array_equal(recomputed[name], gradient), name
        np.testing.assert_allclose(gradient, eager[name], rtol=1e-4, atol=1e-4, err_msg=name)


def graphs_of_a_block() -> tuple[int, int]:
    """How many graphs two ranks compile of blocks that are larger than DDP's first bucket, and its bytes."""
    from torch._inductor import compile_fx

    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, *_: object, **__: object) -> object:
        graphs.append(graph)
        return graph.forward

    pytest.MonkeyPatch().setattr(compile_fx, "compile_fx", count)
    ranks = start_ranks("cpu")
    model = GPT(ModelConfig(vocab_size=257, block_size=8, n_layer=2, n_head=2, n_embd=384))
    initialise(model, seed=1)
    compile_blocks(model)
    model.chunk_kernel = None  # the head's, in no block
    replica = Parallel(model, ranks).replica
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    replica(tokens, tokens).backward()
    ranks.close()
    assert isinstance(replica, DistributedDataParallel)
    return len(graphs), replica.bucket_bytes_cap


def test_ddp_cuts_no_compiled_block(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path / "store", graphs_of_a_block) == [(1, BUCKET_MIB << 20)] * 2


def count_graphs(folder: Path, data: Path, steps: int) -> tuple[int, dict[int, float]]:
    """How many graphs a compiled run with validations, HellaSwag and samples has compiled in all, and its losses."""
    import sys

    from train.pretrain import main

    torch._dynamo.reset()
    name = f"compiled-{steps}"
    sys.argv = [
        "pretrain.py",
        *tiny_arguments(folder, data, name, f"--run.max_steps={steps}", "--run.compile=true", "--model.dropout=0"),
        "--schedule.kind=constant",
        "--eval.every_steps=2",
        "--eval.sample_every_steps=2",
        '--eval.prompts=["ab", "cde"]',
        "--eval.hellaswag_every_steps=2",
        f"--eval.hellaswag_data={write_official(folder / 'some.jsonl', official_rows(9, words_at_most=1))}",
    ]
    assert main() == 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], losses(run_of(folder, name))


@needs_compiler
@pytest.mark.slow
def test_nothing_is_compiled_after_the_warm_up(tmp_path: Path, data: Path) -> None:
    ((short, _),) = run_ranks(1, tmp_path / "store", count_graphs, tmp_path, data, 1)
    ((long, compiled),) = run_ranks(1, tmp_path / "store", count_graphs, tmp_path, data, 9)
    assert short == long > 0
    eager = tiny_arguments(
        tmp_path, data, "eager", "--run.max_steps=9", "--model.dropout=0", "--schedule.kind=constant"
    )
    assert train_by_path(*eager).returncode == 0
    assert compiled == pytest.approx(losses(run_of(tmp_path, "eager")), abs=1e-4)
    said = run_of(tmp_path, "compiled-9").log.read_text()
    what = "compiling one graph for all 2 blocks, forward and backward, and the head's loss"
    assert re.search(rf"{what} \([^()]+ the last time\)", said), "the other run was of the same model"


def validating_shapes(data: Path) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes that this rank's model meets in the warm-up of validation, and in a validation."""
    ranks, tokens = start_ranks("cpu"), TokenSet.open(data)
    model = GPT(ModelConfig(vocab_size=257, block_size=16, n_layer=1, n_head=1, n_embd=8))
    initialise(model, seed=1)
    met: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, arguments: met.append(tuple(arguments[0].shape)))
    recorder = Recorder(RunFolder(data), replace(ranks, rank=1), 1, first_step=0, line_every=1)  # writes nothing
    config = Config(model=ModelSection(vocab_size=257, block_size=16))
    plan = plan_batch(4 * 16 * ranks.world_size, 16, 4, ranks.world_size)
    validation = Validation(config)
    validation.build(Tools(model, tokens, ranks, plan, "fp32", recorder, untrained=False))
    validation.warm_up()
    warm = list(met)
    validation.measure(Progress(), WHOLE)
    ranks.close()
    return warm, met[len(warm) :]


def test_every_rank_has_met_the_shapes_of_validation_before_the_first_step(tmp_path: Path, data: Path) -> None:
    """Each would compile for them later otherwise, while the others wait and the clock runs."""
    for warm, later in run_ranks(3, tmp_path / "store", validating_shapes, data):
        assert warm == [(4, 16)]
        assert set(later) == set(warm)


def test_without_a_compiler_true_is_refused(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "wanted", "--run.compile=true")
    done = train_by_path(*arguments, CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: run.compile is true, but a trial failed")
    assert not (tmp_path / "runs").exists()


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_goes_on_without_a_compiler_unless_told_otherwise(tmp_path: Path, data: Path) -> None:
    arguments = tiny_arguments(tmp_path, data, "moved", "--model.dropout=0")
    train(1, tmp_path, [*arguments, "--run.compile=true", "--run.max_steps=1"])
    none, cache = str(tmp_path / "no-compiler"), str(tmp_path / "cache")
    done = train_by_path(*arguments, "--run.max_steps=2", CXX=none, TORCHINDUCTOR_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    assert "compile false: a trial failed" in done.stdout
    assert max(losses(run_of(tmp_path, "moved"))) == 2
