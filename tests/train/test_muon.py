"""Muon's update, against singular values in float64 and torch's; roles; runs that resume or change the optimizer."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.checkpoint_files import list_checkpoints, read_checkpoint_manifest
from common.errors import UserError
from model.attention import Attention
from model.lora import add_lora
from model.lora_config import LoraConfig
from model.roles import Role, parameter_roles
from tests.helpers.token_sets import make_token_set
from tests.helpers.training import curve, losses, run_of, tiny_arguments, train, train_by_path, weights_hashes
from tests.model.small import option_id, pairwise_options, random_tokens, small_model
from train.checkpoints.ownership import optimizer_tensors
from train.optimization.declared_state import newton_schulz_flops
from train.optimization.muon import COEFFICIENTS, Muon, orthogonalised, update_scale
from train.optimization.optimizer import build_optimizer, set_learning_rate, set_momentum, set_weight_decay
from train.settings.sections import OptimConfig

MUON = OptimConfig(kind="muon", lr=0.01)


def by_singular_values(matrix: Tensor, iterations: int = 5) -> np.ndarray:
    """What the iterations do, in float64: singular values go through the polynomial, singular vectors stay."""
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    s = s / max(float(np.linalg.norm(s)), 1e-300)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


def random_matrix(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_newton_schulz_is_the_polynomial_of_singular_values(dtype: torch.dtype, tolerance: float) -> None:
    rank_one = random_matrix(48, 1) @ random_matrix(1, 32, seed=1)
    matrices = [random_matrix(*shape) for shape in ((32, 32), (48, 16), (16, 80), (1, 8))]
    matrices += [random_matrix(32, 32, scale=1e-12), random_matrix(32, 32, scale=1e12)]
    if dtype is torch.float32:
        matrices.append(rank_one)  # bfloat16's rounding fills its other directions, and iterations amplify that
    for matrix in matrices:
        found, expected = orthogonalised(matrix, 5, dtype).double().numpy(), by_singular_values(matrix)
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected), (matrix.shape, dtype)
    assert torch.linalg.matrix_norm(orthogonalised(rank_one, 5, dtype).float(), 2) < 1.3
    for tiny in (0.0, 1e-30):
        assert orthogonalised(torch.full((8, 4), tiny), 5, dtype).abs().max() <= 1e-3


class Stack(nn.Module):
    """Matrices (H·D, C), (K·D, C), (K·D, C), in one or apart, and something for AdamW."""

    def __init__(self, parts: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
        super().__init__()
        self.rows = {name: rows for name, (_, rows) in parts.items()}
        self.rest = nn.Parameter(torch.ones(2))
        for name, (value, _) in parts.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def roles(self) -> dict[str, Role]:
        return {"rest": Role("norm")} | {name: Role("matrix", rows) for name, rows in self.rows.items()}


def stepped(model: nn.Module, gradients: list[dict[str, Tensor]], config: OptimConfig = MUON) -> dict[str, Tensor]:
    """The parameters after these gradients."""
    optimizer = build_optimizer(model, config)
    for step in gradients:
        for name, gradient in step.items():
            model.get_parameter(name).grad = gradient.clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("heads", [(32, 32, 32), (32, 16, 16), (32, 8, 8)])  # the last two: fewer keys and values
def test_stacked_queries_keys_and_values_are_updated_as_if_they_were_apart(heads: tuple[int, ...]) -> None:
    weight = random_matrix(sum(heads), 32)
    gradients = [random_matrix(sum(heads), 32, seed=seed) for seed in (1, 2, 3)]
    stacked = stepped(Stack({"qkv": (weight, heads)}), [{"qkv": g} for g in gradients])["qkv"]
    names = ("q", "k", "v")
    apart = Stack({name: (part, ()) for name, part in zip(names, weight.split(heads), strict=True)})
    split = [dict(zip(names, g.split(heads), strict=True)) for g in gradients]
    updated = stepped(apart, split)
    assert torch.cat([updated[name] for name in names]).equal(stacked)
    whole = stepped(Stack({"qkv": (weight, ())}), [{"qkv": g} for g in gradients])["qkv"]
    assert (whole - stacked).norm() > 0.2 * (stacked - weight).norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("rms", "match_rms_adamw"), ("shape", "original")])
@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_whole_matrices_are_updated_as_by_torchs_muon(
    shape: tuple[int, int], scale: Any, theirs: Any, nesterov: bool
) -> None:
    """Which computes in bfloat16 everywhere."""
    weight, gradients = random_matrix(*shape), [random_matrix(*shape, seed=seed) for seed in (1, 2, 3)]
    config = OptimConfig(
        kind="muon", lr=1.0, muon_lr=0.02, muon_momentum=0.9, muon_weight_decay=0.3, muon_scale=scale,
        muon_nesterov=nesterov,
    )  # fmt: skip
    ours = stepped(Stack({"w": (weight, ())}), [{"w": g} for g in gradients], config)["w"]
    parameter = nn.Parameter(weight.clone())
    other = torch.optim.Muon(
        [parameter], lr=0.02, weight_decay=0.3, momentum=0.9, nesterov=nesterov, adjust_lr_fn=theirs
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        other.step()
    assert (ours - parameter).norm() <= 0.02 * (ours - weight).norm()


def test_the_first_update_does_not_depend_on_the_gradients_size_and_none_of_zero_is_the_decay() -> None:
    weight, gradient = random_matrix(48, 32), random_matrix(48, 32, seed=1)
    config = dataclasses.replace(MUON, weight_decay=0.5)
    updates = [stepped(Stack({"w": (weight, ())}), [{"w": gradient * size}], config)["w"] for size in (1.0, 1e-3)]
    torch.testing.assert_close(updates[0], updates[1], rtol=1e-5, atol=1e-6)
    decayed = stepped(Stack({"w": (weight, ())}), [{"w": torch.zeros_like(weight)}], config)["w"]
    assert decayed.equal(weight * (1 - 0.01 * 0.5))
    change = (updates[0] - decayed).square().mean().sqrt() / 0.01
    assert 0.15 < change < 0.25  # as large as AdamW's
    assert update_scale((64, 16), "shape") == 2.0 and update_scale((16, 64), "shape") == 1.0
    assert newton_schulz_flops((96, 32), (32, 32, 32), 5) == 3 * 5 * 6 * 32**3


@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_every_parameter_has_one_role_and_is_in_one_group(options: dict[str, Any]) -> None:
    model = small_model(**options)
    roles, shapes = parameter_roles(model), {name: p.shape for name, p in model.named_parameters()}
    assert set(roles) == set(shapes)
    matrices = {name for name, role in roles.items() if role.kind == "matrix"}
    assert matrices == {name for name in shapes if ".c_" in name and name.endswith(".weight")}
    heads, config = model.config.head_size, model.config
    rows = (config.n_head * heads, config.kv_heads * heads, config.kv_heads * heads)
    assert all(role.rows == (rows if name.endswith("c_attn.weight") else ()) for name, role in roles.items())
    optimizer = build_optimizer(model, MUON)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in optimizer.param_groups[0]["params"]} == matrices


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("options", pairwise_options(), ids=option_id)
def test_every_parameter_moves_within_two_steps(options: dict[str, Any], kind: Any) -> None:
    model = small_model(**options)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(kind=kind, lr=0.01, weight_decay=0.0))
    for seed in range(2):
        model(random_tokens(2, 16, seed=seed), random_tokens(2, 16, seed=seed + 2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, parameter in model.named_parameters() if parameter.equal(before[name])] == []


def test_adapters_are_adamws(tmp_path: Path) -> None:
    model = small_model()
    add_lora(model, LoraConfig(rank=2), seed=0)
    assert {role.kind for role in parameter_roles(model).values()} == {"adapter"}
    optimizer = build_optimizer(model, MUON)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert all(name.endswith(("step", "exp_avg", "exp_avg_sq")) for name in optimizer_tensors(model, optimizer))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({}, r"h\.0\.attn\.more has no role"),
        ({"more": Role("table")}, r"h\.0\.attn\.more has the role 'table', which no part of the optimizer knows"),
        ({"more": Role("norm"), "q_norm.weight": Role("norm")}, r"h\.0\.attn\.q_norm\.weight has several roles"),
        ({"more": Role("matrix", (2, 2))}, r"h\.0\.attn\.more has 3 rows, not the 4 of its role"),
    ],
)
def test_a_parameter_without_a_known_role_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, roles: dict[str, Role], message: str
) -> None:
    declared = Attention.roles
    monkeypatch.setattr(Attention, "roles", lambda self: declared(self) | roles)
    model = small_model(qk_norm=True)
    for block in model.h:
        block.attn.more = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(UserError, match=message):
        build_optimizer(model, MUON)
    build_optimizer(model, OptimConfig())  # AdamW asks for no roles


def test_rates_keep_their_ratio_and_settings_are_checked() -> None:
    optimizer = build_optimizer(small_model(), dataclasses.replace(MUON, lr=0.01, muon_lr=0.04))
    assert isinstance(optimizer, Muon)
    set_learning_rate(optimizer, 0.005)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.005, 0.005]
    for wrong in (
        {"muon_lr": 0.0},
        {"muon_momentum": 1.0},
        {"muon_momentum_start": 1.0},
        {"muon_momentum_warmup": -1},
        {"muon_iterations": 0},
        {"muon_weight_decay": -0.1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OptimConfig(**wrong)


def test_momentum_and_weight_decay_follow_the_step() -> None:
    config = OptimConfig(kind="muon", weight_decay=0.1, muon_weight_decay=0.3, muon_momentum_warmup=4)
    optimizer = build_optimizer(small_model(), config)
    found = []
    for step in range(1, 7):
        set_momentum(optimizer, config, step)
        found.append(optimizer.param_groups[0]["momentum"])
    assert found == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    for factor in (0.5, 1.0, 0.25):
        set_weight_decay(optimizer, factor)
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == [0.3 * factor, 0.1 * factor, 0.0]


def test_a_run_with_muon_resumes_to_the_bit_and_changes_its_optimizer_only_as_another_run(tmp_path: Path) -> None:
    make_token_set(tmp_path / "data", train_tokens=5_001, val_tokens=500)
    options = ["--optim.kind=muon", "--model.n_kv_head=1", "--schedule.kind=constant", "--checkpoint.every_steps=3"]
    options.append("--checkpoint.weights_every_steps=3")
    # each of them moves in every step, those before the checkpoint and those after it
    options += ["--optim.muon_momentum_warmup=5", "--schedule.weight_decay=linear", "--optim.z_loss=1e-3"]

    def arguments(name: str, *more: str) -> list[str]:
        return tiny_arguments(tmp_path, tmp_path / "data", name, *options, *more)

    train(1, tmp_path, arguments("calm", "--run.max_steps=6"))
    calm = run_of(tmp_path, "calm")
    train(1, tmp_path, arguments("steady", "--run.max_steps=6", "--optim.muon_momentum_warmup=0"))
    found, without = losses(calm), losses(run_of(tmp_path, "steady"))
    assert without[1] == found[1] and abs(without[6] - found[6]) > 1e-6
    [(_, last), (_, third)] = list_checkpoints(calm.checkpoints)
    manifest = read_checkpoint_manifest(last)
    assert (manifest["format_version"], manifest["optimizer"]) == (2, "muon")
    shutil.copytree(third, run_of(tmp_path, "resumed").checkpoints / third.name)
    train(1, tmp_path, arguments("resumed", "--run.max_steps=6"))
    resumed = run_of(tmp_path, "resumed")
    assert curve(resumed) == curve(calm)[-len(curve(resumed)) :]
    assert weights_hashes(list_checkpoints(resumed.checkpoints)[0][1]) == weights_hashes(last)

    refused = train_by_path(*arguments("resumed", "--run.max_steps=8", "--optim.kind=adamw"))
    assert refused.returncode == 2
    assert "was trained with the optimizer muon, but this run has adamw: resume it with muon" in refused.stderr

    weights = calm.checkpoints / "weights-00000003"
    train(1, tmp_path, arguments("other", "--optim.kind=adamw", "--run.max_steps=6", f"--resume={weights}"))
    other = run_of(tmp_path, "other")
    assert f"a new optimizer (adamw): {weights} holds only weights" in other.log.read_text(encoding="utf-8")
    assert [record[0] for record in curve(other) if record[1] != "None"] == ["4", "5", "6"]
    assert curve(other)[0][1] == curve(resumed)[0][1]  # the loss of the first step: of the same weights and data
    assert read_checkpoint_manifest(list_checkpoints(other.checkpoints)[0][1])["format_version"] == 1
