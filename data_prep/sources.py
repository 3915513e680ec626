"""Where images come from: a source lists its candidates once, in a stable order, and hands out their bytes.

Nothing is unpacked to the disk: archives and shards are read where they lie. ``data_prep.kinds`` tells them apart.
"""

import hashlib
import os
import stat
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Final, Protocol, TypeVar, overload

from data_prep.images import ImageError
from pipeline.config import UserError

MAX_FILE_BYTES: Final = 2**30
MAX_NUMBERED: Final = 100_000  # classes without a name
SPLITS: Final = ("train", "val", "validation", "test")

Progress = Callable[[int, int], None]
Item = TypeVar("Item", covariant=True)


class _Packed(Sequence[Item]):
    """A list whose items are made when they are asked for: ``_at`` makes the one at a place."""

    @abstractmethod
    def _at(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """As of a list."""
        places = range(len(self))[index]
        return [self._at(place) for place in places] if isinstance(places, range) else self._at(places)


class Names(_Packed[str]):
    """An append-only list of texts end to end in one buffer: a million file names take 40 MB instead of 90."""

    def __init__(self) -> None:
        """Empty."""
        self._bytes, self._ends = bytearray(), array("q", [0])

    def append(self, name: str) -> None:
        """Add one; file names that are not UTF-8 come back as they were."""
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        """How many."""
        return len(self._ends) - 1

    def _at(self, place: int) -> str:
        return os.fsdecode(bytes(self._bytes[self._ends[place] : self._ends[place + 1]]))

    def digest(self) -> bytes:
        """sha256 over all of it."""
        return hashlib.sha256(self._ends.tobytes() + self._bytes).digest()


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate: its name in the source (a relative path with /) and its label, an index into the classes.

    ``position`` says where its bytes are: their offset in an archive, ``unit << 32 | row`` in a shard whose units (row
    groups) are read as a whole, 0 for a file of its own. ``size`` in bytes, -1 where it is known only after reading.
    """

    path: str
    label: int
    position: int = 0
    size: int = -1


class Entries(_Packed[Entry]):
    """Entries by columns: as objects those of ImageNet would take 300 MB, and again in every forked worker."""

    def __init__(self) -> None:
        """Empty."""
        self.paths = Names()
        self.labels, self.positions, self.sizes = array("q"), array("q"), array("q")

    def append(self, entry: Entry) -> None:
        """Add one."""
        self.paths.append(entry.path)
        self.labels.append(entry.label)
        self.positions.append(entry.position)
        self.sizes.append(entry.size)

    def __len__(self) -> int:
        """How many."""
        return len(self.labels)

    def _at(self, place: int) -> Entry:
        return Entry(self.paths[place], self.labels[place], self.positions[place], self.sizes[place])

    def digest(self) -> str:
        """sha256 over all of it, hex: equal for equal entries in equal order."""
        columns = (column.tobytes() for column in (self.labels, self.positions, self.sizes))
        return hashlib.sha256(self.paths.digest() + b"".join(columns)).hexdigest()


@dataclass(frozen=True, eq=False)
class Index:
    """What a source holds: class names (a label is an index into them), entries, and (path, reason) of what is no entry."""

    classes: tuple[str, ...]
    entries: Entries
    strays: list[tuple[str, str]]


class Source(Protocol):
    """What `scan`, `write` and the folder loader need of a source. ``root`` is absolute and leads back to it.

    ``kind`` and ``root`` stand in the manifest. ``counted_in`` is the unit of the index's progress. ``any_order``: an entry is
    read at no cost but its own, so that training may read it directly.
    """

    kind: ClassVar[str]
    counted_in: ClassVar[str]
    any_order: ClassVar[bool]
    root: Path

    def index(self, classes: tuple[str, ...] | None = None, progress: Progress | None = None) -> Index:
        """Everything in it. ``classes``: the class index to use instead of the source's own.

        Raises UserError for a source that is damaged, holds no candidate, or names a class that is not in ``classes``.
        """

    def read(self, path: str, position: int, size: int) -> bytes:
        """The bytes of an image file. Safe in threads and after a fork. Raises ImageError when they cannot be read."""


def class_index(found: Sequence[str], given: tuple[str, ...] | None, root: Path) -> tuple[str, ...]:
    """The class names in the order of their labels: ``given``, else the sorted ``found``.

    Raises UserError when a class was found that is not among the given ones, and when splits were taken for classes.
    """
    if len(found) > 1 and set(found) <= set(SPLITS):
        raise UserError(
            f"{root}: holds {', '.join(sorted(found))} and not a folder a class; name one of them: {root / min(found)}"
        )
    if given is None:
        return tuple(sorted(found))
    unknown = sorted(set(found) - set(given))
    if unknown:
        raise UserError(f"{root}: the class {unknown[0]!r} ({len(unknown)} such) is not in the class index of {len(given)} "
                        "classes that was given")  # fmt: skip
    return given


def number_classes(
    highest: int, own: Sequence[str] | None, given: tuple[str, ...] | None, root: Path
) -> tuple[str, ...]:
    """The class names of a source whose labels are numbers: ``given``, else its ``own``, else the numbers themselves.

    Raises UserError when the ``highest`` label lies outside.
    """
    if not given and not own and highest >= MAX_NUMBERED:
        raise UserError(f"{root}: holds the label {highest}; name so many classes with --classes FILE")
    names = given or tuple(own or map(str, range(highest + 1)))
    if highest >= len(names):
        raise UserError(f"{root}: holds the label {highest} and the class index has {len(names)} classes")
    return names


def safe_name(name: str, archive: Path) -> str:
    """A member's name without a leading ``./``. Raises UserError when it leads out of the archive."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise UserError(f"{archive}: holds the name {name!r}, which leads out of the archive; nothing of it is used")
    return "/".join(parts)


def is_hidden(path: str) -> bool:
    """Whether a part of a relative path has a leading dot (``._x.JPEG`` of a Mac's archives, ``.DS_Store``)."""
    return any(part.startswith(".") for part in path.split("/"))


class ImageFolder:
    """A folder with one sub-folder a class; the sorted names of the sub-folders are the classes, labelled 0, 1, ...

    Every file below a class folder is a candidate but those with a leading dot in their path; the order is that of
    the sorted relative paths, class by class. A class folder without files keeps its label. Linked files and class
    folders are followed; a linked folder further down is listed as a candidate that cannot be read, rather than left
    out in silence.
    """

    kind: ClassVar[str] = "folder"
    counted_in: ClassVar[str] = "class"
    any_order: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        """Raises UserError when ``path`` is not a folder."""
        if not path.is_dir():
            raise UserError(f"{path}: {'is not a folder' if path.exists() else 'there is no such folder'}")
        self.root = path.resolve()

    def _below(self, name: str) -> Iterator[str]:
        for folder, folders, files in os.walk(self.root / name):
            folders[:] = [item for item in folders if item[0] != "."]
            links = [item for item in folders if os.path.islink(os.path.join(folder, item))]
            for item in (*files, *links):
                if item[0] != ".":
                    yield Path(folder, item).relative_to(self.root).as_posix()

    def index(self, classes: tuple[str, ...] | None = None, progress: Progress | None = None) -> Index:
        """As in ``Source``; strays are the files beside the class folders."""
        items = [item for item in os.scandir(self.root) if item.name[0] != "."]
        found = [item.name for item in items if item.is_dir()]
        if not found:
            raise UserError(f"{self.root}: holds no sub-folder; images lie in a folder a class, as CLASS/IMAGE.jpg")
        names, entries = class_index(found, classes, self.root), Entries()
        for label, name in enumerate(names):
            for path in sorted(self._below(name)):
                entries.append(Entry(path, label))
            if progress is not None:
                progress(label + 1, len(names))
        if not entries:
            raise UserError(f"{self.root}: its {len(names)} class folders hold no file")
        strays = sorted(item.name for item in items if not item.is_dir())
        return Index(names, entries, [(name, "outside the class folders") for name in strays])

    def read(self, path: str, position: int = 0, size: int = -1) -> bytes:
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
