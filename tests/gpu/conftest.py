"""Deterministic kernels for the tests that ask for bits."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read at the first product of a process, whichever test makes it


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As ``train.deterministic`` sets it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
