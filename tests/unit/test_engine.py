"""The torch engine on the mesh (1,) against the bare module and plain arithmetic."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.engine.torch import TorchEngine
from pipeline.methods import build_method
from pipeline.methods.common import Draw
from pipeline.optim import lr_at, momentum_at

METHODS = ("randsac", "pcae", "mae")
KEYS = torch.arange(4)
FROZEN = {
    "randsac": {"encoder.pos_embed", "decoder.pos_embed", "encoder.norm.weight", "encoder.norm.bias"},
    "pcae": {"encoder.pos_embed", "decoder.pos_embed"},
    "mae": {"encoder.pos_embed", "decoder.pos_embed"},
}


@pytest.fixture
def images() -> Tensor:
    """Four random images of 4 x 4 tokens."""
    return torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def tiny(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    return partial(tiny_config, data__image_size=16)


def make(cfg: Config) -> TorchEngine:
    return TorchEngine(cfg, torch.device("cpu"))


def local(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def snapshot(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: local(value).clone() for name, value in engine.state().items()}


def teacher_weights(engine: TorchEngine) -> dict[str, Tensor]:
    return {} if engine.teacher is None else {n: p.detach().clone() for n, p in engine.teacher.named_parameters()}


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def gradients(engine: TorchEngine) -> dict[str, Tensor]:
    return {name: local(p.grad).clone() for name, p in engine.named.items() if p.grad is not None}


def one_step(
    engine: TorchEngine, images: Tensor, *, lr: float = 1e-3, clip: float | None = 1.0, momentum: float = 0.9
) -> tuple[float, float, float]:
    """Loss, gradient norm and the skipped flag of a whole step on one batch."""
    logs = engine.micro_step(images, engine.method.draw(KEYS[: len(images)]), 1, True)
    report = engine.step(lr, clip, momentum)
    return float(logs["loss"]), float(report.grad_norm), float(report.skipped)


def bare_twin(cfg: Config, engine: TorchEngine) -> tuple[nn.Module, nn.Module | None]:
    """The unwrapped method with the engine's weights, and a teacher with its averages."""
    method, weights = build_method(cfg), engine.full_params()
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            parameter.copy_(weights[name])
    teacher = method.build_teacher()
    if teacher is not None:
        teacher.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                parameter.copy_(engine.ema.get(name, method.get_parameter(f"encoder.{name}")))
    return method, teacher


def set_gradients(engine: TorchEngine, seed: int, scale: float) -> dict[str, Tensor]:
    """Replace the gradients by random ones of about this size; returns them."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, parameter in engine.named.items():
        if parameter.requires_grad:
            values[name] = scale * torch.randn(parameter.shape, generator=generator)
            local(parameter.grad).copy_(values[name])
    return values


@contextmanager
def loss_times(engine: TorchEngine, factor: float) -> Iterator[None]:
    """Inside, the method's loss is multiplied: by NaN or infinity it is what a diverged batch gives."""
    original = engine.method.forward

    def forward(images: Tensor, draw: Draw, teacher: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = original(images, draw, teacher)
        return loss * factor, logs

    engine.method.forward = forward
    try:
        yield
    finally:
        engine.method.forward = original


# Loss, gradients and the global norm


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_are_the_bare_module_s(name: str, drop_path: float, tiny: Any, images: Tensor) -> None:
    cfg = tiny(name, model__drop_path=drop_path)
    engine = make(cfg)
    one_step(engine, images)
    one_step(engine, images)
    method, teacher = bare_twin(cfg, engine)
    loss, _ = method(images, method.draw(KEYS), teacher)
    loss.backward()
    logs = engine.micro_step(images, engine.method.draw(KEYS), 1, True)
    assert float(logs["loss"]) == float(loss.detach()) and not logs["loss"].requires_grad
    expected = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    got = gradients(engine)
    assert got.keys() == expected.keys()
    if name != "randsac":
        assert differing(got, expected) == []
    # RandSAC's layers feed the next block and the decoder: a sum of gradients whose order is autograd's affair.
    assert max(float((got[n] - expected[n]).norm() / expected[n].norm()) for n in got) < 1e-6


@pytest.mark.parametrize("drop_path", [0.0, 0.6])
@pytest.mark.parametrize("name", METHODS)
def test_every_trained_parameter_and_no_frozen_one_has_a_gradient(
    name: str, drop_path: float, tiny: Any, images: Tensor
) -> None:
    engine = make(tiny(name, model__drop_path=drop_path))
    engine.micro_step(images, engine.method.draw(KEYS), 1, True)
    assert gradients(engine).keys() == engine.named.keys() - FROZEN[name]
    if not drop_path:  # with it, a branch that all images of the batch drop has a gradient of zeros
        assert [n for n, g in gradients(engine).items() if not g.any()] == []
    optimized = {p.data_ptr() for group in engine.optimizer.param_groups for p in group["params"]}
    assert optimized == {p.to_local().data_ptr() for n, p in engine.named.items() if n not in FROZEN[name]}


@pytest.mark.parametrize("name", METHODS)
def test_frozen_parameters_never_move(name: str, tiny: Any, images: Tensor) -> None:
    engine = make(tiny(name, optim__weight_decay=0.5))
    before, teacher = snapshot(engine), teacher_weights(engine)
    for _ in range(2):
        one_step(engine, images, lr=1e-2, momentum=0.5)
    moved = {n.removeprefix("model.") for n in differing(before, snapshot(engine)) if n.startswith("model.")}
    assert moved == engine.named.keys() - FROZEN[name]
    if teacher:
        after = teacher_weights(engine)
        assert [n for n in teacher if torch.equal(teacher[n], after[n])] == ["pos_embed"]


def test_grad_norm_is_global_and_taken_before_clipping(tiny: Any, images: Tensor) -> None:
    engine = make(tiny("randsac"))
    engine.micro_step(images, engine.method.draw(KEYS), 1, True)
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(engine).values()))
    assert expected > 0.1
    report = engine.step(1e-3, 0.01, 1.0)
    assert float(report.grad_norm) == pytest.approx(expected, rel=1e-5) and float(report.skipped) == 0


