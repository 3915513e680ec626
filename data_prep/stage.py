"""A beton on the host's own disk: copied once a host, by whoever comes first, every byte checked on the way.

The copy's name carries its content (the seal's digest), so that another set is another file. A copy that was stopped goes
on behind the last samples whose checksums hold.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import numpy as np

from data_prep.beton import CRC, LOCK, PARTIAL, SEAL, beside, head_size, sync_folder, write_all
from data_prep.verify import Seal, check_seal, load_seal, seal_text
from pipeline.config import UserError

log = logging.getLogger("patchmill")

BLOCK: Final = 2**23
POLL_SECONDS: Final = 0.2

Progress = Callable[[int, int], None]


def staged_path(beton: Path, folder: Path) -> Path:
    """Where ``stage_in`` puts the copy. Raises UserError when the beton or its seal is missing or damaged."""
    # Links are followed once and here, so that nobody turns one while the copy is in use.
    return folder.resolve() / f"{beton.stem}-{load_seal(beton)['digest'][:16]}.beton"


def bytes_there(copy: Path) -> int:
    """How much of the disk an unfinished copy holds, bytes."""
    partial = beside(copy, PARTIAL)
    return partial.lstat().st_blocks * 512 if partial.exists() else 0


def check_trusted(copy: Path) -> None:
    """Raises UserError when the folder is open to other users, or they may have planted the copy or what stands beside it."""
    folder = copy.parent
    if folder.exists():
        found = folder.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise UserError(f"data.stage_in = {folder}: other users can replace files there; take a folder of your own")
    for suffix in ("", CRC, SEAL, PARTIAL, LOCK):
        path = beside(copy, suffix)
        if os.path.lexists(path):
            _require_ours(path, path.lstat())


def _require_ours(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{path}: is a link or another user's file, and is not trusted; delete it, or set data.stage_in "
                        "to another folder")  # fmt: skip


def _open(path: Path) -> IO[bytes]:
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b", buffering=0)
    _require_ours(path, os.fstat(file.fileno()))  # the file that was opened, whatever the name is now
    return file


@contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """Hold the copy's lock, which goes with its holder; says whom it waits for."""
    with _open(beside(copy, LOCK)) as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    lock.seek(0)
                    holder = lock.read(32).decode(errors="replace")
                    log.warning("waiting for process %s, which copies to %s", holder, copy)
                waiting = True
                time.sleep(POLL_SECONDS)
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()).encode())
        yield


def _runs(seal: Seal) -> Iterator[tuple[int, int, range]]:
    """(start, end, samples) of pieces of the file from the head to the table, each a block or a little more."""
    ends = (seal.table["ptr"] + seal.table["size"]).astype(np.int64)
    start, first = head_size(seal.num_samples), 0
    while first < seal.num_samples:
        last = min(int(np.searchsorted(ends, start + BLOCK)), seal.num_samples - 1)
        stop = seal.num_bytes - seal.table.nbytes if last + 1 == seal.num_samples else int(seal.table["ptr"][last + 1])
        yield start, stop, range(first, last + 1)
        start, first = stop, last + 1


def _wrong(seal: Seal, data: bytes, start: int, samples: range) -> int | None:
    """The first of ``samples`` whose bytes in ``data``, which begins at ``start``, are not the sealed ones."""
    view = memoryview(data)
    for sample in samples:
        at = int(seal.table["ptr"][sample]) - start
        if zlib.crc32(view[at : at + int(seal.table["size"][sample])]) != seal.crcs[sample]:
            return sample
    return None


def _read(seal: Seal, file: IO[bytes], start: int, size: int) -> bytes:
    try:
        file.seek(start)
        return file.read(size)
    except OSError as error:
        raise UserError(f"{seal.beton}: cannot be read: {error.strerror}; try again, and if it stays: "
                        f"patchmill prep verify {seal.beton}") from error  # fmt: skip


