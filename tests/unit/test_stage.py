"""Staging a beton on the host's own disk: one copy, whole or not there, whoever asks and whatever stops it."""

import errno
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from image_files import contents, plain_set
from test_data import wait_until
from test_verify import flip

from data_prep import stage
from data_prep.beton import CRC, LOCK, PARTIAL, SEAL, beside
from data_prep.scan import scan
from data_prep.verify import check_seal, load_seal
from data_prep.write import write
from pipeline.check import check
from pipeline.config import ConfigError, UserError, load_config
from pipeline.evaluate import probe
from pipeline.runs import open_images


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    scan(plain_set(folder / "images", 60), folder / "m.jsonl", workers=0)
    write(folder / "m.jsonl", folder / "x.beton", workers=0)
    return folder / "x.beton"


@pytest.fixture
def beton(original, tmp_path, monkeypatch):
    """A sealed beton of 60 samples, to be copied in runs of a few."""
    monkeypatch.setattr(stage, "BLOCK", 4000)
    for suffix in ("", CRC, SEAL):
        shutil.copyfile(beside(original, suffix), beside(tmp_path / "x.beton", suffix))
    return tmp_path / "x.beton"


def left(folder):
    return sorted(item.name for item in folder.iterdir() if not item.name.endswith(LOCK))


def test_the_copy_is_the_same_and_made_once(beton, tmp_path):
    seen = []
    copy = stage.stage_in(beton, tmp_path / "a" / "fast", lambda done, total: seen.append(done))
    assert contents(copy) == contents(beton) and len(seen) > 10
    assert copy.name == f"x-{load_seal(beton)['digest'][:16]}.beton" and stage.staged_path(beton, copy.parent) == copy
    assert (tmp_path / "a" / "fast").stat().st_mode & 0o777 == 0o700 and copy.stat().st_mode & 0o077 == 0
    before = copy.stat().st_mtime_ns
    assert stage.stage_in(beton, tmp_path / "a" / "fast", pytest.fail) == copy
    assert copy.stat().st_mtime_ns == before
    assert left(copy.parent) == sorted([copy.name, copy.name + CRC, copy.name + SEAL])


def test_other_content_is_another_copy(beton, tmp_path):
    copy = stage.stage_in(beton, tmp_path / "fast")
    scan(plain_set(tmp_path / "images", 7), tmp_path / "m.jsonl", workers=0)
    (tmp_path / "other").mkdir()
    write(tmp_path / "m.jsonl", tmp_path / "other" / "x.beton", workers=0)
    other = stage.stage_in(tmp_path / "other" / "x.beton", tmp_path / "fast")
    assert other != copy and check_seal(other).num_samples == 7 and check_seal(copy).num_samples == 60


class StopError(Exception):
    pass


def stop_at(count):
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == count:
            raise StopError

    return progress


