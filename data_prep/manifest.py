"""The manifest: JSON lines, a header and then a line a sample, in the order of the samples.

``image_set`` in the header names the set whatever its files are: sha256 over the class names and, in order, each sample's
(sha256 of its upright RGB pixels, label). ``source_kind`` and ``source`` lead back to the bytes, ``position`` in a line to the
sample's (``data_prep.sources``).
"""

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data_prep.sources import Names
from pipeline.config import UserError

KIND: Final = "patchmill-manifest"
VERSION: Final = 2


@dataclass(frozen=True, eq=False)
class Manifest:
    """The samples of a scanned source, by columns; sample i is row i everywhere.

    ``root`` is absolute and ``paths`` are relative to it; ``positions`` int64 [N] as in ``data_prep.sources``. ``widths``,
    ``heights`` int64 [N] are those of the upright image in pixels, ``num_bytes`` int64 [N] the file's size, ``orientations``
    int64 [N] EXIF's 1 to 8 as found in the file; ``source_sha256`` and ``pixel_sha256`` uint8 [N, 32].
    """

    path: Path
    source_kind: str
    root: Path
    classes: tuple[str, ...]
    image_set: str
    paths: Sequence[str]
    labels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
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


def image_set_of(classes: Iterable[str], pixel_sha256: bytes | bytearray, labels: Sequence[int]) -> str:
    """The identity of an image set, in hex, from its class names, 32-byte digests end to end and labels."""
    digests = np.frombuffer(pixel_sha256, np.uint8).reshape(-1, 32)
    rows = np.zeros(len(digests), np.dtype([("pixels", "<u1", 32), ("label", "<i8")]))
    rows["pixels"], rows["label"] = digests, np.fromiter(labels, np.int64, len(digests))
    digest = hashlib.sha256(json.dumps(list(classes)).encode() + b"\n")
    digest.update(rows.data)
    return digest.hexdigest()


def header_text(kind: str, root: Path, classes: Sequence[str], num_samples: int, image_set: str, versions: Any) -> str:
    """The first line of a manifest."""
    header = {"kind": KIND, "version": VERSION, "source_kind": kind, "source": str(root), "num_samples": num_samples}
    return json.dumps({**header, "image_set": image_set, "versions": versions, "classes": list(classes)})


def _refuse(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}; make it again with: patchmill prep scan SOURCE {path}")


def load_header(path: Path) -> dict[str, Any]:
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


class _Columns:
    """The sample lines of a manifest, transposed as they are read."""

    def __init__(self) -> None:
        names = ("label", "position", "width", "height", "bytes", "orientation", "progressive")
        self.numbers = {name: array("q") for name in names}
        self.words: dict[str, list[str]] = {"format": [], "mode": []}
        self.digests = {name: bytearray() for name in ("source_sha256", "pixel_sha256")}
        self.paths = Names()

    def add(self, line: str) -> None:
        row = json.loads(line)
        for name, numbers in self.numbers.items():
            numbers.append(row[name])
        for name, words in self.words.items():
            words.append(sys.intern(row[name]))
        for name, digests in self.digests.items():
            digest = bytes.fromhex(row[name])
            if len(digest) != 32:
                raise ValueError(name)
            digests += digest
        self.paths.append(row["path"])
        if PurePosixPath(row["path"]).is_absolute() or ".." in PurePosixPath(row["path"]).parts:
            raise LookupError(f"holds the path {row['path']!r}, which leads out of the source")


def _read_columns(path: Path) -> _Columns:
    columns = _Columns()
    with open(path, encoding="utf-8") as file:
        file.readline()
        for number, line in enumerate(file, 2):
            try:
                columns.add(line)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
                raise _refuse(path, f"line {number} is cut short or damaged") from None
            except LookupError as error:
                raise _refuse(path, str(error)) from None
    return columns


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Raises UserError when it is missing, cut short, changed, or of another version."""
    header = load_header(path)
    columns = _read_columns(path)
    numbers = {name: np.frombuffer(column, np.int64) for name, column in columns.numbers.items()}
    try:
        count = len(columns.paths)
        if count != header["num_samples"]:
            raise _refuse(path, f"names {header['num_samples']} samples and holds {count}: it was cut short")
        pixels = columns.digests["pixel_sha256"]
        if image_set_of(header["classes"], pixels, columns.numbers["label"]) != header["image_set"]:
            raise _refuse(path, "was changed after the scan: its samples do not make up its image_set")
        return Manifest(
            path=path,
            source_kind=header["source_kind"],
            root=Path(header["source"]),
            classes=tuple(header["classes"]),
            image_set=header["image_set"],
            paths=columns.paths,
            labels=numbers["label"],
            positions=numbers["position"],
            widths=numbers["width"],
            heights=numbers["height"],
            num_bytes=numbers["bytes"],
            orientations=numbers["orientation"],
            formats=columns.words["format"],
            modes=columns.words["mode"],
            progressive=numbers["progressive"].astype(np.bool_),
            source_sha256=np.frombuffer(columns.digests["source_sha256"], np.uint8).reshape(-1, 32),
            pixel_sha256=np.frombuffer(pixels, np.uint8).reshape(-1, 32),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _refuse(path, f"is damaged: {error}") from None
