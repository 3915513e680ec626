"""FFCV's file format (version 2) with an image and a label, its page rule, and the files that stand beside a beton.

| bytes | what |
|---|---|
| 24 | header: version, fields, page size, samples, where the allocation table lies |
| 2 x 1041 | field descriptors: ``image`` (RGBImageField), ``label`` (IntField) |
| N x 24 | metadata rows |
| | zeros up to a page border, then the samples in order, none over a page border |
| N x 24 | allocation table: sample, position, size; nothing follows it |

The record types are FFCV's (``ffcv/types.py``, ``ffcv/fields``), written down again because importing ffcv takes
seconds, and the check at the start of a training run shall not; a test holds the two equal.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from pipeline.config import UserError

VERSION: Final = 2
JPG: Final = 0
RAW: Final = 1
MIN_PAGE: Final = 2**23  # FFCV's default
MAX_PAGE: Final = 2**31  # the largest power of two in the header's 32 bits

HEADER: Final = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
DESCRIPTOR: Final = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE: Final = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ROW: Final = np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True)
TABLE: Final = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS: Final = ((2, b"image"), (1, b"label"))  # (FFCV's type id, name)

SEAL: Final = ".seal.json"  # what stands beside a beton: its name with this behind it
CRC: Final = ".crc"
PARTIAL: Final = ".partial"
JOURNAL: Final = ".journal"
LOCK: Final = ".lock"

Array = npt.NDArray[np.void]


def head_size(num_samples: int) -> int:
    """Bytes of header, descriptors and metadata."""
    return HEADER.itemsize + len(FIELDS) * DESCRIPTOR.itemsize + num_samples * ROW.itemsize


def align(position: int, page_size: int) -> int:
    """The first page border at or after ``position``."""
    return -(-position // page_size) * page_size


def place(position: int, size: int, page_size: int) -> int:
    """Where a sample of ``size`` bytes goes when the file is filled up to ``position``: not over a page border."""
    return position if position % page_size + size <= page_size else align(position, page_size)


def page_size_for(largest: int) -> int:
    """The page size for samples of at most ``largest`` bytes: a power of two, FFCV's default at least."""
    return max(MIN_PAGE, 1 << (largest - 1).bit_length())


def head_bytes(num_samples: int, page_size: int, table_ptr: int, rows: bytes) -> bytes:
    """Header, descriptors and the metadata ``rows`` as they stand at the start of the file."""
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, len(FIELDS), page_size, num_samples, table_ptr)
    descriptors = np.zeros(len(FIELDS), DESCRIPTOR)
    for descriptor, (type_id, name) in zip(descriptors, FIELDS, strict=True):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name, np.uint8)
    return header.tobytes() + descriptors.tobytes() + rows


def beside(beton: Path, suffix: str) -> Path:
    """A file that belongs to a beton: its name with ``suffix`` behind it."""
    return beton.with_name(beton.name + suffix)


def sync_folder(path: Path) -> None:
    """Make the names of files in the folder of ``path`` durable."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_all(file: IO[bytes], data: bytes | bytearray) -> None:
    """Write all of ``data`` to an unbuffered file, which may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a crash leaves either the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path)


@contextmanager
def locked(path: Path, verb: str) -> Iterator[None]:
    """Hold the lock of what ``prep VERB`` makes. A POSIX lock: workers do not inherit it, and it goes with this process."""
    lock = beside(path, LOCK)
    with open(lock, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = lock.stat().st_ino == os.fstat(file.fileno()).st_ino
        except (BlockingIOError, PermissionError, FileNotFoundError):
            held = False
        if not held:
            raise UserError(f"{path}: another `patchmill prep {verb}` is working on it")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