def plain_adamw(
    weights: dict[str, Tensor],
    grads: list[dict[str, Tensor]],
    lrs: list[float],
    decay: dict[str, float],
    clip: float | None,
) -> dict[str, Tensor]:
    """Loshchilov and Hutter's AdamW in float64, betas 0.9 and 0.95, eps 1e-8, gradients clipped by the global norm."""
    result = {}
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in step.values())) for step in grads]
    for name, weight in weights.items():
        w, m, v = weight.double(), torch.zeros(()), torch.zeros(())
        for count, (step, lr, norm) in enumerate(zip(grads, lrs, norms, strict=True), start=1):
            g = step[name].double() * (min(1.0, clip / norm) if clip else 1.0)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            w = w * (1 - lr * decay[name])
            w = w - lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.95**count)).sqrt() + 1e-8)
        result[name] = w
    return result


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_the_update_is_clipped_adamw(clip: float | None, tiny: Any, images: Tensor) -> None:
    engine = make(tiny("randsac", optim__weight_decay=0.3))
    start = {name: value for name, value in engine.full_params().items() if name not in FROZEN["randsac"]}
    # The second gradient is far larger than the first: a norm that is not clipped gives other weights.
    lrs, scales, grads = [1e-3, 3e-3, 2e-3], [1e-3, 1.0, 1e-2], []
    for seed, (lr, scale) in enumerate(zip(lrs, scales, strict=True)):
        engine.micro_step(images, engine.method.draw(KEYS), 1, True)
        grads.append(set_gradients(engine, seed, scale))
        engine.step(lr, clip, 1.0)
    not_decayed = ("bias", "norm1.weight", "norm2.weight", "norm3.weight", "norm.weight", "norm_memory.weight", "skip")
    decay = {name: 0.0 if name.endswith(not_decayed) else 0.3 for name in start}
    expected, got = plain_adamw(start, grads, lrs, decay, clip), engine.full_params()
    worst = max(float((got[name] - expected[name]).abs().max()) for name in start)
    assert worst < 2e-6


def test_clipping_changes_what_is_learned_but_not_what_is_reported(tiny: Any, images: Tensor) -> None:
    ends, norms = [], []
    for clip in (None, 1e-3):
        engine = make(tiny("mae"))
        for scale in (1.0, 100.0):
            engine.micro_step(images, engine.method.draw(KEYS), 1, True)
            set_gradients(engine, 0, scale)
            norms.append(float(engine.step(1e-3, clip, 1.0).grad_norm))
        ends.append(snapshot(engine))
    assert norms[:2] == norms[2:] and norms[1] == pytest.approx(100 * norms[0])
    assert differing(*ends)


