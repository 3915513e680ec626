"""Writing safetensors files as any other file is written: who may read it is the umask's affair."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors.torch import save_file
from torch import Tensor

_UMASK: Final = os.umask(0o022)
os.umask(_UMASK)  # there is no other way to ask


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors to a file. Raises OSError or SafetensorError when that fails; the file is not synced."""
    save_file(dict(tensors), path, dict(metadata))
    path.chmod(0o666 & ~_UMASK)  # safetensors lets nobody else read it
