"""Files that a command was asked for with an option: known to be possible before the work, written whole or not at all."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pipeline.config import UserError
from pipeline.runlog import replace_file

FIGURES: Final = (".png", ".pdf", ".svg")


def require_writable(path: Path | None, option: str, suffixes: Sequence[str] = ()) -> None:
    """Raises UserError for what could not be written in the end, or has none of ``suffixes``; None is not asked for."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: name a {', '.join(suffixes)} file")
    folder = path.parent
    for wrong, why in ((path.is_dir(), "is a folder"), (not folder.is_dir(), f"there is no folder {folder}"),
                       (not os.access(folder, os.W_OK), f"no permission in {folder}")):  # fmt: skip
        if wrong:
            raise UserError(f"{option} {path}: cannot be written ({why})")


def write_asked(path: Path, data: bytes, option: str) -> None:
    """Raises UserError where it cannot be written; what was there before then stays."""
    try:
        replace_file(path, data)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from None
