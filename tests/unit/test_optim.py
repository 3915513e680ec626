"""Parameter groups by name and the schedules, against the published formulas."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.methods import build_method
from pipeline.optim import build_optimizer, lr_at, momentum_at, takes_decay
from pipeline.settings import OptimConfig

few = settings(max_examples=60, deadline=None)
lengths = st.integers(2, 5000).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total - 1)))


@pytest.mark.parametrize("name", ["randsac", "pcae", "mae"])
def test_matrices_and_tokens_decay_and_nothing_else(name: str, tiny_config: Any) -> None:
    cfg = tiny_config(name, optim__weight_decay=0.07)
    named = dict(build_method(cfg).named_parameters())
    optimizer = build_optimizer(named.items(), cfg.optim, cfg.shape.depth)
    names = {id(parameter): n for n, parameter in named.items()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == {n for n, p in named.items() if p.requires_grad}
    for n, value in decay.items():
        norm = ".norm" in n
        matrix = n.endswith(".weight") and not norm
        token = n.rsplit(".", 1)[-1] in ("cls_token", "mask_token")
        assert value == (0.07 if matrix or token else 0.0), n
    assert decay["decoder.mask_token"] == 0.07 and decay["encoder.patch_embed.proj.weight"] == 0.07
    if name == "randsac":
        assert decay["decoder.skip"] == 0 and named["decoder.skip"].dim() == 2
    else:
        assert decay["encoder.cls_token"] == 0.07


def test_a_bias_with_two_axes_does_not_decay() -> None:
    optim, square = OptimConfig(), torch.Size((2, 2))
    assert not takes_decay("decoder.bias", square, optim) and not takes_decay("a.norm.weight", torch.Size((2,)), optim)
    assert takes_decay("decoder.skip_proj.weight", square, optim) and takes_decay("x.bias_net.weight", square, optim)


def test_moments_are_made_at_once_and_settings_arrive(tiny_config: Any) -> None:
    cfg = tiny_config("mae", optim__betas="[0.8, 0.97]")
    named = dict(build_method(cfg).named_parameters())
    optimizer = build_optimizer(named.items(), cfg.optim, cfg.shape.depth)
    trained = [p for p in named.values() if p.requires_grad]
    assert set(optimizer.state) == set(trained)
    for parameter in trained:
        state = optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert state["step"].shape == () and not any(value.any() for value in state.values())
        assert {value.dtype for value in state.values()} == {torch.float32}
    for group in optimizer.param_groups:
        assert tuple(group["betas"]) == (0.8, 0.97) and group["eps"] == 1e-8 and not group["amsgrad"]


@given(lengths, st.floats(1e-6, 10))
@few
def test_lr_is_linear_warm_up_then_half_a_cosine(length: tuple[int, int], peak: float) -> None:
    total, warmup = length
    rates = [lr_at(step, total, warmup, peak) for step in range(total + 1)]
    assert rates[warmup] == pytest.approx(peak) and rates[total] == pytest.approx(0, abs=1e-12 * peak)
    assert rates[0] == (0 if warmup else pytest.approx(peak))
    assert all(a < b for a, b in zip(rates[:warmup], rates[1 : warmup + 1], strict=True))
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    for step in range(0, total + 1, max(1, total // 7)):
        if step < warmup:
            expected = peak * step / warmup
        else:
            expected = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert rates[step] == pytest.approx(expected, abs=1e-12 * peak)


def test_lr_at_the_quarters() -> None:
    assert lr_at(5, 110, 10, 2.0) == 1.0 and lr_at(60, 110, 10, 2.0) == pytest.approx(1.0)
    assert lr_at(35, 110, 10, 2.0) == pytest.approx(1 + math.sqrt(0.5))
    assert lr_at(500, 110, 10, 2.0) == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 5000), st.floats(0, 0.99999))
@few
def test_property_36_momentum_rises_from_its_first_value_and_ends_below_one(total: int, first: float) -> None:
    values = [momentum_at(step, total, first, 1.0) for step in range(total)]
    assert values[0] == pytest.approx(first, abs=1e-15)
    assert all(a <= b + 1e-15 for a, b in zip(values, values[1:], strict=False))
    assert values[-1] < 1 and momentum_at(total, total, first, 1.0) == 1
    for step in range(0, total, max(1, total // 7)):
        expected = 1 - (1 - first) * 0.5 * (1 + math.cos(math.pi * step / total))
        assert values[step] == pytest.approx(expected, abs=1e-12)


def test_property_36_momentum_tends_to_one_as_runs_grow() -> None:
    last = [1 - momentum_at(total - 1, total, 0.9999, 1.0) for total in (10, 100, 1000)]
    assert last[0] > 10 * last[1] > 100 * last[2] > 0
    assert momentum_at(7, 10, 0.9, 0.9) == pytest.approx(0.9) and momentum_at(10, 10, 0.5, 0.8) == pytest.approx(0.8)
    assert momentum_at(5, 10, 0.5, 0.8) == pytest.approx(0.65)
