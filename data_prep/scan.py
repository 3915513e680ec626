"""Scan a source: decode every image in full, and write the manifest of the good ones and the list of the others.

What is done stands in ``MANIFEST.partial``: a line that says what is scanned, then a line an entry, in order. A scan that was
killed goes on behind the last whole line; another source, or another version of the decoder, begins anew.
"""

import hashlib
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from data_prep.beton import LOCK, PARTIAL, beside, locked, sync_folder
from data_prep.images import ImageError, decode
from data_prep.kinds import open_source
from data_prep.manifest import header_text, image_set_of, load_header, load_manifest
from data_prep.sources import Entry, Index, Progress, Source
from data_prep.statistics import Duplicates, find_duplicates, picture_path
from data_prep.workers import chunks, ordered_map
from pipeline.config import UserError

SYNC_SECONDS: Final = 5.0


@dataclass(frozen=True)
class ScanReport:
    """What a scan found: ``reasons`` counts the quarantined files by kind, ``empty_classes`` have no sample.

    ``num_resumed`` entries were there from an earlier run. ``duplicates`` are listed in ``duplicates_path(manifest)``.
    """

    manifest: Path
    quarantine: Path
    source_kind: str
    image_set: str
    num_samples: int
    num_classes: int
    num_quarantined: int
    num_resumed: int
    reasons: dict[str, int]
    empty_classes: tuple[str, ...]
    duplicates: Duplicates
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        """What a person wants to know, a line a fact."""
        resumed = f", {self.num_resumed} of them seen in an interrupted run" if self.num_resumed else ""
        lines = [f"{self.num_samples} images of {self.num_classes} classes ({self.source_kind}{resumed}), "
                 f"{self.num_bytes / 2**20:.1f} MiB, in {self.seconds:.1f} s: {self.manifest}"]  # fmt: skip
        if self.num_quarantined:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
            lines.append(f"{self.num_quarantined} files left out ({reasons}), listed in {self.quarantine}")
        same = self.duplicates
        if same.groups or same.elsewhere:
            lines.append(f"{same.num_surplus} images have the pixels of another ({same.num_conflicts} with another label), "
                         f"{len(same.elsewhere)} are in the other manifest too; all are kept, and listed in "
                         f"{duplicates_path(self.manifest)}")  # fmt: skip
        if self.empty_classes:
            lines.append(f"classes without an image: {', '.join(self.empty_classes)}")
        return "\n".join(lines)


def quarantine_path(manifest: Path) -> Path:
    """Where `scan` lists what it left out of ``manifest``."""
    return manifest.with_name(f"{manifest.stem}.quarantine.jsonl")


def duplicates_path(manifest: Path) -> Path:
    """Where `scan` lists images with equal pixels, when there are any."""
    return manifest.with_name(f"{manifest.stem}.duplicates.jsonl")


