"""Activation checkpointing changes no bit and keeps less; compiled layers are compiled once and compute the same."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Config, ConfigError
from pipeline.engine import build_engine
from pipeline.engine import layers as layers_module
from pipeline.engine.torch import TorchEngine

METHODS = ("randsac", "pcae", "mae")
KEYS = torch.arange(4)


@pytest.fixture
def tiny(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    return partial(tiny_config, data__image_size=16, model__drop_path=0.3)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def train(cfg: Config, images: Tensor, steps: int) -> tuple[list[float], list[int], dict[str, Tensor]]:
    """Losses, bytes that autograd kept in each step, and the weights after them; other masks in each step."""
    engine, losses, kept = build_engine(cfg, torch.device("cpu")), [], []
    for step in range(steps):
        stored: dict[int, int] = {}

        def keep(tensor: Tensor, stored: dict[int, int] = stored) -> Tensor:
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logs = engine.micro_step(images, engine.method.draw(KEYS + 10 * step), 1, True)
        kept.append(sum(stored.values()))
        losses.append(float(logs["loss"]))
        engine.step(1e-3, 1.0, 0.9)
    return losses, kept, engine.full_params()


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_bit_and_keeps_less(tiny, images, method):
    losses, kept, weights = train(tiny(method), images, 3)
    memory = {}
    for which in ("full", "selective", 2):
        found, memory[which], others = train(tiny(method, engine__checkpoint_layers=which), images, 3)
        assert found == losses
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert memory["full"][0] < memory[2][0] < kept[0]
    assert memory["selective"][0] < kept[0]


def matrix_products(cfg: Config, images: Tensor) -> int:
    engine = TorchEngine(cfg, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        engine.micro_step(images, engine.method.draw(KEYS), 1, True)
    return counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS)
def test_selective_checkpointing_computes_no_matrix_product_again(tiny, images, method):
    none, full, selective, some = (
        matrix_products(tiny(method, engine__checkpoint_layers=which), images)
        for which in ("none", "full", "selective", 2)
    )
    assert selective == none < some < full


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpointing_changes_no_bit_under_zero(tiny, images, stage):
    zero = partial(tiny, "pcae", engine__name="deepspeed", engine__zero_stage=stage)
    losses, kept, weights = train(zero(), images, 3)
    for which in ("full", "selective"):
        found, memory, others = train(zero(engine__checkpoint_layers=which), images, 3)
        assert found == losses and memory[0] < kept[0]
        assert all(torch.equal(weights[name], others[name]) for name in weights)


INDUCTOR = [pytest.param("inductor", "none", 0, 1e-5, marks=pytest.mark.slow)]
LAYERS = [("aot_eager", which, 0, 1e-6) for which in ("none", "full", "selective")]
ZERO = [("aot_eager", which, stage, 1e-6) for which in ("none", "full") for stage in (1, 2, 3)]


@pytest.mark.parametrize(("compiler", "checkpointing", "stage", "rel"), [*LAYERS, *ZERO, *INDUCTOR])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_are_compiled_in_the_first_step_only_and_agree(
    tiny, images, method, compiler, checkpointing, stage, rel, monkeypatch
):
    torch._dynamo.reset()
    losses, _, _ = train(tiny(method), images, 5)
    counter = CompileCounterWithBackend(compiler)
    monkeypatch.setattr(layers_module, "COMPILER", counter)
    zero = {"engine__name": "deepspeed", "engine__zero_stage": stage} if stage else {}
    cfg = tiny(method, engine__compile=True, engine__checkpoint_layers=checkpointing, **zero)
    engine, found, compiled = build_engine(cfg, torch.device("cpu")), [], []
    for step in range(5):
        logs = engine.micro_step(images, engine.method.draw(KEYS + 10 * step), 1, True)
        found.append(float(logs["loss"]))
        engine.step(1e-3, 1.0, 0.9)
        compiled.append(counter.frame_count)
    assert found == pytest.approx(losses, rel=rel)
    assert compiled[0] > 0
    assert len(set(compiled)) == 1


def test_blocks_that_differ_in_their_stochastic_depth_share_the_compiled_code(tiny, images, monkeypatch):
    """Else the ninth block would exceed torch's limit of recompilations, and any deep encoder with it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(layers_module, "COMPILER", counter)
    train(tiny("mae", model__name="vit_t", engine__compile=True), images, 1)
    assert counter.frame_count == 2  # encoder and decoder


def test_a_setting_that_is_none_of_these_is_refused(tiny):
    for value in ("0", "some"):
        with pytest.raises(ConfigError, match=r"engine\.checkpoint_layers"):
            tiny("mae", engine__checkpoint_layers=value)