def _copy_samples(seal: Seal, file: IO[bytes], out: IO[bytes], progress: Progress | None) -> None:
    """Take up what is in ``out`` and copy the rest, everything between head and table; a difference anywhere is found."""
    digest, resuming = hashlib.sha256(), True
    for start, stop, samples in _runs(seal):
        out.seek(start)
        data = out.read(stop - start) if resuming else b""
        resuming = resuming and len(data) == stop - start and _wrong(seal, data, start, samples) is None
        if not resuming:
            data = _read(seal, file, start, stop - start)
            wrong = _wrong(seal, data, start, samples)
            if wrong is not None or len(data) != stop - start:
                sample = samples[-1] if wrong is None else wrong
                raise UserError(f"{seal.beton}: sample {sample}: its bytes are damaged or gone; "
                                f"see all that is with: patchmill prep verify {seal.beton}")  # fmt: skip
            out.seek(start)
            write_all(out, data)
        digest.update(data)
        if progress is not None:
            progress(stop >> 20, seal.num_bytes >> 20)
    if digest.hexdigest() != seal.facts["sha256"]["data"]:
        out.truncate(0)
        raise UserError(f"{seal.beton}: bytes between its samples differ from the sealed ones; run the same command "
                        f"again, and if it stays: patchmill prep verify {seal.beton}")  # fmt: skip


def _copy(seal: Seal, out: IO[bytes], progress: Progress | None) -> None:
    with open(seal.beton, "rb") as file:
        _copy_samples(seal, file, out, progress)
        end = seal.num_bytes - seal.table.nbytes
        for name, start, size in (("table", end, seal.table.nbytes), ("head", 0, head_size(seal.num_samples))):
            data = _read(seal, file, start, size)
            if hashlib.sha256(data).hexdigest() != seal.facts["sha256"][name]:
                raise UserError(f"{seal.beton}: its {name} has changed while it was copied; see what is wrong with: "
                                f"patchmill prep verify {seal.beton}")  # fmt: skip
            out.seek(start)
            write_all(out, data)
    out.truncate(seal.num_bytes)
    os.fsync(out.fileno())


def _make(seal: Seal, copy: Path, progress: Progress | None) -> None:
    free = shutil.disk_usage(copy.parent).free + bytes_there(copy)
    if free < seal.num_bytes:
        need, have = f"{seal.num_bytes / 2**30:.2f}", f"{free / 2**30:.2f}"
        raise UserError(f"data.stage_in = {copy.parent}: the copy of {seal.beton} needs {need} GiB and {have} GiB are free; "
                        "make room there, or leave data.stage_in out")  # fmt: skip
    with _open(beside(copy, PARTIAL)) as out:
        _copy(seal, out, progress)
    for suffix, data in ((CRC, seal.crcs.tobytes()), (SEAL, seal_text(seal.facts))):
        with _open(beside(copy, suffix)) as out:
            out.truncate()
            write_all(out, data)
            os.fsync(out.fileno())
    os.replace(beside(copy, PARTIAL), copy)
    sync_folder(copy)


def _is_whole(copy: Path) -> bool:
    """Whether the copy is there and its seal holds; a broken one is deleted, loudly."""
    if not copy.exists():
        return False
    try:
        check_seal(copy)
    except UserError as error:
        log.warning("the copy is broken and made again: %s", error)
        copy.unlink()
        return False
    return True


def stage_in(beton: Path, folder: Path, progress: Progress | None = None) -> Path:
    """The sealed copy of ``beton`` in ``folder`` (made with mode 0700), copied unless it is there; others of the host wait.

    ``progress`` gets (MiB done, MiB). Raises UserError for a beton that is broken, a disk that is or becomes too small (a rerun
    goes on), a folder that cannot be written, and files there that another user may have planted.
    """
    copy = staged_path(beton, folder)
    try:
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_trusted(copy)
        with _alone(copy):
            if not _is_whole(copy):
                _make(check_seal(beton, num_sampled=0), copy, progress)
            check_trusted(copy)  # what is ours now nobody else can replace
    except OSError as error:
        remedy = "set data.stage_in to another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "make room there and run the same command again, it goes on"
        raise UserError(f"data.stage_in = {folder}: the copy of {beton} cannot be written: {error.strerror}; {remedy}, "
                        "or leave data.stage_in out") from error  # fmt: skip
    return copy
