"""``log.jsonl``, the truth about a run: one JSON object a line. Cut at any byte, its whole lines stay readable."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.config import RunFailed, UserError

LOG, DISCARDED = "log.jsonl", "log.discarded.jsonl"
CHANGED: Final = "changed"  # in an eval line: the settings in which the evaluation differed from the run
NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

log = logging.getLogger("patchmill")
Record = dict[str, Any]


def _walk(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _walk(item, leaf) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, leaf) for item in value]
    return leaf(value)


def _strict(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def to_json(value: Any, **options: Any) -> str:
    """Strict JSON; a float that is not finite becomes the string NaN, Infinity or -Infinity."""
    return json.dumps(_walk(value, _strict), allow_nan=False, **options)


def _number(value: Any) -> Any:
    return NONFINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _joined(lines: Sequence[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _parse(path: Path, lines: Sequence[bytes]) -> list[Record]:
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_walk(json.loads(line), _number))
        except ValueError:
            raise UserError(f"{path}: line {number} is damaged; remove that line and start again") from None
    return records


def _whole_lines(path: Path) -> tuple[list[bytes], bytes]:
    """The lines that end in a newline, and what stands after the last of them: a line that a kill cut off."""
    *whole, tail = (path.read_bytes() if path.exists() else b"").split(b"\n")
    return whole, tail


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, also when the machine loses power. Raises OSError."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RunLog:
    """Appends to ``log.jsonl``. A value that is not finite is written as the string NaN, Infinity or -Infinity.

    A line that an earlier process left cut off is removed on opening. While the disk is full lines wait in memory and
    training goes on.
    """

    def __init__(self, path: Path, *, mends: bool = True) -> None:
        """Opens or makes the file; a process that is not the only one who writes there ``mends`` nothing. Raises OSError."""
        whole, tail = _whole_lines(path)
        if tail and mends:
            log.warning("%s: the last line was cut off (%d bytes); removed", path, len(tail))
            os.truncate(path, len(_joined(whole)))
        self._path, self._waiting = path, b""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, kind: str, **fields: Any) -> Record:
        """Append a line with ``kind``, ``time`` (seconds since 1970) and ``fields``; returns its record."""
        record = {"kind": kind, "time": time.time(), **_walk(fields, _plain)}
        self._append(to_json(record).encode() + b"\n")
        return record

    def _append(self, data: bytes) -> None:
        was_waiting, data = bool(self._waiting), self._waiting + data
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not was_waiting:
                log.error("%s: %s; lines wait in memory", self._path, error.strerror)
        self._waiting = data

    @property
    def waiting(self) -> bool:
        """Whether there are lines that the disk had no room for."""
        return bool(self._waiting)

    def close(self) -> None:
        """Close the file; lines that still wait for the disk are tried once more."""
        self._append(b"")
        os.close(self._file)

    def __enter__(self) -> "RunLog":
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


def add_line(path: Path, kind: str, *, mends: bool = True, **fields: Any) -> None:
    """Append one line, by a process that does not train. Raises RunFailed, with the line, where the disk is full."""
    with RunLog(path, mends=mends) as run_log:
        record = run_log.write(kind, **fields)
    if run_log.waiting:
        raise RunFailed(
            f"{path}: no space left on the disk for the line {to_json(record)}; make room, then call it again"
        )


def read_whole(path: Path) -> tuple[list[Record], int]:
    """The records of the whole lines, and how many bytes of a cut-off line follow them; ([], 0) without a file.

    Values that are not finite come back as floats. Raises UserError for a damaged line before the last.
    """
    whole, tail = _whole_lines(path)
    return _parse(path, whole), len(tail)


def read_log(path: Path) -> list[Record]:
    """The records of ``read_whole``; a cut-off last line is left out with a warning."""
    records, cut = read_whole(path)
    if cut:
        log.warning("%s: the last line is cut off (%d bytes); left out", path, cut)
    return records


def discard_after(run_dir: Path, step: int) -> int:
    """Move the lines past ``step`` to ``log.discarded.jsonl`` before a run goes on from there; returns how many.

    The move is safe against a kill at any moment: the lines reach the other file before they leave the log, and a
    second call finds those that it has. Call it while no RunLog is open.
    """
    path, discarded = run_dir / LOG, run_dir / DISCARDED
    whole, tail = _whole_lines(path)
    steps = [record.get("step", -1) for record in _parse(path, whole)]
    gone = [line for line, at in zip(whole, steps, strict=True) if at > step]
    if gone:
        before, _ = _whole_lines(discarded)
        known = set(before)
        replace_file(discarded, _joined([*before, *(line for line in gone if line not in known)]))
    if gone or tail:
        replace_file(path, _joined([line for line, at in zip(whole, steps, strict=True) if at <= step]))
    return len(gone)
