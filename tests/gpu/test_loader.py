"""Batches on their way to a CUDA device; skipped where there is none."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipeline.data import Loader, open_loader
from pipeline.order import run_order

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def loader() -> Iterator[Loader]:
    loader = open_loader(
        "synthetic", None, image_size=64, seed=1, threads=2, augment=True, num_samples=512, num_classes=4
    )
    yield loader
    loader.close()


def order(loader: Loader, steps: int = 12):
    return run_order(1, 0, steps, loader.num_samples, 32)


def test_images_are_on_the_device_and_those_of_the_cpu(loader):
    device = torch.device("cuda", 0)
    with loader.batches(order(loader)) as here, loader.batches(order(loader), device) as there:
        for a, b in zip(here, there, strict=True):
            assert b.images.device == device and a.images.device.type == b.keys.device.type == "cpu"
            assert torch.equal(a.images, b.images.cpu()) and torch.equal(a.keys, b.keys)


def test_pixels_survive_a_stream_that_lags_behind(loader):
    """A batch's memory is not given to a later one before the work that was queued on it has run."""
    device = torch.device("cuda", 0)
    busy, sums, expected = torch.randn(4096, 4096, device=device), [], []
    with loader.batches(order(loader)) as here:
        expected = [int(batch.images.long().sum()) for batch in here]
    with loader.batches(order(loader), device) as there:
        for batch in there:
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
            sums.append(batch.images.long().sum())
            del batch
    assert [int(total) for total in sums] == expected


def test_taking_a_batch_never_waits_for_the_device(loader):
    device = torch.device("cuda", 0)
    with loader.batches(order(loader), device) as batches:
        next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                batch.images.float().mul_(2)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_memory_of_a_batch_is_pinned(loader):
    ids = np.arange(8)
    with loader.batches(iter([(0, ids)]), torch.device("cuda", 0)) as batches:
        assert next(batches).images.is_cuda
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert loader._make(0, ids, pool, slice(None), pinned=True).images.is_pinned()
