"""Where images come from: a source lists its entries in a stable order and hands out their bytes."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final, Protocol

from data_prep.images import ImageError
from pipeline.config import UserError

MAX_FILE_BYTES: Final = 2**30


@dataclass(frozen=True)
class Entry:
    """A candidate: its name in the source (a relative path with /) and its label, an index into the classes."""

    path: str
    label: int


class Source(Protocol):
    """What `scan` and `write` need to know of a source. ``root`` is absolute; ``kind`` stands in the manifest."""

    kind: ClassVar[str]
    root: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is an index into them."""

    def entries(self) -> list[Entry]:
        """Every candidate, in the order of the samples."""

    def strays(self) -> list[str]:
        """Names of what lies in the source and belongs to no class."""

    def read(self, path: str) -> bytes:
        """The bytes of an entry. Raises ImageError when it cannot be read."""


class ImageFolder:
    """A folder with one sub-folder a class; the sorted names of the sub-folders are the classes, labelled 0, 1, ...

    Every file below a class folder is a candidate but those with a leading dot in their path; the order is that of
    the sorted relative paths, class by class. A class folder without files keeps its label. Linked files and class
    folders are followed; a linked folder further down is listed as a candidate that cannot be read, rather than left
    out in silence.
    """

    kind: ClassVar[str] = "folder"

    def __init__(self, path: Path) -> None:
        """Raises UserError when ``path`` is not a folder."""
        if not path.is_dir():
            raise UserError(f"{path}: {'is not a folder' if path.exists() else 'there is no such folder'}")
        self.root = path.resolve()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The sorted names of the class folders. Raises UserError when there is none."""
        names = sorted(item.name for item in os.scandir(self.root) if item.is_dir() and item.name[0] != ".")
        if not names:
            raise UserError(f"{self.root}: holds no sub-folder; images lie in a folder a class, as CLASS/IMAGE.jpg")
        return tuple(names)

    def _below(self, name: str) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root / name):
            folders[:] = [item for item in folders if item[0] != "."]
            links = [item for item in folders if os.path.islink(os.path.join(folder, item))]
            for item in (*files, *links):
                if item[0] != ".":
                    yield Path(folder, item).relative_to(self.root).as_posix()

    def entries(self) -> list[Entry]:
        """Every candidate, class by class. Raises UserError when there is none."""
        found = [Entry(path, label) for label, name in enumerate(self.classes) for path in sorted(self._below(name))]
        if not found:
            raise UserError(f"{self.root}: its {len(self.classes)} class folders hold no file")
        return found

    def strays(self) -> list[str]:
        """The files beside the class folders, sorted."""
        return sorted(item.name for item in os.scandir(self.root) if not item.is_dir() and item.name[0] != ".")

    def read(self, path: str) -> bytes:
        """The bytes of the file ``path`` (relative to the root). Raises ImageError when it cannot be read."""
        try:
            # Opened without waiting, so that a named pipe among the images is refused instead of holding everything up.
            with open(self.root / path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise ImageError("cannot be read: not a regular file")
                if found.st_size > MAX_FILE_BYTES:
                    raise ImageError(f"too large: a file of {found.st_size} bytes, at most {MAX_FILE_BYTES} are read")
                return file.read()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
