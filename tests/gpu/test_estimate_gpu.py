"""What ``estimate`` says of memory, against what a CUDA device allocates; skipped where there is none."""

import gc
import logging

import pytest
import torch

from pipeline.bench.engines import config, engine_step
from pipeline.bench.methods import random_images
from pipeline.config import Config
from pipeline.keys import sample_key
from pipeline.memory import activations, passing, state
from pipeline.methods import build_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Where layers are computed again, few images need less than the update does.
SIZES = {"none": (64, 192), "selective": (64, 192), "full": (512, 1024)}
MIB = 2**20

log = logging.getLogger(__name__)


def measured(cfg: Config, sizes: tuple[int, ...]) -> tuple[int, list[int]]:
    """Bytes of the engine at rest, after steps, and those that a step of each size of batch adds at most."""
    device = torch.device("cuda")
    gc.collect()
    before, added = torch.cuda.memory_allocated(), []
    for size in sizes:
        images = random_images(size, cfg.data.image_size).to(device)
        draw = build_method(cfg, "meta").draw(torch.from_numpy(sample_key(0, 0, torch.arange(size).numpy()))).to(device)
        step = engine_step(cfg, images, draw)
        for _ in range(3):
            step()
        rest = torch.cuda.memory_allocated() - before - images.nbytes
        torch.cuda.reset_peak_memory_stats()
        step()
        added.append(torch.cuda.max_memory_allocated() - before - images.nbytes - rest)
        del images, draw, step
        gc.collect()
    return rest, added


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("method", ["mae", "pcae", "randsac"])
def test_memory_is_what_estimate_says(method, checkpointing, caplog):
    caplog.set_level(logging.INFO)
    sizes = few, many = SIZES[checkpointing]
    cfg = config(method, "vit_b", many, "bf16")
    cfg = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"checkpoint_layers": checkpointing})})
    measured(cfg, sizes[:1])  # with a process's first steps the libraries take memory to work in, which stays
    rest, (with_few, with_many) = measured(cfg, sizes)
    held, an_image = state(cfg), activations(cfg, checkpointing)
    told = held.total + passing(cfg, 1, reshard=False, accumulates=False) + many * an_image.peak
    slope, most = (with_many - with_few) / (many - few), rest + with_many
    log.info(f"{method} {checkpointing}: at rest {rest / MIB:.1f} MiB, of {held.total / MIB:.1f} with gradients; an image "
          f"{slope / MIB:.2f}, predicted {an_image.peak / MIB:.2f}; at most with {many} images "
          f"{most / MIB:.1f}, predicted {told / MIB:.1f}")  # fmt: skip
    assert rest == pytest.approx(held.total - held.gradients, rel=0.02)
    # The backward pass's own numbers are not counted; where layers are computed again they are a part of all.
    assert slope == pytest.approx(an_image.peak, rel=0.2)
    # Gradients come while activations go: both are never there in full.
    assert 0.75 * told < most <= 1.1 * told