DAMAGE = {
    "nothing": lambda data: data,
    "last byte gone": lambda data: data[:-1],
    "cut in the first sample": lambda data: data[: 2**23 + 100],
    "cut in the padding": lambda data: data[:30],
    "empty": lambda data: b"",
    "zeros at the end": lambda data: data[:-2000] + bytes(2000),
    "a byte": lambda data: data[:-5000] + bytes(1) + data[-4999:],
    "too long": lambda data: data + bytes(2**21),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_stopped_copy_goes_on_with_what_is_whole(beton, tmp_path, name, monkeypatch):
    with pytest.raises(StopError):
        stage.stage_in(beton, tmp_path / "fast", stop_at(9))
    copy = stage.staged_path(beton, tmp_path / "fast")
    assert left(copy.parent) == [copy.name + PARTIAL]
    partial = beside(copy, PARTIAL)
    partial.write_bytes(DAMAGE[name](partial.read_bytes()))
    written = []
    write_all = stage.write_all
    monkeypatch.setattr(stage, "write_all", lambda file, data: written.append(len(data)) or write_all(file, data))
    stage.stage_in(beton, tmp_path / "fast")
    assert contents(copy) == contents(beton)
    if name == "nothing":  # nine runs were there; table, head, checksums and seal come last
        assert len(written) == 4 + sum(1 for _ in stage._runs(check_seal(beton))) - 9


def test_a_source_that_is_damaged_is_named_and_leaves_no_copy(beton, tmp_path):
    table = check_seal(beton).table
    flip(beton, int(table["ptr"][37]) + 5)
    with pytest.raises(UserError, match=r"x.beton: sample 37: its bytes are damaged.*patchmill prep verify"):
        stage.stage_in(beton, tmp_path / "fast")
    assert left(tmp_path / "fast") == [stage.staged_path(beton, tmp_path / "fast").name + PARTIAL]
    flip(beton, int(table["ptr"][37]) + 5)
    stage.stage_in(beton, tmp_path / "fast")


def test_bytes_between_samples_count_too(beton, tmp_path):
    flip(beton, int(check_seal(beton).table["ptr"][0]) - 1)
    with pytest.raises(UserError, match="bytes between its samples differ"):
        stage.stage_in(beton, tmp_path / "fast")


def test_a_source_that_is_cut_while_it_is_copied_is_an_error(beton, tmp_path):
    def cut(done, total):
        os.truncate(beton, 2**23 + 40_000)

    with pytest.raises(UserError, match="x.beton: sample .*: its bytes are damaged or gone"):
        stage.stage_in(beton, tmp_path / "fast", cut)
    assert not list((tmp_path / "fast").glob("*.beton"))


@pytest.mark.parametrize(("position", "part"), [(30, "head"), (-1, "table")])
def test_tables_that_change_while_it_is_copied_leave_no_copy(beton, tmp_path, position, part):
    flips = iter([position])
    with pytest.raises(UserError, match=f"x.beton: its {part} has changed while it was copied.*patchmill prep verify"):
        stage.stage_in(beton, tmp_path / "fast", lambda done, total: [flip(beton, at) for at in flips])
    assert not list((tmp_path / "fast").glob("*.beton"))


def test_a_source_that_cannot_be_read_is_not_called_a_full_disk(beton):
    class Failing(io.BytesIO):
        def read(self, size):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UserError, match="x.beton: cannot be read: Input/output error"):
        stage._read(check_seal(beton), Failing(), 0, 1)


def test_a_broken_copy_is_made_again_loudly(beton, tmp_path, caplog):
    copy = stage.stage_in(beton, tmp_path / "fast")
    flip(copy, int(check_seal(copy).table["ptr"][0]))
    with caplog.at_level(logging.WARNING):
        assert stage.stage_in(beton, tmp_path / "fast") == copy
    assert "the copy is broken and made again" in caplog.text
    assert contents(copy) == contents(beton)


