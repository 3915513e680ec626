"""The unfinished beton: samples laid out in order, and a journal that lets a killed writer go on where it was.

``X.beton.journal`` is a line of JSON (what is being written: it must be the same to go on) and a record a sample. A
record is appended only when the sample's bytes are on the disk, and carries crc32 of these and of itself. On resuming
the file is read from the start, which the running sha256 needs anyway, and both files are cut behind the last sample
whose record, place and bytes agree.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_prep.beton import (
    JOURNAL,
    PARTIAL,
    ROW,
    TABLE,
    align,
    beside,
    head_bytes,
    head_size,
    place,
    sync_folder,
    write_all,
    write_atomically,
)
from pipeline.config import UserError, flatten

SYNC_SAMPLES: Final = 64
SYNC_BYTES: Final = 2**25

# ``row`` is opaque bytes: numpy does not copy the padding inside a structured type, and the file would differ by it.
RECORD: Final = np.dtype(
    [("ptr", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("kept", "<u4"), ("row", f"V{ROW.itemsize}"), ("check", "<u4")]
)
_POINTER: Final = 5  # where a row holds the position, 8 bytes: behind mode, width and height, unaligned


@dataclass(frozen=True)
class Encoded:
    """A sample as it is stored: its metadata row, the position left out; its bytes, and if they are the file's own."""

    row: bytes
    data: bytes
    crc: int
    kept: bool


@dataclass(frozen=True)
class Finished:
    """What the seal says about a file whose bytes are all written: size, sha256 of its parts, crc32 of the samples."""

    size: int
    sha256: dict[str, str]
    crcs: bytes
    num_kept: int


def _changes(line: bytes, what: Mapping[str, Any]) -> str:
    try:
        old = json.loads(line)
    except ValueError:
        old = None
    return difference(old, what) if isinstance(old, dict) else "its journal is damaged"


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings that differ, as ``key: old -> new``; only keys that ``new`` has count."""
    a, b = flatten(old), flatten(new)
    return ", ".join(f"{key}: {a.get(key)} -> {b[key]}" for key in sorted(b) if a.get(key) != b[key])


class PartialBeton:
    """``X.beton.partial`` and its journal, open for appending. ``num_done`` samples are in it."""

    def __init__(self, beton: Path, what: dict[str, Any], num_samples: int, page_size: int) -> None:
        """Go on with what is there, or begin. ``what`` names the content.

        Raises UserError when the files that are there were begun with another ``what``.
        """
        self._beton, self._what = beton, what
        self._num_samples, self._page_size = num_samples, page_size
        self._records = bytearray()
        self._pending: list[bytes] = []
        self._pending_records = bytearray()
        self._pending_bytes = 0
        self._head_size = head_size(num_samples)
        self._end = align(self._head_size, page_size)
        self.digest = hashlib.sha256(bytes(self._end - self._head_size))
        self._open()

    def __enter__(self) -> "PartialBeton":
        """Itself; the files are closed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files. What was not made durable is lost and made again."""
        self._file.close()
        self._journal.close()

    def _open(self) -> None:
        journal, partial = beside(self._beton, JOURNAL), beside(self._beton, PARTIAL)
        head = json.dumps(self._what, sort_keys=True).encode() + b"\n"
        found = journal.read_bytes() if journal.exists() else b""
        first, newline, records = found.partition(b"\n")
        if found and first + newline != head:
            raise UserError(f"{partial}: was begun with other settings ({_changes(first, self._what)}); go on with "
                            f"those, or delete it and {journal.name} to begin anew")  # fmt: skip
        if not found:
            write_atomically(journal, head)
        partial.touch()
        sync_folder(partial)
        self._file = open(partial, "r+b", buffering=0)  # noqa: SIM115  closed by __exit__
        self._journal = open(journal, "r+b", buffering=0)  # noqa: SIM115
        self._recover(records)
        self._file.truncate(self._end)
        self._file.seek(self._end)
        self._journal.truncate(len(head) + len(self._records))
        self._journal.seek(0, os.SEEK_END)

    def _recover(self, records: bytes) -> None:
        self._file.seek(self._head_size)
        padding = self._file.read(self._end - self._head_size)
        if padding.count(0) < len(padding):
            self._file.truncate(0)
        whole = len(records) // RECORD.itemsize
        for record in np.frombuffer(records, RECORD, min(whole, self._num_samples)):
            raw, size = record.tobytes(), int(record["size"])
            start = place(self._end, size, self._page_size)
            if zlib.crc32(raw[:-4]) != record["check"] or start != record["ptr"]:
                return
            self._file.seek(self._end)
            data = self._file.read(start + size - self._end)
            gap, payload = data[: start - self._end], data[start - self._end :]
            if any(gap) or len(payload) != size or zlib.crc32(payload) != record["crc"]:
                return
            self._records += raw
            self.digest.update(data)
            self._end = start + size

    @property
    def num_done(self) -> int:
        """How many samples are in it."""
        return (len(self._records) + len(self._pending_records)) // RECORD.itemsize

    def add(self, sample: Encoded) -> None:
        """Append the next sample; every so often all that is there is made durable."""
        size = len(sample.data)
        if size > self._page_size:
            raise UserError(f"sample {self.num_done} takes {size} bytes, more than a page of {self._page_size}; "
                            "use a lower quality or max_side")  # fmt: skip
        start = place(self._end, size, self._page_size)
        row = bytearray(sample.row)
        row[_POINTER : _POINTER + 8] = start.to_bytes(8, "little")
        record = np.zeros(1, RECORD)
        record[0] = (start, size, sample.crc, sample.kept, bytes(row), 0)
        raw = record.tobytes()[:-4]
        self._pending_records += raw + zlib.crc32(raw).to_bytes(4, "little")
        for data in (bytes(start - self._end), sample.data):
            self._pending.append(data)
            self.digest.update(data)
        self._end = start + size
        self._pending_bytes += size
        if len(self._pending_records) >= SYNC_SAMPLES * RECORD.itemsize or self._pending_bytes >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Make every sample durable, its bytes before its record."""
        write_all(self._file, b"".join(self._pending))
        os.fdatasync(self._file.fileno())
        write_all(self._journal, self._pending_records)
        os.fdatasync(self._journal.fileno())
        self._records += self._pending_records
        self._pending.clear()
        self._pending_records.clear()
        self._pending_bytes = 0

    def finish(self) -> Finished:
        """Write metadata, allocation table and header round the samples and make the file durable."""
        self.sync()
        records = np.frombuffer(self._records, RECORD)
        table = np.zeros(self._num_samples, TABLE)
        table["sample_id"], table["ptr"], table["size"] = np.arange(len(table)), records["ptr"], records["size"]
        head = head_bytes(self._num_samples, self._page_size, self._end, records["row"].tobytes())
        for position, data in ((self._end, table.tobytes()), (0, head)):
            self._file.seek(position)
            write_all(self._file, data)
        os.fsync(self._file.fileno())
        crcs = records["crc"].tobytes()
        parts = {"head": head, "table": table.tobytes(), "crc": crcs}
        sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
        sha256["data"] = self.digest.hexdigest()
        return Finished(self._end + table.nbytes, sha256, crcs, int(records["kept"].sum()))
