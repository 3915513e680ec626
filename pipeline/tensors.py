"""Safetensors files: written as any other file is, so that who may read it is the umask's affair, and read back."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger("patchmill")

_UMASK: Final = os.umask(0o022)
os.umask(_UMASK)  # there is no other way to ask


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors to a file. Raises OSError or SafetensorError when that fails; the file is not synced."""
    save_file(dict(tensors), path, dict(metadata))
    path.chmod(0o666 & ~_UMASK)  # safetensors lets nobody else read it


def replace_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """``save_tensors`` in a folder that is made if need be; a kill leaves the former file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors of a file, on the CPU, and its metadata; None when it is absent or, with a warning, damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s): computing it again", path, error)
        return None