def test_a_disk_that_is_too_small_is_refused_before_the_work(beton, tmp_path, monkeypatch):
    usage, size = shutil.disk_usage(tmp_path), beton.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(UserError, match=r"data.stage_in = .*fast: the copy of .* needs 0.01 GiB and 0.01 GiB are free"):
        stage.stage_in(beton, tmp_path / "fast", pytest.fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    stage.stage_in(beton, tmp_path / "fast")


def test_a_disk_that_becomes_full_is_one_error_and_the_next_run_goes_on(beton, tmp_path, monkeypatch):
    calls, write_all = [], stage.write_all

    def full(file, data):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, data)

    monkeypatch.setattr(stage, "write_all", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device; make room there"):
        stage.stage_in(beton, tmp_path / "fast")
    assert contents(stage.stage_in(beton, tmp_path / "fast")) == contents(beton)


def test_what_another_user_may_have_planted_is_not_trusted(beton, tmp_path, monkeypatch):
    folder = tmp_path / "fast"
    copy = stage.stage_in(beton, folder)
    for suffix in ("", SEAL, CRC, LOCK):
        target = beside(copy, suffix)
        target.rename(tmp_path / "real")
        target.symlink_to(tmp_path / "real")
        with pytest.raises(UserError, match="is a link or another user's file"):
            stage.stage_in(beton, folder)
        target.unlink()
        (tmp_path / "real").rename(target)
    copy.unlink()
    beside(copy, PARTIAL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link or another user's file"):
        stage.stage_in(beton, folder)
    assert not (tmp_path / "elsewhere").exists()
    beside(copy, PARTIAL).unlink()
    folder.chmod(0o777)
    with pytest.raises(UserError, match="other users can replace files there"):
        stage.stage_in(beton, folder)
    folder.chmod(0o1777)
    stage.stage_in(beton, folder)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="is a link or another user's file"):
        stage.stage_in(beton, folder)


def test_what_is_planted_after_the_first_look_is_not_trusted_either(beton, tmp_path, monkeypatch):
    copy, is_whole = stage.stage_in(beton, tmp_path / "fast"), stage._is_whole
    copy.rename(tmp_path / "real")
    monkeypatch.setattr(stage, "_is_whole", lambda path: path.symlink_to(tmp_path / "real") or is_whole(path))
    with pytest.raises(UserError, match="is a link or another user's file"):
        stage.stage_in(beton, tmp_path / "fast")


PROGRAM = """
import sys, time
from pathlib import Path
from data_prep import stage
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
stage.BLOCK = 4000
copied = []
write_all = stage.write_all
stage.write_all = lambda file, data: (copied.append(1), time.sleep(float(sys.argv[3])), write_all(file, data))
print("ready", flush=True)
print(stage.stage_in(Path(sys.argv[1]), Path(sys.argv[2])), len(copied), flush=True)
"""


def staging(beton, folder, pause):
    program = [sys.executable, "-c", PROGRAM, str(beton), str(folder), str(pause)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(60)
def test_processes_of_a_host_copy_once_and_say_whom_they_wait_for(beton, tmp_path):
    with staging(beton, tmp_path / "fast", 0.05) as first:
        wait_until(lambda: list((tmp_path / "fast").glob("*" + PARTIAL)))
        with staging(beton, tmp_path / "fast", 0) as second:
            (out, _), (out2, said) = first.communicate(), second.communicate()
    assert out.split()[1] == out2.split()[1] and int(out.split()[2]) > 10 and int(out2.split()[2]) == 0
    assert f"waiting for process {first.pid}, which copies to" in said


@pytest.mark.timeout(60)
def test_who_waits_takes_over_from_a_process_that_dies(beton, tmp_path):
    with staging(beton, tmp_path / "fast", 0.5) as first:
        wait_until(lambda: list((tmp_path / "fast").glob("*" + PARTIAL)))
        with staging(beton, tmp_path / "fast", 0) as second:
            assert f"waiting for process {first.pid}" in second.stderr.readline()
            first.kill()
            assert second.wait() == 0
    assert contents(stage.staged_path(beton, tmp_path / "fast")) == contents(beton)


@pytest.mark.timeout(120)
def test_kills_at_random_moments_leave_the_same_copy(beton, tmp_path):
    copy, rng, sizes = stage.staged_path(beton, tmp_path / "fast"), random.Random(1), [0]
    for _ in range(10):
        with staging(beton, tmp_path / "fast", 0.1) as process:
            assert process.stdout.readline() == "ready\n"
            wait_until(lambda: beside(copy, PARTIAL).exists() and beside(copy, PARTIAL).stat().st_size > sizes[-1])
            time.sleep(rng.uniform(0, 0.05))
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        sizes.append(beside(copy, PARTIAL).stat().st_size)
    assert sizes[-1] > 2**23 and not copy.exists()
    assert contents(stage.stage_in(beton, tmp_path / "fast")) == contents(beton)


def test_a_run_trains_from_the_copy(beton, tmp_path):
    overrides = [f"data.train={beton}", f"data.val={beton}", f"data.stage_in={tmp_path / 'fast'}", f"run.dir={tmp_path / 'run'}",
                 "data.image_size=16", "train.global_batch=8", "optim.warmup_epochs=0", "data.jit=off"]  # fmt: skip
    cfg = load_config(["cifar10/mae"], overrides)
    copy = stage.staged_path(beton, tmp_path / "fast")
    assert f"stage in: 0.01 GiB to {copy}\nstage in: 0.01 GiB to copy, " in check(cfg)
    loader = open_images(cfg, "train", augment=True)
    assert loader._path == copy and f"stage in: {copy} is there\nstage in: 0.00 GiB to copy, " in check(cfg)
    assert cfg.data.train == str(beton)
    with pytest.raises(ConfigError, match=r"data.stage_in = /x: copies betons; set data.loader=ffcv \(not folder\)"):
        load_config(["cifar10/mae"], [*overrides, "data.loader=folder", "data.stage_in=/x"])


def test_check_says_what_stands_against_a_copy(beton, tmp_path, monkeypatch):
    for suffix in ("", CRC, SEAL):
        shutil.copyfile(beside(beton, suffix), beside(tmp_path / "val.beton", suffix))
    folder, size = tmp_path / "no" / "fast", beton.stat().st_size
    cfg = load_config(["cifar10/mae"], [f"data.train={beton}", f"data.val={tmp_path / 'val.beton'}", f"data.stage_in={folder}",
                                        "train.global_batch=8", f"run.dir={tmp_path / 'run'}"])  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size - 1))
    with pytest.raises(ConfigError, match=r"data.stage_in = .*fast: the copies need 0.02 GiB and 0.02 GiB are free"):
        check(cfg)
    assert not folder.parent.exists()
    with pytest.raises(StopError):
        stage.stage_in(beton, folder, stop_at(9))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size + size // 2))
    check(cfg)  # what the first try left is on the disk already
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="other users can replace files there"):
        check(cfg)
    cfg = load_config(["cifar10/mae"], [f"data.train={beton}", f"data.stage_in={beton}", "train.global_batch=8",
                                        f"run.dir={tmp_path / 'run'}"])  # fmt: skip
    with pytest.raises(ConfigError, match="x.beton cannot be written; set it to another folder"):
        check(cfg)


