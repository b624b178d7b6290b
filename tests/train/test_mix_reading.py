"""What runs over a mix read, by the real start and loader without a model: the same whatever happens to them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ranks import Ranks
from tests.helpers.token_sets import make_token_set
from train.batches.plan import plan_batches
from train.batches.shuffle import windows_at
from train.batches.training_sequences import open_loader, prepare_packing, training_sequences
from train.settings.sections import BatchConfig, Config, DataConfig, MixSource, MixStage, ModelSection, RunConfig
from train.startup.fit_to_data import mix_facts, mixture_of, open_data, start_of_mix
from train.startup.position import Reading, begin_progress

LENGTH = 16  # tokens of a sequence
SIZES = {"web": 50, "code": 20, "books": 9}  # about as many sequences
STEP = 12  # sequences: for 1 to 4 ranks
STEPS = 30  # of each part of a course
Read = list[tuple[str, int]]  # sequences with their source, in the order of the step's micro-batches


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    alone = Ranks(0, 1, 0, 1, torch.device("cpu"))
    for seed, (name, count) in enumerate(SIZES.items()):
        tokens = make_token_set(
            folder / name, train_tokens=LENGTH * count + 1, val_tokens=40, shard_tokens=200, seed=seed
        )
        prepare_packing(tokens, LENGTH, alone)
    return folder


@dataclass(frozen=True)
class Life:
    """A start that is killed: of how many ranks, after how many steps, of which the last few were not saved."""

    ranks: int
    steps: int
    unsaved: int


LIVES = st.lists(st.builds(Life, st.integers(1, 4), st.integers(0, 14), st.integers(0, 5)), max_size=5)
LAST_RANKS = st.integers(1, 4)


@st.composite
def data_of(draw: st.DrawFn, folder: Path, names: tuple[str, ...]) -> DataConfig:
    """A mix of these sources; in its last stage each has a share."""

    def weights(lowest: float) -> dict[str, float]:
        return {name: draw(st.floats(lowest, 10)) for name in names}

    stages, until = [], 0
    for _ in range(draw(st.integers(0, 2))):
        tokens = draw(st.integers(1, 60 * LENGTH))
        some = {**weights(0), draw(st.sampled_from(names)): 1.0}
        stages.append(MixStage(some, until + tokens, ramp_tokens=draw(st.integers(0, tokens - 1))))
        until += tokens
    if stages:
        stages.append(MixStage(weights(1), ramp_tokens=draw(st.integers(0, 40 * LENGTH))))
    mix = [MixSource(name, str(folder / name), weight) for name, weight in weights(1).items()]
    return DataConfig(mix=mix, stages=stages)


class Course:
    """A run's reading and its checkpoints' facts about it."""

    def __init__(self, data: DataConfig, seed: int, manifest: dict[str, Any] | None) -> None:
        model = ModelSection(vocab_size=257, block_size=LENGTH, n_layer=1, n_head=1, n_embd=8)
        batch = BatchConfig(tokens_per_step=STEP * LENGTH, micro_batch=1)
        self.config = Config(model=model, data=data, batch=batch, run=RunConfig(seed=seed))
        self.tokens = open_data(self.config)
        reading = Reading.of(self.config, self.tokens.identity)
        self.progress, _ = begin_progress(manifest, reading)
        alike = manifest is not None and reading.cuts_alike(Reading.recorded(manifest))
        self.start, _ = start_of_mix(self.tokens, manifest, same_sequences=alike)
        self._facts = {**reading.facts(), "data_identity": self.tokens.identity, **mix_facts(self.tokens, self.start)}

    def read(self, ranks: int, steps: int) -> list[Read]:
        """What so many ranks read together, by step."""
        data, length = self.config.data, self.config.model.block_size
        loaders = [
            open_loader(
                self.tokens,
                plan_batches(self.config.batch.stages, length, 1, ranks),
                Ranks(rank, ranks, rank, ranks, torch.device("cpu")),
                length=length,
                stride=None,
                packed=data.is_packed,
                mask_documents=False,
                seed=self.config.order_seed(),
                mixture=mixture_of(self.tokens, self.start.first),
            )
            for rank in range(ranks)
        ]
        found = []
        for step in range(steps):
            shares = [loader.step_at(self.progress.sequences + step * STEP) for loader in loaders]
            assert sum(share.target_count for share in shares) == shares[0].total_target_count
            numbers = np.stack([share.windows for share in shares], axis=1).flatten()  # (A, ranks, M)
            names = map(loaders[0].order.named, numbers.tolist())
            found.append([name if isinstance(name, tuple) else (Path(data.path).name, name) for name in names])
        return found

    def saved(self, steps: int) -> dict[str, Any]:
        """The manifest of a checkpoint so many steps after the start."""
        counts = {
            "step": self.progress.step + steps,
            "tokens": self.progress.tokens + steps * STEP * LENGTH,
            "sequences": self.progress.sequences + steps * STEP,
        }
        return json.loads(json.dumps({**counts, **self._facts}))


def read_through(
    data: DataConfig, seed: int, start: dict[str, Any] | None, lives: list[Life], last_ranks: int
) -> tuple[list[Read], dict[str, Any]]:
    """A part of a course through kills in a row: each of its steps whenever it was read, and the last manifest."""
    by_step: dict[int, Read] = {}
    manifest, begun = start, 0 if start is None else start["step"]
    for life in [*lives, Life(last_ranks, STEPS, 0)]:
        course = Course(data, seed, manifest)
        steps = min(life.steps, begun + STEPS - course.progress.step)
        for number, read in enumerate(course.read(life.ranks, steps), start=course.progress.step + 1):
            assert by_step.setdefault(number, read) == read, "another life has read something else in this step"
        saved = max(0, steps - life.unsaved)
        manifest = course.saved(saved) if saved else manifest
    assert manifest is not None
    return [by_step[begun + number] for number in range(1, STEPS + 1)], manifest


@settings(max_examples=25)
@given(case=st.data(), seed=st.integers(0, 2**31), packing=st.sampled_from(["stream", "whole_documents"]))
def test_kills_ranks_and_branches_read_what_one_undisturbed_rank_does(
    sets: Path, case: st.DataObject, seed: int, packing: Any
) -> None:
    everything = tuple(SIZES)
    courses = [case.draw(data_of(sets, everything))]
    if case.draw(st.booleans()):  # a trunk on one set
        courses.insert(0, DataConfig(path=str(sets / case.draw(st.sampled_from(everything)))))
    for _ in range(case.draw(st.sampled_from([2, 1, 0]))):  # branches
        names = case.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True).map(tuple))
        courses.append(case.draw(data_of(sets, names)))
    read_of: dict[str, list[int]] = {name: [] for name in SIZES}
    manifest = None
    for data in courses:
        data = DataConfig(path=data.path, mix=data.mix, stages=data.stages, packing=packing)
        undisturbed, _ = read_through(data, seed, manifest, [], 1)
        found, manifest = read_through(data, seed, manifest, case.draw(LIVES), case.draw(LAST_RANKS))
        assert found == undisturbed
        for name, number in (sequence for step in found for sequence in step):
            read_of[name].append(number)
    # over all branches, each source's order continues where it was: nothing comes again before its epoch ends
    for name, numbers in read_of.items():
        tokens = open_data(Config(data=DataConfig(path=str(sets / name))))
        part = training_sequences(
            tokens, LENGTH, stride=None, packed=packing == "whole_documents", mask_documents=False
        )
        assert numbers == windows_at(0, len(numbers), part.count, seed).tolist(), name
        assert name != "books" or len(numbers) > part.count, "the smallest source's epoch has not ended"
