"""Scan a source: decode every image in full, and write the manifest of the good ones and the list of the others.

The manifest is JSON lines: a header, then a line a sample, in the order of the samples. ``image_set`` in the header
names the set whatever its files are: sha256 over the class names and, in order, each sample's (sha256 of its upright
RGB pixels, label).
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from data_prep.beton import sync_folder
from data_prep.images import ImageError, decode
from data_prep.sources import Entry, ImageFolder, Source
from data_prep.workers import ordered_map
from pipeline.config import UserError

KIND: Final = "patchmill-manifest"
VERSION: Final = 1

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Manifest:
    """The samples of a scanned source, by columns; sample i is row i everywhere.

    ``root`` is absolute and ``paths`` are relative to it. ``widths``, ``heights`` int64 [N] are those of the upright
    image in pixels, ``num_bytes`` int64 [N] the file's size, ``orientations`` int64 [N] EXIF's 1 to 8 as found in the
    file; ``source_sha256`` and ``pixel_sha256`` uint8 [N, 32].
    """

    path: Path
    source_kind: str
    root: Path
    classes: tuple[str, ...]
    image_set: str
    paths: list[str]
    labels: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int64]
    heights: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    orientations: npt.NDArray[np.int64]
    formats: list[str]
    modes: list[str]
    progressive: npt.NDArray[np.bool_]
    source_sha256: npt.NDArray[np.uint8]
    pixel_sha256: npt.NDArray[np.uint8]

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        return len(self.paths)


@dataclass(frozen=True)
class ScanReport:
    """What a scan found: ``reasons`` counts the quarantined files by kind, ``empty_classes`` have no sample."""

    manifest: Path
    quarantine: Path
    image_set: str
    num_samples: int
    num_classes: int
    num_quarantined: int
    reasons: dict[str, int]
    empty_classes: tuple[str, ...]
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        """What a person wants to know, a line a fact."""
        size = f"{self.num_bytes / 2**20:.1f} MiB"
        lines = [
            f"{self.num_samples} images of {self.num_classes} classes, {size}, in {self.seconds:.1f} s: {self.manifest}"
        ]
        if self.num_quarantined:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
            lines.append(f"{self.num_quarantined} files left out ({reasons}), listed in {self.quarantine}")
        if self.empty_classes:
            lines.append(f"classes without an image: {', '.join(self.empty_classes)}")
        return "\n".join(lines)


def quarantine_path(manifest: Path) -> Path:
    """Where `scan` lists what it left out of ``manifest``."""
    return manifest.with_name(f"{manifest.stem}.quarantine.jsonl")


def image_set_of(classes: Iterable[str], pixel_sha256: bytes, labels: Iterable[int]) -> str:
    """The identity of an image set, in hex, from its class names, 32-byte digests end to end and labels."""
    digests = np.frombuffer(pixel_sha256, np.uint8).reshape(-1, 32)
    rows = np.zeros(len(digests), np.dtype([("pixels", "<u1", 32), ("label", "<i8")]))
    rows["pixels"], rows["label"] = digests, np.fromiter(labels, np.int64, len(digests))
    return hashlib.sha256(json.dumps(list(classes)).encode() + b"\n" + rows.tobytes()).hexdigest()


def _examine(source: Source, entry: Entry) -> dict[str, Any]:
    """The manifest's line of an entry, or {path, reason}."""
    try:
        data = source.read(entry.path)
        pixels, facts = decode(data)
    except ImageError as error:
        return {"path": entry.path, "reason": str(error)}
    return {
        "path": entry.path,
        "label": entry.label,
        **asdict(facts),
        "bytes": len(data),
        "source_sha256": hashlib.sha256(data).hexdigest(),
        "pixel_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of ``path`` when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path)
    finally:
        temporary.unlink(missing_ok=True)


def _versions() -> dict[str, str | None]:
    import PIL
    from PIL import features

    return {"pillow": PIL.__version__, "libjpeg_turbo": features.version_feature("libjpeg_turbo")}


def _header(source: Source, num_samples: int, image_set: str) -> str:
    header = {"kind": KIND, "version": VERSION, "source_kind": source.kind, "source": str(source.root)}
    header |= {"num_samples": num_samples, "image_set": image_set, "versions": _versions()}
    return json.dumps({**header, "classes": list(source.classes)})


class _Totals:
    """What the header and the report need of the rows that went by."""

    def __init__(self) -> None:
        self.pixels = bytearray()
        self.labels: list[int] = []
        self.num_bytes = 0
        self.reasons: Counter[str] = Counter()
        self.first = ""
        self.image_set = ""

    def add(self, row: dict[str, Any]) -> None:
        if "reason" in row:
            self.reasons[row["reason"].split(":")[0]] += 1
            self.first = self.first or f"{row['path']}: {row['reason']}"
            return
        self.pixels += bytes.fromhex(row["pixel_sha256"])
        self.labels.append(row["label"])
        self.num_bytes += row["bytes"]


def _write_manifest(source: Source, entries: list[Entry], rows: Iterable[dict[str, Any]], manifest: Path) -> _Totals:
    totals = _Totals()
    # The longest header that can follow: it is known last and written over these blanks.
    room = len(_header(source, len(entries), "0" * 64))
    quarantine = quarantine_path(manifest)
    with _replacing(manifest) as good:
        good.write(" " * room + "\n")
        with _replacing(quarantine) as bad:
            for row in rows:
                totals.add(row)
                (bad if "reason" in row else good).write(json.dumps(row) + "\n")
        if not totals.labels:
            raise UserError(f"{source.root}: none of the {len(entries)} files is a usable image; "
                            f"the reasons are in {quarantine}, the first: {totals.first}")  # fmt: skip
        totals.image_set = image_set_of(source.classes, bytes(totals.pixels), totals.labels)
        good.seek(0)
        good.write(_header(source, len(totals.labels), totals.image_set).ljust(room))
    return totals


def scan(source: Path, manifest: Path, *, workers: int, progress: Progress | None = None) -> ScanReport:
    """Decode every image below ``source`` and write ``manifest`` and its quarantine list, each all at once.

    The result is the same for any number of workers; ``workers=0`` decodes in this process. ``progress`` gets (files
    done, files). Raises UserError for a source that is missing, empty or without a usable image, and for a dead worker.
    """
    started = time.monotonic()
    folder = ImageFolder(source)
    entries = folder.entries()
    if not manifest.parent.is_dir():
        raise UserError(f"{manifest}: there is no folder {manifest.parent}; make it first")
    ours = {path.resolve() for path in (manifest, quarantine_path(manifest))}
    strays = [path for path in folder.strays() if folder.root / path not in ours]

    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"path": path, "reason": "outside the class folders"} for path in strays)
        with closing(ordered_map(partial(_examine, folder), entries, workers)) as found:
            for done, row in enumerate(found, 1):
                yield row
                if progress is not None:
                    progress(done, len(entries))

    try:
        totals = _write_manifest(folder, entries, rows(), manifest)
    except OSError as error:
        raise UserError(f"{manifest}: cannot be written: {error.strerror}") from error
    filled = np.bincount(totals.labels, minlength=len(folder.classes))
    return ScanReport(
        manifest=manifest,
        quarantine=quarantine_path(manifest),
        image_set=totals.image_set,
        num_samples=len(totals.labels),
        num_classes=len(folder.classes),
        num_quarantined=totals.reasons.total(),
        reasons=dict(totals.reasons.most_common()),
        empty_classes=tuple(name for name, count in zip(folder.classes, filled, strict=True) if not count),
        num_bytes=totals.num_bytes,
        seconds=time.monotonic() - started,
    )