def test_training_and_validation_images_have_one_class_index(beton, tmp_path, run_dir):
    scan(plain_set(tmp_path / "val", 6, classes=2), tmp_path / "val.jsonl", workers=0)
    write(tmp_path / "val.jsonl", tmp_path / "val.beton", workers=0)
    overrides = [
        f"data.train={beton}",
        f"data.val={tmp_path / 'val.beton'}",
        f"run.dir={run_dir}",
        "train.global_batch=8",
    ]
    manifest = beton.parent / "m2.jsonl"
    scan(plain_set(tmp_path / "train", 9), manifest, workers=0)
    by_manifest = ["data.loader=folder", f"data.train={manifest}", f"data.val={tmp_path / 'val.jsonl'}"]
    words = r"\(2 classes and 3; label 2 is 'no class' and 'class2'\); scan it again with --against"
    for more in ([], by_manifest):
        cfg = load_config(["cifar10/mae"], [*overrides, *more])
        with pytest.raises(ConfigError, match=words):
            check(cfg)
        (run_dir / "config.yaml").write_text(cfg.to_yaml())
        for name in ("knn", "linear", "linear_heads"):
            with pytest.raises(UserError, match=words):
                probe(run_dir, name, "pixels")
    scan(tmp_path / "val", tmp_path / "val2.jsonl", workers=0, against=manifest)
    write(tmp_path / "val2.jsonl", tmp_path / "val2.beton", workers=0)
    assert check(load_config(["cifar10/mae"], [*overrides, f"data.val={tmp_path / 'val2.beton'}"])).endswith("in order")
