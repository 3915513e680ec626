"""The single-process engine on one CUDA device; skipped where there is none."""

import pytest
import torch

from pipeline import checkpoint
from pipeline.engine.torch import TorchEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VARIANTS = [
    ("randsac", {}),
    ("randsac", {"method__segments": "blob", "method__token_keep": 0.6, "method__predict_first": True}),
    ("randsac", {"method__skip": "none", "method__decoder_self_attention": False, "method__prefix": True}),
    ("pcae", {}),
    ("pcae", {"method__selection": "random", "method__drop_case": 1}),
    ("mae", {}),
]
variants = pytest.mark.parametrize(("method", "options"), VARIANTS, ids=str)


def steps(engine: TorchEngine, num_steps: int = 5) -> list[float]:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(num_steps):
        logs = engine.micro_step(images, engine.method.draw(torch.arange(8) + 8 * step), 1, True)
        engine.step(1e-3, 1.0, 0.9)
        losses.append(float(logs["loss"]))
    return losses


@variants
def test_fp32_on_the_device_agrees_with_the_cpu(method, options, tiny_config):
    cfg = tiny_config(method, model__drop_path=0.1, **options)
    cpu, gpu = (steps(TorchEngine(cfg, torch.device(device))) for device in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@variants
def test_half_precision_agrees_with_fp32(method, options, precision, tiny_config):
    exact = steps(TorchEngine(tiny_config(method, **options), torch.device("cuda")))
    coarse = steps(TorchEngine(tiny_config(method, engine__precision=precision, **options), torch.device("cuda")))
    # Where PCAE's teacher chooses the tokens, roundings make it choose others after some steps.
    late = 2e-2 if (method, options) == ("pcae", {}) else 1e-2
    assert coarse[:2] == pytest.approx(exact[:2], rel=1e-2) and coarse == pytest.approx(exact, rel=late)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@variants
def test_a_step_never_waits_for_the_device(method, options, precision, tiny_config):
    engine = TorchEngine(tiny_config(method, engine__precision=precision, **options), torch.device("cuda"))
    steps(engine)
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device="cuda")
    draw = engine.method.draw(torch.arange(8)).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.micro_step(images, draw, 1, True)
        engine.step(1e-3, 1.0, 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_checkpoint_moves_between_the_cpu_and_the_device(tmp_path, tiny_config):
    cfg = tiny_config("pcae")
    gpu, cpu = TorchEngine(cfg, torch.device("cuda")), TorchEngine(cfg, torch.device("cpu"))
    steps(gpu)
    path = checkpoint.save(tmp_path, 5, gpu.state(), {})
    state = cpu.state()
    checkpoint.load(path, state)
    cpu.load(state)
    for name, value in gpu.full_params().items():
        assert torch.equal(value, cpu.full_params()[name])
