"""What ``engine.offload=nvme`` needs before DeepSpeed starts: an extension for asynchronous I/O, and a folder."""

import atexit
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import CUDA_HOME

from pipeline.config import Config, UserError
from pipeline.zero_config import swap_folder
from pipeline.zero_memory import swap_bytes

log = logging.getLogger("patchmill")


def prepare_nvme(cfg: Config, builder: Any) -> None:
    """Compile what DeepSpeed's ``builder`` builds, unless it is there; in the end this rank's files are removed.

    All ranks call it. Raises UserError where libaio or a compiler is missing, or the folder cannot take the files.
    """
    rank, folder = dist.get_rank(), swap_folder(cfg)
    for left in folder.glob("rank*"):  # of a process that was killed, or of a larger number of them
        number = int(left.name.removeprefix("rank"))
        if number == rank or number >= dist.get_world_size():
            _remove(folder, number)
    needed = swap_bytes(cfg) // dist.get_world_size()
    problem = _reserve(folder / f"rank{rank}", needed)
    failed = torch.tensor(float(problem is not None))
    dist.all_reduce(failed, dist.ReduceOp.MAX)  # by now all ranks of a host have theirs
    atexit.register(_remove, folder, rank)
    if failed:
        raise UserError(f"engine.offload_dir = {cfg.engine.offload_dir}: {needed / 2**30:.3f} GiB for this rank cannot be written: "
                        f"{problem or 'another rank says why'}; set it to another folder")  # fmt: skip
    (folder / f"rank{rank}").write_bytes(b"")
    toolkit = CUDA_HOME is not None or not torch.cuda.is_available()
    if shutil.which("g++") is None or not toolkit or not builder.is_compatible():
        raise UserError("engine.offload = nvme: needs g++, libaio with its headers and on a GPU's host the CUDA toolkit (nvcc, "
                        "CUDA_HOME) to compile DeepSpeed's extension for it; install them (apt: g++ libaio-dev; "
                        "conda: cxx-compiler libaio cuda-toolkit), or set engine.offload=cpu")  # fmt: skip
    log.info("engine.offload = nvme: needs an extension of DeepSpeed's, which the first start compiles in some minutes")
    start = time.monotonic()
    with _compiling() as kept:
        try:
            builder.load(verbose=False)
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise UserError(f"engine.offload = nvme: DeepSpeed's extension for it cannot be compiled: {str(error).strip()[-300:]}; "
                            "set engine.offload=cpu") from error  # fmt: skip
    log.info("engine.offload = nvme: the extension was there after %.0f s, kept in %s", time.monotonic() - start, kept)


def _reserve(path: Path, size: int) -> str | None:
    """What keeps a file of this size from being made. DeepSpeed would not see it: it writes on, and aborts when it reads."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return error.strerror
    return None


@contextmanager
def _compiling() -> Iterator[Path]:
    """One process at a time. Torch's own lock is a file: one that a killed process left would be waited for for ever."""
    name = f"torch{torch.__version__}-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]}"  # another environment's is rebuilt
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "patchmill" / name)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "patchmill.lock").open("w")
    except OSError as error:
        raise UserError(f"engine.offload = nvme: {folder} cannot be written ({error.strerror}), where DeepSpeed's extension for it "
                        "is kept; set TORCH_EXTENSIONS_DIR in the environment to another folder") from None  # fmt: skip
    with lock as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        for extension in ("async_io", "pin_memory"):
            (folder / extension / "lock").unlink(missing_ok=True)
        # For this device. DeepSpeed does not understand all that a container's list may name, such as 9.0a.
        named = os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
        try:
            yield folder
        finally:
            if named is not None:
                os.environ["TORCH_CUDA_ARCH_LIST"] = named


def _remove(folder: Path, rank: int) -> None:
    """The rank's files, and the folder when it was the last; those of a killed process are removed by the next start."""
    shutil.rmtree(folder / "zero_stage_3" / "optimizer" / f"rank{rank}", ignore_errors=True)
    with suppress(OSError):
        (folder / f"rank{rank}").unlink()
    if not list(folder.glob("rank*")):
        shutil.rmtree(folder, ignore_errors=True)
