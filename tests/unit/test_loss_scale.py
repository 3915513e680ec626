"""fp16: a loss scale that never shows in what is logged or learned, and that gives way when gradients overflow."""

import pytest
import torch
from torch import Tensor

from pipeline import checkpoint, launch, optim
from pipeline.config import Config, UserError
from pipeline.engine import StepReport
from pipeline.engine.torch import TorchEngine
from pipeline.optim import LossScale

CPU = torch.device("cpu")  # which computes in fp16 too, only slowly
METHODS = ("randsac", "pcae", "mae")


def step(engine: TorchEngine, number: int = 0) -> tuple[dict[str, Tensor], StepReport]:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    keys = torch.arange(8) + 8 * number
    for part, last in ((slice(4), False), (slice(4, None), True)):
        logs = engine.micro_step(images[part], engine.method.draw(keys[part]), 2, last)
    return logs, engine.step(1e-3, 1.0, 0.9)


@pytest.mark.parametrize("method", METHODS)
def test_fp16_learns_what_fp32_does(method, tiny_config):
    exact = TorchEngine(tiny_config(method), CPU)
    half = TorchEngine(tiny_config(method, engine__precision="fp16"), CPU)
    for number in range(4):
        (logs, report), (half_logs, half_report) = step(exact, number), step(half, number)
        assert float(half_logs["loss"]) == pytest.approx(float(logs["loss"]), rel=5e-3)
        assert float(half_report.grad_norm) == pytest.approx(float(report.grad_norm), rel=2e-2)
        assert float(half_report.skipped) == 0
        assert float(half_logs["loss_scale"]) == optim.FIRST_SCALE and "loss_scale" not in logs
    assert all(value.dtype == torch.float32 for value in half.full_params().values())


def test_the_scale_keeps_small_gradients(tiny_config, monkeypatch):
    """Without it they would be 0 in fp16: here the smallest are a loss's millionth part."""

    def zeros(first: float) -> int:
        monkeypatch.setattr(optim, "FIRST_SCALE", first)
        engine = TorchEngine(tiny_config("mae", engine__precision="fp16"), CPU)
        forward = engine.method.forward
        engine.method.forward = lambda *args: (forward(*args)[0] * 1e-6, forward(*args)[1])
        step(engine)
        return sum(int((state == 0).sum()) for name, state in engine.state().items() if name.startswith("exp_avg."))

    assert zeros(2.0**16) < 0.5 * zeros(1.0)


def test_an_overflow_is_skipped_and_halves_the_scale(tiny_config):
    engine = TorchEngine(tiny_config("pcae", engine__precision="fp16"), CPU)
    step(engine)
    engine.loss_scale.scale.fill_(3e38)
    before = {name: value.clone() for name, value in engine.state().items()}
    logs, report = step(engine, 1)
    assert float(report.skipped) == 1 and logs["loss"].isfinite()
    after = engine.state()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert sorted(changed) == ["loss_scale", "loss_scale.good_steps"]
    assert float(engine.loss_scale.scale) == optim.SCALES[1] and float(engine.loss_scale.good_steps) == 0


def test_the_scale_grows_after_good_steps_and_stays_in_its_range(monkeypatch):
    monkeypatch.setattr(optim, "GROWTH_STEPS", 3)
    scale, good, bad = LossScale(CPU), torch.zeros(()), torch.ones(())
    seen = []
    for skipped in (good, good, bad, good, good, good, good, good, good):
        scale.update(skipped)
        seen.append(float(scale.scale) / optim.FIRST_SCALE)
    assert seen == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2]
    for skipped, limit in ((bad, optim.SCALES[0]), (good, optim.SCALES[1])):
        for _ in range(100):
            scale.update(skipped)
        assert float(scale.scale) == limit


def test_a_checkpoint_holds_the_scale(tmp_path, tiny_config):
    cfg = tiny_config("mae", engine__precision="fp16")
    engine, other = TorchEngine(cfg, CPU), TorchEngine(cfg, CPU)
    step(engine)
    engine.loss_scale.scale.fill_(256)
    path = checkpoint.save(tmp_path, 1, engine.state(), {})
    state = other.state()
    checkpoint.load(path, state)
    other.load(state)
    assert (float(other.loss_scale.scale), float(other.loss_scale.good_steps)) == (256, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("key", "value"), [("precision", "fp16"), ("backend", "nccl")])
def test_what_needs_a_gpu_is_refused_without_one(key: str, value: str, tiny_config):
    cfg: Config = tiny_config("mae", **{f"engine__{key}": value})
    with pytest.raises(UserError, match=rf"engine\.{key} = {value}: needs CUDA devices.*set engine\.{key}="):
        with launch.connect(cfg):
            pass


def test_the_backend_is_the_one_that_is_asked_for(tiny_config):
    gpu = torch.device("cuda", 0)
    assert launch.choose_backend(tiny_config("mae"), CPU) == "gloo"
    assert launch.choose_backend(tiny_config("mae"), gpu) == "cpu:gloo,cuda:nccl"
    assert launch.choose_backend(tiny_config("mae", engine__backend="gloo"), gpu) == "cpu:gloo,cuda:gloo"
