"""Tar archives, read in place: ImageNet's originals, class folders in a tar, WebDataset shards.

A tar is not compressed, so an image is a range of the file: the index holds the ranges, and reading is one ``pread``.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, Final

from data_prep.images import ImageError
from data_prep.sources import (
    MAX_FILE_BYTES,
    Entries,
    Entry,
    Index,
    Progress,
    class_index,
    is_hidden,
    number_classes,
    safe_name,
)
from pipeline.config import UserError

PACKED: Final = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
VAL_NAME: Final = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
IMAGE_SUFFIXES: Final = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
BLOCK: Final = 2**20
MAX_TEXT: Final = 2**26  # bytes of a text or table in a development kit


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: name, where its bytes are, and why it cannot be used if it cannot."""

    name: str
    offset: int
    size: int
    problem: str | None = None


class _Slice(io.RawIOBase):
    """A range of an open file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._fd, self._start, self._size, self._at = file.fileno(), start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        data = os.pread(self._fd, left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(data)
        return data


def packing(path: Path) -> str | None:
    """The compression of a file by its first bytes, None for none. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return next((name for magic, name in PACKED.items() if start.startswith(magic)), None)


def _walk(file: IO[bytes], start: int, size: int, archive: Path, where: str) -> Iterator[tarfile.TarInfo]:
    """The members of the tar in a range of ``file``. Raises UserError for one that is damaged or cut short."""
    broken = f"{archive}: {where}is no tar archive, damaged or cut short"
    try:
        with tarfile.open(fileobj=_Slice(file, start, size), mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them, a kilobyte each
                yield member
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{broken}: {error}") from None
    # tarfile takes whatever it cannot read as the end; the end of a whole tar is a block of zeros.
    if os.pread(file.fileno(), 512, start + end) != bytes(512):
        raise UserError(f"{broken} at byte {start + end}")
    for at in range(start + end, start + size, BLOCK):
        rest = os.pread(file.fileno(), min(BLOCK, start + size - at), at)
        if rest.count(0) < len(rest):
            raise UserError(f"{archive}: {where}goes on behind its end at byte {start + end}, as several tars in one file do; "
                            "take them apart, for what follows is not read")  # fmt: skip


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _problem(member: tarfile.TarInfo) -> str | None:
    if not _is_plain(member):
        return "cannot be read: not a regular file"
    if member.size > MAX_FILE_BYTES:
        return f"too large: a file of {member.size} bytes, at most {MAX_FILE_BYTES} are read"
    return None


def members(archive: Path, progress: Progress | None = None) -> Iterator[Member]:
    """The files of a tar, a tar among them being taken for the folder of its name. Folders and hidden files are left out.

    ``progress`` gets (MiB passed, MiB). Raises UserError for an archive that is damaged or holds a name that leads out of it.
    """
    with open(archive, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        for outer in _walk(file, 0, total, archive, ""):
            name = safe_name(outer.name, archive)
            if name.endswith(".tar") and _is_plain(outer):
                for member in _walk(file, outer.offset_data, outer.size, archive, f"{name} in it "):
                    full = f"{name[:-4]}/{safe_name(member.name, archive)}"
                    if not member.isdir() and not is_hidden(full):
                        yield Member(full, outer.offset_data + member.offset_data, member.size, _problem(member))
            elif not outer.isdir() and not is_hidden(name):
                yield Member(name, outer.offset_data, outer.size, _problem(outer))
            if progress is not None:
                progress((outer.offset_data + outer.size) >> 20, total >> 20)


def read_at(file: IO[bytes], position: int, size: int) -> bytes:
    """``size`` bytes from ``position``. Raises ImageError when they are not there."""
    try:
        data = os.pread(file.fileno(), size, position)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from None
    if len(data) != size:
        raise ImageError(f"cut short: {len(data)} bytes of {size}")
    return data


class ImageTar:
    """A tar of class folders, or of a tar a class as ``ILSVRC2012_img_train.tar`` is; the order is that of the image folder.

    The entries' names, labels and order are those of the same images in folders. ``folder``: the one in the tar that holds the
    class folders, by default the top.
    """

    kind: ClassVar[str] = "tar"
    counted_in: ClassVar[str] = "MiB"
    any_order: ClassVar[bool] = True

    def __init__(self, path: Path, folder: str = "") -> None:
        """Raises UserError when it cannot be read or is compressed."""
        packed = packing(path)
        if packed:
            raise UserError(
                f"{path}: is compressed ({packed}), so that nothing in it can be read in place; unpack it to a plain .tar"
            )
        self.root, self._top = path.resolve(), f"{folder}/" if folder else ""
        self._file = open(self.root, "rb")  # noqa: SIM115  for as long as this lives: entries are read one by one

    def index(self, classes: tuple[str, ...] | None = None, progress: Progress | None = None) -> Index:
        """As in ``Source``; strays are the files outside class folders, and what is no regular file."""
        found: dict[str, Entries] = {}
        strays = []
        for member in members(self.root, progress):
            if not member.name.startswith(self._top):
                continue
            name = member.name[len(self._top) :]
            folder, _, rest = name.partition("/")
            if member.problem or not rest:
                strays.append((name, member.problem or "outside the class folders"))
            else:
                found.setdefault(folder, Entries()).append(Entry(name, 0, member.offset, member.size))
        return self._sorted(found, class_index(list(found), classes, self.root / self._top), strays)

    def _sorted(self, found: dict[str, Entries], classes: tuple[str, ...], strays: list[tuple[str, str]]) -> Index:
        entries = Entries()
        for label, name in enumerate(classes):
            before = ""
            for entry in sorted(found.pop(name, ()), key=lambda entry: entry.path):
                if entry.path == before:
                    raise UserError(f"{self.root}: holds {before} twice")
                before = entry.path
                entries.append(replace(entry, label=label))
        if not entries:
            raise UserError(f"{self.root / self._top}: holds no image file in a class folder or class tar")
        return Index(classes, entries, sorted(strays))

    def read(self, path: str, position: int, size: int) -> bytes:
        """As in ``Source``."""
        return read_at(self._file, position, size)


class ValidationTar(ImageTar):
    """``ILSVRC2012_img_val.tar`` with the labels of the development kit ``ILSVRC2012_devkit_t12.tar.gz``.

    The kit numbers the classes in an order of its own; here, as everywhere, a label is the place among the sorted WordNet ids.
    An entry's name is WNID/FILE, as in the usual folders.
    """

    def __init__(self, path: Path, devkit: Path) -> None:
        """Reads the kit. Raises UserError when something is missing or damaged."""
        super().__init__(path)
        self._devkit = devkit
        self._wnids, self._truth = read_devkit(devkit)

    def index(self, classes: tuple[str, ...] | None = None, progress: Progress | None = None) -> Index:
        """As in ``Source``."""
        found: dict[str, Entries] = {}
        strays = []
        for member in members(self.root, progress):
            match = VAL_NAME.fullmatch(member.name.rpartition("/")[2])
            number = int(match[1]) if match else 0
            if member.problem or not 1 <= number <= len(self._truth):
                strays.append((member.name, member.problem or "not an image of the ground truth"))
                continue
            wnid = self._truth[number - 1]
            name = f"{wnid}/{member.name.rpartition('/')[2]}"
            found.setdefault(wnid, Entries()).append(Entry(name, 0, member.offset, member.size))
        count = sum(map(len, found.values()))
        if count != len(self._truth):
            raise UserError(
                f"{self.root}: holds {count} validation images, the ground truth of {self._devkit} {len(self._truth)}"
            )
        return self._sorted(found, class_index(self._wnids, classes, self.root), strays)


def _kit_files(devkit: Path) -> Iterator[tuple[str, bytes]]:
    wanted = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
    try:
        with tarfile.open(devkit, "r|*") as tar:
            for member in tar:
                name = next((name for name in wanted if f"/{member.name}".endswith(f"/{name}")), None)
                if name and member.isreg() and member.size <= MAX_TEXT:
                    file = tar.extractfile(member)
                    yield name, file.read() if file else b""
    except OSError as error:
        raise UserError(f"{devkit}: the development kit cannot be read: {error.strerror or error}") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{devkit}: the development kit is damaged: {error}") from None


def read_devkit(devkit: Path) -> tuple[list[str], list[str]]:
    """The WordNet ids of the classes, and of the validation images in the order of their numbers.

    Raises UserError when the kit is missing, damaged, or not ILSVRC 2012's.
    """
    from scipy.io import loadmat

    files = dict(_kit_files(devkit))
    try:
        synsets = loadmat(io.BytesIO(files["data/meta.mat"]), squeeze_me=True)["synsets"]
        leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
        truth = [leaves[int(line)] for line in files["data/ILSVRC2012_validation_ground_truth.txt"].split()]
    except KeyError as error:
        raise UserError(f"{devkit}: is not the development kit of ILSVRC 2012: has no {error}") from None
    except Exception as error:  # scipy's reader of a damaged file raises anything
        raise UserError(f"{devkit}: data/meta.mat or the ground truth is damaged: {error}") from None
    return list(leaves.values()), truth


class WebDataset:
    """Shards of samples: files of one key, ``KEY.jpg`` (or another image) and ``KEY.cls``, the label as a number.

    The order is that of the shards' names and of the samples in them. Class names come from outside; without them a class
    is called by its number.
    """

    kind: ClassVar[str] = "webdataset"
    counted_in: ClassVar[str] = "shard"
    any_order: ClassVar[bool] = True

    def __init__(self, root: Path, shards: list[Path] | None = None) -> None:
        """``shards`` lie in ``root``; they are needed for the index only. Raises UserError when one is compressed."""
        self.root, self._shards = root.resolve(), sorted(shards or [])
        for shard in self._shards:
            packed = packing(shard)
            if packed:
                raise UserError(f"{shard}: is compressed ({packed}); unpack the shards to plain .tar")
        self._latest: tuple[str, Any] = ("", None)

    def index(self, classes: tuple[str, ...] | None = None, progress: Progress | None = None) -> Index:
        """As in ``Source``; strays are samples without an image or a label."""
        entries, strays = Entries(), list[tuple[str, str]]()
        for done, shard in enumerate(self._shards, 1):
            key, sample = "", dict[str, Member]()
            for member in (*members(shard), Member("", 0, 0)):
                stem, _, extension = PurePosixPath(member.name).name.partition(".")
                new = f"{member.name.rpartition('/')[0]}/{stem}" if member.name else ""
                if new != key and sample:
                    self._add(shard, sample, entries, strays)
                    sample = {}
                key = new
                sample[extension.lower()] = member
            if progress is not None:
                progress(done, len(self._shards))
        if not entries:
            first = f"; the first: {': '.join(strays[0])}" if strays else ""
            raise UserError(
                f"{self.root}: its {len(self._shards)} shards hold no image with a label (KEY.jpg and KEY.cls){first}"
            )
        return Index(number_classes(max(entries.labels), None, classes, self.root), entries, strays)

    def _add(self, shard: Path, sample: dict[str, Member], entries: Entries, strays: list[tuple[str, str]]) -> None:
        images = [sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample]
        name = f"{shard.name}/{(images or list(sample.values()))[0].name}"
        if len(images) != 1 or images[0].problem:
            found = images[0].problem if images else None
            strays.append((name, found or f"the sample has {len(images)} images"))
            return
        text = b""
        if "cls" in sample and sample["cls"].problem is None:
            text = self.read(f"{shard.name}/", sample["cls"].offset, min(sample["cls"].size, 32)).strip()
        if not text.isdigit() or len(text) > 18:
            strays.append((name, f"no label: its .cls is {text.decode(errors='replace')!r}, not a number" if text else
                           "no label: it has no .cls"))  # fmt: skip
            return
        entries.append(Entry(name, int(text), images[0].offset, images[0].size))

    def read(self, path: str, position: int, size: int) -> bytes:
        """As in ``Source``."""
        shard = path.partition("/")[0]
        latest, file = self._latest
        if shard != latest:
            try:
                file = open(self.root / shard, "rb")  # noqa: SIM115  closed when no thread reads from it any more
            except OSError as error:
                raise ImageError(f"cannot be read: {error.strerror}") from None
            self._latest = (shard, file)
        return read_at(file, position, size)