# Accumulation


@pytest.mark.parametrize("name", METHODS)
def test_property_38_four_micro_batches_are_one_batch(name: str, tiny: Any, images: Tensor) -> None:
    whole, parts = make(tiny(name)), make(tiny(name))
    for _ in range(2):
        draw = whole.method.draw(KEYS)
        loss = float(whole.micro_step(images, draw, 1, True)["loss"])
        losses = []
        for i in range(4):
            draw = parts.method.draw(KEYS[i : i + 1])
            losses.append(float(parts.micro_step(images[i : i + 1], draw, 4, i == 3)["loss"]))
            assert bool(gradients(parts)) == (i == 3)  # reduced once, with the last
        assert sum(losses) / 4 == pytest.approx(loss, rel=1e-5) and len(set(losses)) == 4
        a, b = gradients(whole), gradients(parts)
        assert max(float((a[n] - b[n]).norm() / a[n].norm()) for n in a if not n.endswith("qkv.bias")) < 1e-4
        # The same gradients for both from here: Adam turns rounding of tiny ones into whole steps.
        set_gradients(whole, 5, 1.0)
        set_gradients(parts, 5, 1.0)
        reports = [engine.step(1e-3, None, 0.5) for engine in (whole, parts)]
        assert float(reports[0].grad_norm) == float(reports[1].grad_norm)
    assert differing(snapshot(whole), snapshot(parts)) == []
    assert differing(teacher_weights(whole), teacher_weights(parts)) == []


def test_gradients_do_not_leak_into_the_next_step(tiny: Any, images: Tensor) -> None:
    engine = make(tiny("mae"))
    draw = engine.method.draw(KEYS)
    engine.micro_step(images, draw, 1, True)
    first = gradients(engine)
    engine.step(0.0, None, 1.0)
    engine.micro_step(images, draw, 1, True)
    assert differing(first, gradients(engine)) == []


# The teacher


def test_property_37_the_teacher_starts_as_the_encoder(tiny: Any, images: Tensor) -> None:
    cfg = tiny("pcae")
    engine = make(cfg)
    encoder = {n.removeprefix("encoder."): p for n, p in engine.full_params().items() if n.startswith("encoder.")}
    assert differing(teacher_weights(engine), encoder) == []
    assert engine.ema.keys() == encoder.keys() - {"pos_embed"}
    assert differing(dict(engine.ema), {n: encoder[n] for n in engine.ema}) == []
    draw = engine.method.draw(KEYS)
    alone, _ = build_method(cfg)(images, draw)
    assert float(engine.micro_step(images, draw, 1, True)["loss"]) == float(alone)


def test_property_35_the_teacher_follows_the_student_after_its_step(tiny: Any, images: Tensor) -> None:
    engine = make(tiny("pcae"))
    for momentum in (0.9, 0.75, 0.99):
        before = {n: v.clone() for n, v in engine.ema.items()}
        one_step(engine, images, lr=1e-2, momentum=momentum)
        student = engine.full_params()
        for name, old in before.items():
            expected = momentum * old.double() + (1 - momentum) * student[f"encoder.{name}"].double()
            torch.testing.assert_close(engine.ema[name].double(), expected, rtol=0, atol=2e-7)
        assert differing({n: w for n, w in teacher_weights(engine).items() if n in engine.ema}, engine.ema) == []


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_property_36_momentum_one_freezes_and_zero_copies(momentum: float, tiny: Any, images: Tensor) -> None:
    engine = make(tiny("pcae"))
    first = teacher_weights(engine)
    for _ in range(2):
        one_step(engine, images, momentum=momentum)
    weights = engine.full_params()
    student = {n: weights[f"encoder.{n}"] for n in first}
    assert differing(teacher_weights(engine), first if momentum else student) == []
    assert differing(first, student)


def test_the_teacher_takes_no_gradient_and_is_not_optimized(tiny: Any, images: Tensor) -> None:
    engine = make(tiny("pcae"))
    engine.micro_step(images, engine.method.draw(KEYS), 1, True)
    parameters = list(engine.teacher.parameters())
    optimized = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    assert not any(p.requires_grad or p.grad is not None or id(p) in optimized for p in parameters)
    assert not any("teacher" in name for name in engine.named)
    assert not engine.teacher.training


