"""What ``engine.offload=nvme`` needs before DeepSpeed starts: an extension for asynchronous I/O, and a folder."""

import atexit
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from pipeline.config import Config, UserError
from pipeline.zero_config import swap_folder

log = logging.getLogger("patchmill")


def prepare_nvme(cfg: Config, rank: int, builder: Any) -> None:
    """Compile what ``builder`` builds, unless it is there, and see to it that this rank's files are removed in the end.

    Raises UserError where libaio or a compiler is missing, or the folder cannot be written.
    """
    folder = swap_folder(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{rank}").touch()
    except OSError as error:
        raise UserError(f"engine.offload_dir = {cfg.engine.offload_dir}: cannot be written: {error.strerror}") from None
    atexit.register(_remove, folder, rank)
    if shutil.which("g++") is None or not builder.is_compatible():
        raise UserError("engine.offload = nvme: needs g++ and libaio with its headers to compile DeepSpeed's extension for it; "
                        "install them (apt: g++ libaio-dev; conda: cxx-compiler libaio), or set engine.offload=cpu")  # fmt: skip
    log.info("engine.offload = nvme: compiling DeepSpeed's extension for it, at most 2 minutes; later starts find it in %s",
             "TORCH_EXTENSIONS_DIR (~/.cache/torch_extensions)")  # fmt: skip
    start = time.monotonic()
    builder.load(verbose=False)
    log.info(
        "engine.offload = nvme: the extension is there after %.0f s; files in %s", time.monotonic() - start, folder
    )


def _remove(folder: Path, rank: int) -> None:
    """The rank's files, and the folder when it was the last; what a killed process leaves its next start writes over."""
    shutil.rmtree(folder / "zero_stage_3" / "optimizer" / f"rank{rank}", ignore_errors=True)
    (folder / f"rank{rank}").unlink(missing_ok=True)
    if not list(folder.glob("rank*")):
        shutil.rmtree(folder, ignore_errors=True)
