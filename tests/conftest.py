"""Shared by all tests: one thread, and small configurations."""

import os
import subprocess

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, so that subprocesses inherit it too

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from pipeline.config import Config, load_config  # noqa: E402

torch.set_num_threads(1)

TINY = {
    "run.dir": "runs/tiny",
    "model.name": "vit_p",
    "data.loader": "synthetic",
    "data.image_size": 32,
    "train.global_batch": 8,
    "train.steps": 10,
}
DECODER = {"method.decoder_depth": 1, "method.decoder_width": 96, "method.decoder_heads": 3}
TINY_METHOD = {
    "randsac": {"method.segment_size": 2, "method.partition_size": 2, **DECODER},
    "pcae": {"optim.ema": 0.99, **DECODER},
    "mae": DECODER,
    "finetune": {"method.num_classes": 10},
}


def build_tiny_config(method: str = "randsac", **overrides: Any) -> Config:
    """A configuration of 8 x 8 tokens and four blocks; a keyword such as ``train__seed=3`` sets ``train.seed``."""
    settings = {"method.name": method, **TINY, **TINY_METHOD[method]}
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}
    return load_config([], [f"{key}={value}" for key, value in settings.items()])


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """``tiny_config(method, **overrides)`` builds a small configuration; see ``build_tiny_config``."""
    return build_tiny_config


@pytest.fixture
def images() -> torch.Tensor:
    """Four random images, uint8 [4, 3, 32, 32]."""
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder whose checkpoints lie on a file system of 8 MiB: one fits, two do not."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