# Steps that are not finite


@pytest.mark.parametrize(("factor", "steps_before"), [(math.nan, 0), (math.inf, 2)])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_that_is_not_finite_changes_nothing(
    name: str, steps_before: int, factor: float, tiny: Any, images: Tensor
) -> None:
    engine, undisturbed = make(tiny(name)), make(tiny(name))
    for _ in range(steps_before):
        assert one_step(engine, images) == one_step(undisturbed, images)
    before, teacher = snapshot(engine), teacher_weights(engine)
    with loss_times(engine, factor):
        _, norm, skipped = one_step(engine, images, momentum=0.5)
    assert not math.isfinite(norm) and skipped == 1
    assert differing(before, snapshot(engine)) == [] and differing(teacher, teacher_weights(engine)) == []
    counts = {float(v) for n, v in snapshot(engine).items() if n.startswith("step.")}
    assert counts == {float(steps_before)}
    assert one_step(engine, images) == one_step(undisturbed, images)
    assert differing(snapshot(engine), snapshot(undisturbed)) == []
    assert differing(before, snapshot(engine))


def test_one_bad_micro_batch_or_one_bad_number_skips_the_step(tiny: Any, images: Tensor) -> None:
    engine = make(tiny("pcae"))
    before = snapshot(engine)
    with loss_times(engine, math.nan):
        engine.micro_step(images[:2], engine.method.draw(KEYS[:2]), 2, False)
    engine.micro_step(images[2:], engine.method.draw(KEYS[2:]), 2, True)
    assert float(engine.step(1e-3, None, 0.5).skipped) == 1
    assert differing(before, snapshot(engine)) == []
    engine.micro_step(images, engine.method.draw(KEYS), 1, True)
    local(engine.named["decoder.head.bias"].grad)[3] = math.inf
    assert float(engine.step(1e-3, 1.0, 0.5).skipped) == 1
    assert differing(before, snapshot(engine)) == []


# bf16


@pytest.mark.parametrize("name", METHODS)
def test_bf16_keeps_an_fp32_master_and_computes_in_bf16(name: str, tiny: Any, images: Tensor) -> None:
    plain, engine = make(tiny(name)), make(tiny(name, engine__precision="bf16"))
    assert differing(snapshot(plain), snapshot(engine)) == []
    seen = set()
    encoder = engine.method.encoder
    hooked = [encoder.blocks[1].attn.qkv, engine.method.decoder.head]
    handles = [m.register_forward_pre_hook(lambda m, args: seen.add((m.weight.dtype, args[0].dtype))) for m in hooked]
    reference = [one_step(plain, images[:2]) for _ in range(2)]
    losses = [one_step(engine, images[:2]) for _ in range(2)]
    for handle in handles:
        handle.remove()
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    for (loss, norm, _), (expected, expected_norm, _) in zip(losses, reference, strict=True):
        assert loss != expected and loss == pytest.approx(expected, rel=0.01)
        assert norm == pytest.approx(expected_norm, rel=0.05)
    assert {value.dtype for value in engine.state().values()} == {torch.float32}
    assert {value.dtype for value in engine.full_params().values()} == {torch.float32}
    prediction = engine.call("predict", images[:2], engine.method.draw(KEYS[:2]))
    assert prediction.pred.dtype == prediction.target.dtype == torch.float32


def test_bf16_gradients_are_kept_in_fp32_and_accumulated_there(tiny: Any, images: Tensor) -> None:
    engine = make(tiny("mae", engine__precision="bf16"))
    single = []
    for i in range(2):
        engine.micro_step(images[i : i + 1], engine.method.draw(KEYS[i : i + 1]), 1, True)
        single.append(gradients(engine))
        engine.step(0.0, None, 1.0)
    for i in range(2):
        engine.micro_step(images[i : i + 1], engine.method.draw(KEYS[i : i + 1]), 2, i == 1)
    both = gradients(engine)
    assert {g.dtype for g in both.values()} == {torch.float32}
    name = "encoder.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(both[name], (single[0][name] + single[1][name]) / 2, rtol=1e-6, atol=1e-9)
    assert not torch.equal(both[name], both[name].bfloat16().float())


