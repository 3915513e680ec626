import errno
import multiprocessing
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from image_files import StopError, contents, encoded, of_every_kind, pixels, plain_set, put, rotated_jpeg, stop_after

from data_prep import beton as form
from data_prep import journal
from data_prep import write as writer
from data_prep.manifest import load_manifest
from data_prep.scan import scan
from data_prep.verify import check_seal
from data_prep.write import write
from pipeline.config import UserError


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A manifest of images of every kind, two of them of other sizes, and its folder."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, data in of_every_kind().items():
        put(folder / "images" / ("b" if name.endswith("png") else "a") / name, data)
    put(folder / "images" / "a" / "large.jpg", encoded(pixels(50, 200, 90), "JPEG"))
    put(folder / "images" / "b" / "line.png", encoded(pixels(51, 150, 1), "PNG"))
    scan(folder / "images", folder / "m.jsonl", workers=0)
    return folder / "m.jsonl"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A manifest of 150 small JPEGs of one size: more than two syncs of the journal."""
    folder = tmp_path_factory.mktemp("plain")
    scan(plain_set(folder / "images", 150), folder / "m.jsonl", workers=0)
    return folder / "m.jsonl"


@pytest.fixture(scope="module")
def begun(plain, tmp_path_factory):
    """What an interrupted writer left, and the finished file."""
    folder = tmp_path_factory.mktemp("begun")
    write(plain, folder / "whole.beton", workers=0)
    with pytest.raises(StopError):
        write(plain, folder / "x.beton", workers=2, progress=stop_after(140))
    return folder


def carry_on(begun, plain, folder, damage):
    for suffix in (form.PARTIAL, form.JOURNAL):
        shutil.copy(begun / f"x.beton{suffix}", folder / f"x.beton{suffix}")
    damage(folder / f"x.beton{form.PARTIAL}", folder / f"x.beton{form.JOURNAL}")
    report = write(plain, folder / "x.beton", workers=0)
    assert contents(folder / "x.beton") == contents(begun / "whole.beton")
    assert not form.beside(folder / "x.beton", form.JOURNAL).exists()
    return report.num_resumed


def test_an_interrupted_writer_goes_on_where_it_was(begun, plain, tmp_path):
    assert carry_on(begun, plain, tmp_path, lambda partial, log: None) == 128
    assert not (begun / "x.beton").exists() and not form.beside(begun / "x.beton", form.SEAL).exists()


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def append(path, count):
    with open(path, "ab") as file:
        file.write(bytes(range(1, 256)) * (count // 255))


def first_record(log):
    return log.read_bytes().find(b"\n") + 1


RECORD_BYTES = sorted(
    {offset for _, offset in journal.RECORD.fields.values()} | {28, 29, 32, 40}
)  # the row's parts too


@pytest.mark.parametrize("offset", RECORD_BYTES)
def test_a_damaged_record_is_found_and_made_again(begun, plain, tmp_path, offset):
    size = journal.RECORD.itemsize
    assert (
        carry_on(begun, plain, tmp_path, lambda partial, log: flip(log, first_record(log) + 70 * size + offset)) == 70
    )


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_damaged_sample_is_found_and_made_again(begun, plain, tmp_path, place):
    entry = check_seal(begun / "whole.beton").table[70]
    position = int(entry["ptr"]) + int(place * (int(entry["size"]) - 1))
    assert carry_on(begun, plain, tmp_path, lambda partial, log: flip(partial, position)) == 70


@pytest.mark.parametrize("position", [form.head_size(150), form.MIN_PAGE - 1])
def test_damaged_padding_is_found_and_made_again(begun, plain, tmp_path, position):
    assert carry_on(begun, plain, tmp_path, lambda partial, log: flip(partial, position)) == 0


@pytest.mark.parametrize("extra", [-1, 0, 1, 51])
def test_what_was_cut_off_is_made_again(begun, plain, tmp_path, extra):
    size, left = journal.RECORD.itemsize, 70 if extra >= 0 else 69
    start = int(check_seal(begun / "whole.beton").table["ptr"][70])

    def cut_journal(partial, log):
        os.truncate(log, first_record(log) + 70 * size + extra)

    assert carry_on(begun, plain, tmp_path, cut_journal) == left
    for suffix in ("", form.CRC, form.SEAL):
        form.beside(tmp_path / "x.beton", suffix).unlink()
    assert carry_on(begun, plain, tmp_path, lambda partial, log: os.truncate(partial, start + extra)) == left
    for suffix in ("", form.CRC, form.SEAL):
        form.beside(tmp_path / "x.beton", suffix).unlink()
    assert carry_on(begun, plain, tmp_path, lambda partial, log: os.truncate(partial, 0)) == 0


def test_what_was_added_is_cut_off(begun, plain, tmp_path, monkeypatch):
    def add(partial, log):
        append(partial, 1_000_000)
        append(log, 1000)
        monkeypatch.setattr(journal, "SYNC_SAMPLES", 8)
        with pytest.raises(StopError):
            write(plain, tmp_path / "x.beton", workers=0, progress=stop_after(147))

    assert carry_on(begun, plain, tmp_path, add) == 144


def test_a_missing_record_is_noticed_even_between_equal_images(tmp_path):
    for i in range(80):
        put(tmp_path / "images" / "a" / f"{i}.jpg", encoded(pixels(1), "JPEG"))
    scan(tmp_path / "images", tmp_path / "m.jsonl", workers=0)
    with pytest.raises(StopError):
        write(tmp_path / "m.jsonl", tmp_path / "x.beton", workers=0, progress=stop_after(70))
    log, size = form.beside(tmp_path / "x.beton", form.JOURNAL), journal.RECORD.itemsize
    data, gone = log.read_bytes(), first_record(log) + 20 * size
    log.write_bytes(data[:gone] + data[gone + size :])
    assert write(tmp_path / "m.jsonl", tmp_path / "x.beton", workers=0).num_resumed == 20


def test_a_journal_without_its_first_line_is_refused(begun, plain, tmp_path):
    with pytest.raises(UserError, match="its journal is damaged"):
        carry_on(begun, plain, tmp_path, lambda partial, log: os.truncate(log, 100))


def test_a_crash_at_any_step_of_the_end_is_mended_by_a_rerun(plain, begun, tmp_path, monkeypatch):
    steps = ("write_atomically", "sync_folder", "seal_text")
    crashes = 0
    for name in (*steps, "replace"):
        owner = os if name == "replace" else writer
        real = getattr(owner, name)
        for nth in range(1, 4):
            calls = 0

            def crash(*args, real=real, nth=nth):
                nonlocal calls
                calls += 1
                if calls == nth:
                    raise StopError
                return real(*args)

            beton = tmp_path / f"{name}{nth}.beton"
            monkeypatch.setattr(owner, name, crash)
            try:
                write(plain, beton, workers=0)
            except StopError:
                crashes += 1
            monkeypatch.setattr(owner, name, real)
            write(plain, beton, workers=0)
            assert contents(beton) == contents(begun / "whole.beton")
            assert not form.beside(beton, form.JOURNAL).exists() and not form.beside(beton, form.PARTIAL).exists()
    assert crashes >= 7


def test_no_worker_is_left_while_an_error_is_handled(plain, tmp_path):
    with pytest.raises(StopError) as held:  # its traceback keeps every frame alive
        write(plain, tmp_path / "x.beton", workers=2, progress=stop_after(1))
    assert held and not multiprocessing.active_children()


def test_a_broken_beton_of_the_same_content_is_made_again(plain, begun, tmp_path):
    for suffix in ("", form.CRC, form.SEAL):
        shutil.copy(f"{begun}/whole.beton{suffix}", f"{tmp_path}/x.beton{suffix}")
    os.truncate(tmp_path / "x.beton", 9_000_000)
    assert not write(plain, tmp_path / "x.beton", workers=0).already_complete
    assert contents(tmp_path / "x.beton") == contents(begun / "whole.beton")


def test_other_content_is_refused_and_left_alone(plain, kinds, begun, tmp_path):
    beton = tmp_path / "x.beton"
    write(plain, beton, workers=0)
    before = contents(beton)
    for options, words in (
        ({"quality": 80}, "options.quality: 90 -> 80"),
        ({"mode": "raw"}, "options.mode: jpg -> raw"),
    ):
        with pytest.raises(UserError, match=words):
            write(plain, beton, **options, workers=0)
    with pytest.raises(UserError, match="image_set"):
        write(kinds, beton, workers=0)
    assert contents(beton) == before
    partial = form.beside(begun / "x.beton", form.PARTIAL)
    size = partial.stat().st_size
    with pytest.raises(
        UserError, match=r"x.beton.partial: was begun with other settings \(options.max_side: None -> 9\)"
    ):
        write(plain, begun / "x.beton", max_side=9, workers=0)
    assert partial.stat().st_size == size


def test_a_beton_without_seal_may_be_anyones_and_is_not_overwritten(plain, tmp_path):
    put(tmp_path / "x.beton", b"precious")
    with pytest.raises(UserError, match="x.beton: has no seal"):
        write(plain, tmp_path / "x.beton", workers=0)
    assert (tmp_path / "x.beton").read_bytes() == b"precious"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_changed_since_the_scan_is_named(tmp_path, workers):
    root = plain_set(tmp_path / "images", 6)
    scan(root, tmp_path / "m.jsonl", workers=0)
    put(root / "class1" / "0004.jpg", rotated_jpeg(1, 1))
    with pytest.raises(UserError, match="class1/0004.jpg: has changed.*patchmill prep scan"):
        write(tmp_path / "m.jsonl", tmp_path / "x.beton", workers=workers)
    (root / "class1" / "0004.jpg").unlink()
    with pytest.raises(UserError, match="class1/0004.jpg: cannot be read"):
        write(tmp_path / "m.jsonl", tmp_path / "x.beton", workers=workers)
    shutil.rmtree(root)
    with pytest.raises(UserError, match="images: there is no such folder"):
        write(tmp_path / "m.jsonl", tmp_path / "x.beton", workers=workers)


def test_two_writers_do_not_collide(plain, tmp_path):
    lock = form.beside(tmp_path / "x.beton", form.LOCK)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(UserError, match="another .* is working on it"):
            write(plain, tmp_path / "x.beton", workers=0)
        other.communicate(b"\n")
    write(plain, tmp_path / "x.beton", workers=0)
    assert not lock.exists()


def test_a_disk_that_is_too_small_is_refused_before_the_work(plain, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    need = int(load_manifest(plain).num_bytes.sum())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    with pytest.raises(UserError, match="x.beton: needs about .* GiB"):
        write(plain, tmp_path / "x.beton", workers=0)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need + 10_000))
    write(plain, tmp_path / "x.beton", workers=0)


def test_a_folder_that_is_missing_is_named(plain, tmp_path):
    with pytest.raises(UserError, match="x.beton: cannot be written: No such file or directory"):
        write(plain, tmp_path / "nowhere" / "x.beton", workers=0)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
        if shutil.which("mount")
        else None
    )
    if made is None or made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("full_after", [1, 100, 150])
def test_a_disk_that_fills_up_loses_nothing(plain, begun, tiny_disk, full_after):
    beton, ballast = tiny_disk / "x.beton", tiny_disk / "ballast"

    def fill(done, total):
        if done == full_after:
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC

    with pytest.raises(UserError, match="x.beton: the disk is full"):
        write(plain, beton, workers=1, progress=fill)
    assert not beton.exists()
    ballast.unlink()
    report = write(plain, beton, workers=1)
    assert report.num_resumed == {1: 0, 100: 64, 150: 128}[full_after]
    assert contents(beton) == contents(begun / "whole.beton")


def test_size_and_time_are_said_before_the_work(plain, kinds, tmp_path):
    for manifest, options in (
        (plain, {}),
        (kinds, {}),
        (plain, {"mode": "raw"}),
        (plain, {"max_side": 30, "quality": 100}),
    ):
        said, beton = [], tmp_path / "x.beton"
        write(manifest, beton, workers=0, announce=said.append, **options)
        assert len(said) == 1 and said[0].startswith(f"{load_manifest(manifest).num_samples} images to write, about ")
        size = int(re.search(r"about ([\d,]+) MiB", said[0])[1].replace(",", "")) * 2**20
        assert abs(size - beton.stat().st_size) <= 2**20
        write(manifest, beton, workers=0, announce=said.append, **options)
        assert len(said) == 1  # it is there
        for path in tmp_path.iterdir():
            path.unlink()


def test_what_images_take_when_encoded_again_is_measured_for_the_disk(tmp_path, monkeypatch):
    """Noise at quality 100 takes four times what a photograph does."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for k in range(20):
        put(tmp_path / "images" / "a" / f"{k}.png", encoded(np.roll(noise, k, 0), "PNG"))
    scan(tmp_path / "images", tmp_path / "m.jsonl", workers=0)
    write(tmp_path / "m.jsonl", tmp_path / "x.beton", workers=0, quality=100)
    need = int(check_seal(tmp_path / "x.beton").table["size"].sum())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(need * 0.95)))
    with pytest.raises(UserError, match="y.beton: needs about .* GiB"):
        write(tmp_path / "m.jsonl", tmp_path / "y.beton", workers=0, quality=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(need * 1.05)))
    write(tmp_path / "m.jsonl", tmp_path / "y.beton", workers=0, quality=100)