def _refuse(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; make it again with: patchmill prep scan SOURCE {path}")


def _load_header(path: Path) -> dict[str, Any]:
    """The first line of a manifest. Raises UserError when ``path`` is missing or no manifest of this version."""
    try:
        with open(path, encoding="utf-8") as file:
            header = json.loads(file.readline())
    except OSError as error:
        raise UserError(f"{path}: the manifest cannot be read: {error.strerror}") from None
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise _refuse(path, "is not a manifest")
    if header.get("version") != VERSION:
        raise _refuse(path, f"has version {header.get('version')} of the format, this program reads version {VERSION}")
    return header


_COLUMNS: Final = ("path", "label", "width", "height", "bytes", "orientation", "format", "mode", "progressive",
                   "source_sha256", "pixel_sha256")  # fmt: skip


def _columns(path: Path) -> dict[str, list[Any]]:
    """The sample lines of a manifest, transposed."""
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    with open(path, encoding="utf-8") as file:
        file.readline()
        for number, line in enumerate(file, 2):
            try:
                row = json.loads(line)
                for name, column in columns.items():
                    value = row[name]
                    column.append(sys.intern(value) if name in ("format", "mode") else value)
            except (ValueError, KeyError, TypeError):
                raise _refuse(path, f"line {number} is cut short or damaged") from None
    return columns


def _check(path: Path, header: dict[str, Any], columns: dict[str, list[Any]]) -> None:
    count = len(columns["path"])
    if count != header["num_samples"]:
        raise _refuse(path, f"names {header['num_samples']} samples and holds {count}: it was cut short")
    for name in columns["path"]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise _refuse(path, f"holds the path {name!r}, which leads out of the source")
    pixels = bytes.fromhex("".join(columns["pixel_sha256"]))
    if image_set_of(header["classes"], pixels, columns["label"]) != header["image_set"]:
        raise _refuse(path, "was changed after the scan: its samples do not make up its image_set")


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Raises UserError when it is missing, cut short, changed, or of another version."""
    header = _load_header(path)
    columns = _columns(path)
    try:
        _check(path, header, columns)
        numbers = {
            name: np.array(columns[name], np.int64) for name in ("label", "width", "height", "bytes", "orientation")
        }
        digests = {
            name: np.frombuffer(bytes.fromhex("".join(columns[name])), np.uint8).reshape(-1, 32)
            for name in ("source_sha256", "pixel_sha256")
        }
        return Manifest(
            path=path,
            source_kind=header["source_kind"],
            root=Path(header["source"]),
            classes=tuple(header["classes"]),
            image_set=header["image_set"],
            paths=columns["path"],
            labels=numbers["label"],
            widths=numbers["width"],
            heights=numbers["height"],
            num_bytes=numbers["bytes"],
            orientations=numbers["orientation"],
            formats=columns["format"],
            modes=columns["mode"],
            progressive=np.array(columns["progressive"], np.bool_),
            **digests,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _refuse(path, f"is damaged: {error}") from None
