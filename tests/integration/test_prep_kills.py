"""SIGKILLs of scan, write and their workers at random moments: the files that result are the same to the byte."""

import contextlib
import io
import os
import random
import signal
import sys
import time

import numpy as np
import psutil
import pytest
import source_files as make
from PIL import Image

from data_prep import journal
from data_prep import scan as scanner
from data_prep.beton import CRC, JOURNAL, PARTIAL, SEAL, beside
from data_prep.kinds import open_source
from data_prep.manifest import load_manifest
from data_prep.scan import quarantine_path, scan
from data_prep.verify import import_ffcv, verify
from data_prep.write import write
from pipeline.config import UserError

KILLS = 10
CLEAR = 7  # the exit code with which the test's writer reports a UserError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """200 JPEGs of 500 x 375 pixels."""
    import_ffcv()  # here, so that the forked writers need not
    folder = tmp_path_factory.mktemp("kills")
    rng = np.random.default_rng(0)
    for i in range(200):
        (folder / "images" / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        (folder / "images" / f"class{i % 4}" / f"{i}.jpg").write_bytes(file.getvalue())
    scan(folder / "images", folder / "m.jsonl", workers=2)
    return folder / "m.jsonl"


def start(work, workers):
    """``work(workers)`` in a process of its own; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            work(workers)
            code = 0
        except UserError as error:
            os.write(2, f"{error}\n".encode())
            code = CLEAR
        finally:
            os._exit(code)
    return pid


def workers_of(pid):
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def wait_for(what, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.002)
    return False


def ended(pid, seconds):
    """The exit status of a child, within a time; None if it still runs."""
    found = []

    def reap():
        done, status = os.waitpid(pid, os.WNOHANG)
        found.append(status)
        return done == pid

    return os.waitstatus_to_exitcode(found[-1]) if wait_for(reap, seconds) else None


def kill_once(rng, work, span, victim_is_worker):
    """Start the work with some workers and kill it or one of them after a random time; True if that stopped it."""
    count = rng.randint(1, 4)
    pid = start(work, count)
    wait_for(lambda: len(workers_of(pid)) == count or ended_early(pid), 20)
    workers = workers_of(pid)
    time.sleep(rng.uniform(0, span))
    victim = rng.choice(workers).pid if victim_is_worker and workers else pid
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(victim, signal.SIGKILL)
    code = ended(pid, 5)
    assert code is not None, "it hangs after the kill"
    assert code in (0, CLEAR, -signal.SIGKILL)
    assert code != CLEAR or victim != pid
    assert wait_for(lambda: not any(alive(worker) for worker in workers), 5), "a worker outlives it"
    return code != 0


def journaled(beton):
    """How many samples the journal holds; all when it is gone."""
    path = beside(beton, JOURNAL)
    if not path.exists():
        return 200 if beton.exists() else 0
    return len(path.read_bytes().partition(b"\n")[2]) // journal.RECORD.itemsize


def ended_early(pid):
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_often(work, made, count_done, capsys):
    """Run ``work`` until it was stopped KILLS times, removing what is ``made`` when it got through, and then to its end."""
    begun = time.monotonic()
    assert ended(start(work, 2), 60) == 0
    span = (time.monotonic() - begun) * 0.5
    whole = [path.read_bytes() for path in made]
    rng, stopped, progress = random.Random(5), 0, []
    for attempt in range(6 * KILLS):
        if made[0].exists():  # it got through before the kill: the next ones begin anew
            for path in made:
                path.unlink()
        if stopped == KILLS:
            break
        stopped += kill_once(rng, work, span, victim_is_worker=bool(attempt % 2))
        progress.append(count_done())
    with capsys.disabled():
        sys.stdout.write(f"\n{stopped} kills stopped it; samples done after each try: {progress}\n")
    assert stopped == KILLS
    assert ended(start(work, 3), 60) == 0
    assert [path.read_bytes() for path in made] == whole


@pytest.mark.parametrize("options", [{"max_side": 400}, {"mode": "raw"}], ids=["encoded", "raw"])
def test_kills_of_write_leave_the_same_bytes(manifest, tmp_path, monkeypatch, options, capsys):
    monkeypatch.setattr(journal, "SYNC_SAMPLES", 8)  # so that kills fall before, in and after many of them
    beton = tmp_path / "x.beton"
    made = [beside(beton, suffix) for suffix in ("", CRC, SEAL)]
    kill_often(
        lambda workers: write(manifest, beton, **options, workers=workers), made, lambda: journaled(beton), capsys
    )
    assert not beside(beton, PARTIAL).exists() and not beside(beton, JOURNAL).exists()
    verify(beton, workers=0)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_kills_of_scan_leave_the_same_manifest(manifest, tmp_path, monkeypatch, kind, capsys):
    monkeypatch.setattr(scanner, "SYNC_SECONDS", 0.02)
    folder = manifest.parent / "images"
    images = {item.name: {file.name: file.read_bytes() for file in item.iterdir()} for item in folder.iterdir()}
    images["class0"]["no_image.jpg"] = b"text"
    source = {"folder": make.as_folder, "tar": make.as_tar, "parquet": make.as_parquet}[kind](
        tmp_path / "source", images
    )
    book = tmp_path / "m.jsonl"

    def done():
        path = beside(book, PARTIAL)
        return path.read_bytes().count(b"\n") - 1 if path.exists() else 201 * book.exists()

    kill_often(
        lambda workers: scan(open_source(source), book, workers=workers), [book, quarantine_path(book)], done, capsys
    )
    assert not beside(book, PARTIAL).exists()
    assert load_manifest(book).num_samples == 200