def test_bf16_teacher_moves_by_less_than_a_bf16_step(tiny: Any, images: Tensor) -> None:
    engine = make(tiny("pcae", engine__precision="bf16"))
    first = {n: v.clone() for n, v in engine.ema.items()}
    expected = {n: v.double() for n, v in first.items()}
    for _ in range(3):
        one_step(engine, images[:1], lr=1e-2, momentum=0.9999)
        student = engine.full_params()
        expected = {n: 0.9999 * v + 1e-4 * student[f"encoder.{n}"].double() for n, v in expected.items()}
    assert {v.dtype for v in engine.ema.values()} == {torch.float32}
    for name, value in engine.ema.items():
        way = (expected[name] - first[name]).norm()
        assert way > 0 and (value - expected[name]).norm() < 0.02 * way, name
    weight = "blocks.0.attn.qkv.weight"
    still = (first[weight].bfloat16() == engine.ema[weight].bfloat16()).float().mean()
    assert still > 0.9 and (first[weight] != engine.ema[weight]).float().mean() > 0.9
    teacher = teacher_weights(engine)
    assert {v.dtype for v in teacher.values()} == {torch.bfloat16}
    assert differing({n: teacher[n] for n in engine.ema}, {n: v.bfloat16() for n, v in engine.ema.items()}) == []


# Read-only calls


@pytest.mark.parametrize("name", METHODS)
def test_calls_at_any_moment_do_not_disturb_training(name: str, tiny: Any, images: Tensor) -> None:
    quiet, engine = make(tiny(name, model__drop_path=0.3)), make(tiny(name, model__drop_path=0.3))
    draw = engine.method.draw(KEYS)
    engine.call("predict", images, draw)
    engine.call("figure", images[:2], engine.method.draw(KEYS[:2]))
    for _ in range(3):
        expected = one_step(quiet, images)
        loss = float(engine.micro_step(images, draw, 1, True)["loss"])
        engine.call("predict", images, draw)
        report = engine.step(1e-3, 1.0, 0.9)
        engine.call("predict", images, draw)
        assert (loss, float(report.grad_norm), float(report.skipped)) == expected
    assert engine.method.training
    assert differing(snapshot(quiet), snapshot(engine)) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_call_sees_the_weights_of_the_moment(name: str, tiny: Any, images: Tensor) -> None:
    cfg = tiny(name)
    engine = make(cfg)
    draw = engine.method.draw(KEYS)
    for _ in range(2):
        engine.call("predict", images, draw)
        one_step(engine, images)
        method, teacher = bare_twin(cfg, engine)
        prediction = engine.call("predict", images, draw)
        with torch.no_grad():
            expected = method.predict(images, draw, teacher)
        assert not prediction.pred.requires_grad
        assert torch.equal(prediction.pred, expected.pred) and torch.equal(prediction.target, expected.target)
        assert torch.equal(prediction.token_ids, expected.token_ids)


def test_a_load_after_a_call_is_seen(tiny: Any, images: Tensor) -> None:
    engine, other = make(tiny("pcae")), make(tiny("pcae", train__seed=5))
    draw = engine.method.draw(KEYS)
    engine.call("predict", images, draw)
    engine.load(other.state())
    assert one_step(engine, images) == one_step(other, images)


# State


@pytest.mark.parametrize("name", METHODS)
def test_state_and_load_round_trip(name: str, tiny: Any, images: Tensor) -> None:
    engine, other = make(tiny(name)), make(tiny(name, train__seed=9))
    for _ in range(2):
        one_step(engine, images)
        one_step(other, images)
    saved = {key: value.clone() for key, value in engine.state().items()}
    after = [one_step(engine, images) for _ in range(2)]
    other.load(saved)
    assert differing(snapshot(other), {key: local(value) for key, value in saved.items()}) == []
    assert [one_step(other, images) for _ in range(2)] == after
    assert differing(snapshot(other), snapshot(engine)) == []
    assert differing(teacher_weights(other), teacher_weights(engine)) == []


@pytest.mark.parametrize("name", METHODS)
def test_state_holds_everything_under_the_plain_module_s_names(name: str, tiny: Any) -> None:
    cfg = tiny(name)
    state, method = make(cfg).state(), build_method(cfg)
    every = {n for n, _ in method.named_parameters()}
    trained = every - FROZEN[name]
    expected = {f"model.{n}" for n in every} | {f"{k}.{n}" for k in ("exp_avg", "exp_avg_sq", "step") for n in trained}
    if name == "pcae":
        expected |= {f"ema.{n}" for n in trained if n.startswith("encoder.")}
    assert state.keys() == expected
    for parameter, value in method.named_parameters():
        assert torch.equal(local(state[f"model.{parameter}"]), value)