def _examine(source: Source, entry: Entry) -> dict[str, Any]:
    """The manifest's line of an entry, or {path, reason}."""
    try:
        data = source.read(entry.path, entry.position, entry.size)
        pixels, facts = decode(data)
    except ImageError as error:
        return {"path": entry.path, "reason": str(error)}
    return {
        "path": entry.path,
        "label": entry.label,
        "position": entry.position,
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


class _Totals:
    """What the header and the report need of the rows that went by."""

    def __init__(self) -> None:
        self.pixels, self.labels, self.rows = bytearray(), array("q"), array("q")
        self.num_bytes, self.num_seen = 0, 0
        self.reasons: Counter[str] = Counter()
        self.first = ""

    def add(self, row: dict[str, Any]) -> None:
        self.num_seen += 1
        if "reason" in row:
            self.reasons[row["reason"].split(":")[0]] += 1
            self.first = self.first or f"{row['path']}: {row['reason']}"
            return
        self.pixels += bytes.fromhex(row["pixel_sha256"])
        self.labels.append(row["label"])
        self.rows.append(self.num_seen - 1)
        self.num_bytes += row["bytes"]


class _Partial:
    """``MANIFEST.partial``, open for appending; ``totals`` are those of the rows in it."""

    def __init__(self, path: Path, what: dict[str, Any], index: Index) -> None:
        self.path, self.totals = path, _Totals()
        head = json.dumps(what, sort_keys=True).encode() + b"\n"
        path.touch()
        self._file = open(path, "r+b")  # noqa: SIM115  closed by __exit__
        if self._file.readline() == head:
            end = len(head) + self._recover(index)
        else:
            end = 0
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self._file.write(head)
            self._sync()
            sync_folder(path)
        self._synced = time.monotonic()

    def __enter__(self) -> "_Partial":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _recover(self, index: Index) -> int:
        """Take up the whole rows of the index's first entries; returns the bytes they take."""
        size = 0
        for line in self._file:
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or row["path"] != index.entries[self.totals.num_seen].path:
                    break
                self.totals.add(row)
            except (ValueError, KeyError, TypeError, IndexError):
                break  # where a crash cut it off
            size += len(line)
        return size

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows of the next entries; every few seconds they are made durable."""
        for row in rows:
            self._file.write(json.dumps(row).encode() + b"\n")
            self.totals.add(row)
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()
            self._synced = time.monotonic()

    def rows(self) -> Iterator[bytes]:
        """The lines of all rows."""
        self._sync()
        self._file.seek(0)
        self._file.readline()
        yield from self._file


def _decode_all(source: Source, index: Index, partial: _Partial, workers: int, progress: Progress | None) -> None:
    entries = index.entries

    def examine(chunk: range) -> list[dict[str, Any]]:
        return [_examine(source, entries[number]) for number in chunk]

    todo = chunks(entries.positions, partial.totals.num_seen, workers)
    if progress is not None:
        progress(partial.totals.num_seen, len(entries))
    with closing(ordered_map(examine, todo, workers)) as results:
        for rows in results:
            partial.add(rows)
            if progress is not None:
                progress(partial.totals.num_seen, len(entries))


def _is_bad(line: bytes) -> bool:
    return b'"reason"' in line and "reason" in json.loads(line)


def _finish(source: Source, index: Index, partial: _Partial, manifest: Path) -> str:
    """Write manifest and quarantine list from the rows; returns the image set's name."""
    totals, quarantine = partial.totals, quarantine_path(manifest)
    with _replacing(quarantine) as bad:
        for path, reason in index.strays:
            bad.write(json.dumps({"path": path, "reason": reason}) + "\n")
        for line in partial.rows():
            if _is_bad(line):
                bad.write(line.decode())
    if not totals.labels:
        partial.path.unlink()  # nothing worth going on with
        raise UserError(f"{source.root}: none of the {totals.num_seen} files is a usable image; "
                        f"the reasons are in {quarantine}, the first: {totals.first}")  # fmt: skip
    image_set = image_set_of(index.classes, totals.pixels, totals.labels)
    with _replacing(manifest) as good:
        header = source.kind, source.root, index.classes, len(totals.labels), image_set, _versions()
        good.write(header_text(*header) + "\n")
        for line in partial.rows():
            if not _is_bad(line):
                good.write(line.decode())
    return image_set


def _duplicates(index: Index, totals: _Totals, manifest: Path, against: Path | None) -> Duplicates:
    """Find and list images with equal pixels, here and in the manifest ``against``."""
    other = load_manifest(against) if against is not None else None
    found = find_duplicates(totals.pixels, np.frombuffer(totals.labels, np.int64),
                            other.pixel_sha256 if other else b"")  # fmt: skip
    path = duplicates_path(manifest)
    path.unlink(missing_ok=True)
    if found.groups or found.elsewhere:

        def name(sample: int) -> str:
            return index.entries.paths[totals.rows[sample]]

        with _replacing(path) as file:
            for group in found.groups:
                labels = [totals.labels[sample] for sample in group]
                file.write(json.dumps({"paths": [name(sample) for sample in group], "labels": labels}) + "\n")
            for sample, there in found.elsewhere:
                assert other is not None
                file.write(json.dumps({"path": name(sample), "also": other.paths[there], "in": str(against)}) + "\n")
    return found


def _own_files(manifest: Path) -> set[Path]:
    """What lies beside the images when the manifest does, and is none of them."""
    beside_it = {beside(manifest, suffix) for suffix in ("", PARTIAL, LOCK)}
    return {
        path.resolve() for path in beside_it | {f(manifest) for f in (quarantine_path, duplicates_path, picture_path)}
    }


def index_source(
    source: Source, classes: tuple[str, ...] | None, against: Path | None, progress: Progress | None = None
) -> Index:
    """What ``source`` holds, by the class index ``classes``, by default that of the manifest ``against``, else its own.

    Raises UserError for a source that is damaged or empty, and for a class that is not in the class index.
    """
    if classes is None and against is not None:
        classes = tuple(load_header(against)["classes"])
    return source.index(classes, progress)


def scan(
    source: Path | Source,
    manifest: Path,
    *,
    workers: int,
    index: Index | None = None,
    against: Path | None = None,
    progress: Progress | None = None,
) -> ScanReport:
    """Decode every image of ``source`` and write ``manifest``, its quarantine list and that of duplicates; or go on with it.

    The result is the same for any number of workers and of kills; ``workers=0`` decodes in this process. ``index`` is by
    default ``index_source(source, None, against)``; the images of the manifest ``against`` are looked for too. ``progress``
    gets (entries done, entries). Raises UserError for a source that is missing, damaged, empty or without a usable image,
    for a second scan of this manifest, and for a dead worker.
    """
    started = time.monotonic()
    source = open_source(source) if isinstance(source, Path) else source
    if not manifest.parent.is_dir():
        raise UserError(f"{manifest}: there is no folder {manifest.parent}; make it first")
    index = index or index_source(source, None, against)
    strays = [stray for stray in index.strays if source.root / stray[0] not in _own_files(manifest)]
    index = Index(index.classes, index.entries, strays)
    what = {"source": str(source.root), "kind": source.kind, "classes": index.classes, "versions": _versions(),
            "entries": index.entries.digest()}  # fmt: skip
    try:
        with locked(manifest, "scan"), _Partial(beside(manifest, PARTIAL), what, index) as partial:
            totals, resumed = partial.totals, partial.totals.num_seen
            _decode_all(source, index, partial, workers, progress)
            image_set = _finish(source, index, partial, manifest)
            duplicates = _duplicates(index, totals, manifest, against)
            beside(manifest, PARTIAL).unlink()
    except OSError as error:
        raise UserError(f"{manifest}: cannot be written: {error.strerror}") from error
    reasons = totals.reasons + Counter(reason.split(":")[0] for _, reason in index.strays)
    return ScanReport(
        manifest=manifest,
        quarantine=quarantine_path(manifest),
        source_kind=source.kind,
        image_set=image_set,
        num_samples=len(totals.labels),
        num_classes=len(index.classes),
        num_quarantined=reasons.total(),
        num_resumed=resumed,
        reasons=dict(reasons.most_common()),
        empty_classes=tuple(index.classes[k] for k in sorted(set(range(len(index.classes))) - set(totals.labels))),
        duplicates=duplicates,
        num_bytes=totals.num_bytes,
        seconds=time.monotonic() - started,
    )