@pytest.mark.parametrize("other", ["randsac", "mae", "deeper"])
def test_the_state_of_another_method_is_refused(other: str, tiny: Any) -> None:
    engine = make(tiny("pcae"))
    before = snapshot(engine)
    cfg = tiny("pcae", method__decoder_depth=2) if other == "deeper" else tiny(other)
    with pytest.raises(KeyError, match="decoder|encoder"):
        engine.load(make(cfg).state())
    assert differing(before, snapshot(engine)) == []


@pytest.mark.parametrize("name", METHODS)
def test_property_39_an_interrupted_run_is_the_uninterrupted_one(
    name: str, tiny: Any, images: Tensor, tmp_path: Any
) -> None:
    cfg = tiny(name, model__drop_path=0.2)

    def run(engine: TorchEngine, steps: range) -> list[tuple[float, float, float]]:
        reports = []
        for step in steps:
            lr, momentum = lr_at(step, 6, 2, 1e-2), momentum_at(step, 6, 0.8, 1.0)
            # A skipped step sets Adam's count apart from the number of batches.
            with loss_times(engine, math.nan if step == 2 else 1.0):
                reports.append(one_step(engine, images, lr=lr, momentum=momentum))
        return [tuple(str(x) for x in report) for report in reports]

    whole = make(cfg)
    expected = run(whole, range(6))
    first = make(cfg)
    assert run(first, range(4)) == expected[:4]
    checkpoint.save(tmp_path, 4, first.state(), {})
    second = make(tiny(name, model__drop_path=0.2, train__seed=1))
    state = second.state()
    checkpoint.load(checkpoint.choose(tmp_path), state)
    second.load(state)
    assert run(second, range(4, 6)) == expected[4:]
    assert differing(snapshot(second), snapshot(whole)) == []
    assert differing(teacher_weights(second), teacher_weights(whole)) == []


# First weights and randomness


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_alone_decides(name: str, tiny: Any, images: Tensor) -> None:
    ends = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        engine = make(tiny(name, model__drop_path=0.3))
        torch.rand(disturbance)
        ends.append(([one_step(engine, images) for _ in range(2)], snapshot(engine)))
    assert ends[0][0] == ends[1][0] and differing(ends[0][1], ends[1][1]) == []


@pytest.mark.parametrize("name", METHODS)
def test_first_weights_are_a_function_of_seed_and_name(name: str, tiny: Any) -> None:
    base = make(tiny(name)).full_params()
    seeded = make(tiny(name, train__seed=1)).full_params()
    drawn = [n for n in base if n.endswith("token") or (base[n].dim() > 1 and not n.endswith(("pos_embed", "skip")))]
    assert len(drawn) > 20 and not [n for n in drawn if torch.equal(base[n], seeded[n])]
    values = {tuple(base[n].flatten()[:4].tolist()) for n in drawn}
    assert len(values) == len(drawn)  # each name has its own numbers
    deeper = make(tiny(name, method__decoder_depth=3)).full_params()
    assert [n for n in base if n != "decoder.skip" and not torch.equal(base[n], deeper[n])] == []


@pytest.mark.parametrize("name", METHODS)
def test_nothing_draws_from_the_global_generator(name: str, tiny: Any, images: Tensor) -> None:
    engine = make(tiny(name, model__drop_path=0.5))
    state = torch.get_rng_state()
    one_step(engine, images)
    engine.call("predict", images, engine.method.draw(KEYS))
    assert torch.equal(state, torch.get_rng_state())


def test_full_params_are_copies_of_the_weights(tiny: Any, images: Tensor) -> None:
    engine = make(tiny("mae", engine__precision="bf16"))
    weights = engine.full_params()
    assert weights.keys() == engine.named.keys()
    assert all(torch.equal(weights[n], local(engine.state()[f"model.{n}"])) for n in weights)
    one_step(engine, images[:1])
    assert not any(torch.equal(weights[n], engine.full_params()[n]) for n in weights.keys() - FROZEN["mae"])
