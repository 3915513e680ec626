import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded, of_every_kind, pixels, plain_set, put, rotated_jpeg

from data_prep import beton as form
from data_prep import journal
from data_prep import write as writer
from data_prep.images import decode
from data_prep.scan import load_manifest, scan
from data_prep.verify import check_seal, import_ffcv, verify
from data_prep.write import write
from pipeline.config import UserError

MODES = {
    "jpg": {},
    "raw": {"mode": "raw"},
    "smart": {"mode": "smart", "smart_threshold": 48 * 32 * 3},
    "proportion": {"mode": "proportion", "seed": 3},
}


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


def stored(seal, sample):
    with open(seal.beton, "rb") as file:
        file.seek(int(seal.table["ptr"][sample]))
        return file.read(int(seal.table["size"][sample]))


def by_name(manifest):
    return {os.path.basename(path): i for i, path in enumerate(load_manifest(manifest).paths)}


def contents(beton):
    return [form.beside(beton, suffix).read_bytes() for suffix in ("", form.CRC, form.SEAL)]


class StopError(Exception):
    pass


def stop_after(count):
    def progress(done, total):
        if done >= count:
            raise StopError

    return progress


def test_the_record_types_are_ffcvs():
    import_ffcv()
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    assert types.HeaderType == form.HEADER
    assert types.FieldDescType == form.DESCRIPTOR
    assert form.TABLE == types.ALLOC_TABLE_TYPE
    assert types.get_metadata_type([RGBImageField(), IntField()]) == form.ROW
    assert form.ROW.fields["f0"][0].fields["data_ptr"][1] == journal._POINTER
    assert types.CURRENT_VERSION == form.VERSION
    assert (IMAGE_MODES["jpg"], IMAGE_MODES["raw"]) == (form.JPG, form.RAW)
    assert [types.TYPE_ID_HANDLER[type_id] for type_id, _ in form.FIELDS] == [RGBImageField, IntField]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 2**23), min_size=1, max_size=60), st.integers(0, 2**24))
def test_no_sample_crosses_a_page_and_none_overlaps(sizes, end):
    page = form.page_size_for(max(sizes))
    assert page >= max(sizes) and page & (page - 1) == 0
    for size in sizes:
        start = form.place(end, size, page)
        assert start >= end and start // page == (start + size - 1) // page
        assert start == end or end % page + size > page  # no room is wasted
        end = start + size


@pytest.mark.parametrize("mode", MODES)
def test_ffcvs_own_loader_gives_the_pixels(plain, tmp_path, mode):
    write(plain, tmp_path / "x.beton", **MODES[mode], workers=2)
    seal, manifest = check_seal(tmp_path / "x.beton"), load_manifest(plain)
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.compiler import Compiler

    Compiler.set_enabled(False)
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(str(seal.beton), 25, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    batches = [(np.array(images), np.array(labels)) for images, labels in loader]
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    assert labels[:, 0].tolist() == manifest.labels.tolist() == seal.labels.tolist()
    for sample, path in enumerate(manifest.paths):
        direct = decode((manifest.root / path).read_bytes())[0]
        if seal.rows["f0"]["mode"][sample] == form.RAW:
            assert np.array_equal(images[sample], direct)
        else:
            fast = np.empty_like(images[sample])
            imdecode(np.frombuffer(stored(seal, sample), np.uint8), fast, 32, 48, 32, 48, 0, 0, 1, 1, False, False)
            assert np.array_equal(images[sample], fast)
            assert np.abs(images[sample].astype(int) - direct).mean() < 2


@pytest.mark.parametrize("mode", MODES)
def test_the_bytes_are_the_same_for_any_number_of_workers(kinds, tmp_path, mode):
    files = []
    for workers in (0, 1, 2):
        beton = tmp_path / f"{workers}.beton"
        report = write(kinds, beton, **MODES[mode], workers=workers)
        assert (report.num_resumed, report.already_complete, report.num_bytes) == (0, False, beton.stat().st_size)
        files.append(contents(beton))
    assert files[0] == files[1] == files[2]
    assert sorted(os.listdir(tmp_path)) == sorted(f"{w}.beton{s}" for w in range(3) for s in ("", form.CRC, form.SEAL))


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_is_proved_by_verify_and_upright(kinds, tmp_path, mode):
    write(kinds, tmp_path / "x.beton", **MODES[mode], workers=1)
    report = verify(tmp_path / "x.beton", workers=2)
    seal, manifest = check_seal(tmp_path / "x.beton"), load_manifest(kinds)
    assert report.num_samples == seal.num_samples == 16 and report.image_set == manifest.image_set == seal.image_set
    assert seal.widths.tolist() == manifest.widths.tolist() and seal.heights.tolist() == manifest.heights.tolist()
    assert (seal.max_width, seal.max_height) == (200, 90)
    import cv2

    for sample, path in enumerate(manifest.paths):
        source, data = (manifest.root / path).read_bytes(), stored(seal, sample)
        direct = decode(source)[0]
        again = cv2.imencode(".jpg", direct[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        assert data in ((direct.tobytes(),) if seal.rows["f0"]["mode"][sample] == form.RAW else (source, again))
        assert zlib.crc32(data) == seal.crcs[sample]


def test_a_jpegs_own_bytes_are_kept_where_they_can_be(kinds, tmp_path):
    report = write(kinds, tmp_path / "x.beton", workers=0)
    seal, manifest, names = check_seal(tmp_path / "x.beton"), load_manifest(kinds), by_name(kinds)
    same = {name for name, i in names.items() if stored(seal, i) == (manifest.root / manifest.paths[i]).read_bytes()}
    assert same == {"plain.JPEG", "gray.jpg", "upright.jpg", "large.jpg"}
    assert report.num_kept == 4
    assert write(kinds, tmp_path / "y.beton", max_side=199, workers=0).num_kept == 3
    assert write(kinds, tmp_path / "z.beton", mode="raw", workers=0).num_kept == 0


def test_a_jpeg_that_ffcvs_decoder_refuses_is_encoded_again(tmp_path):
    jpeg = encoded(pixels(1), "JPEG", quality=95)
    # Pillow has all its pixels; libffcv counts the warning about bytes between the data and the end.
    put(tmp_path / "images" / "a" / "odd.jpg", jpeg[:-2] + b"\x12\x34\x56" * 5 + jpeg[-2:])
    scan(tmp_path / "images", tmp_path / "m.jsonl", workers=0)
    assert write(tmp_path / "m.jsonl", tmp_path / "x.beton", workers=0).num_kept == 0
    verify(tmp_path / "x.beton", workers=0)


def test_max_side_shrinks_the_upright_image_and_enlarges_none(kinds, tmp_path):
    write(kinds, tmp_path / "x.beton", mode="raw", max_side=40, workers=0)
    seal, names = check_seal(tmp_path / "x.beton"), by_name(kinds)
    sizes = {name: (int(seal.widths[i]), int(seal.heights[i])) for name, i in names.items()}
    assert sizes["plain.JPEG"] == (40, 26) and sizes["turned.jpg"] == (26, 40)
    assert sizes["large.jpg"] == (40, 18) and sizes["line.png"] == (40, 1)
    image = np.frombuffer(stored(seal, names["alpha.png"]), np.uint8).reshape(26, 40, 3)
    import cv2

    assert np.array_equal(image, cv2.resize(pixels(9), (40, 26), interpolation=cv2.INTER_AREA))
    write(kinds, tmp_path / "y.beton", mode="raw", max_side=500, workers=0)
    assert check_seal(tmp_path / "y.beton").widths.tolist() == load_manifest(kinds).widths.tolist()


def test_smart_and_proportion_choose_what_is_jpeg(kinds, plain, tmp_path):
    write(kinds, tmp_path / "s.beton", **MODES["smart"], workers=0)
    seal = check_seal(tmp_path / "s.beton")
    assert ((seal.rows["f0"]["mode"] == form.JPG) == (seal.widths.astype(int) * seal.heights > 48 * 32)).all()
    chosen = []
    for seed, proportion in ((0, 0.25), (1, 0.25), (0, 0.5), (0, 0.0), (0, 1.0)):
        beton = tmp_path / f"{seed}-{proportion}.beton"
        write(plain, beton, mode="proportion", proportion=proportion, seed=seed, workers=0)
        chosen.append(check_seal(beton).rows["f0"]["mode"] == form.JPG)
    assert 20 < chosen[0].sum() < 60 and 55 < chosen[2].sum() < 95
    assert (chosen[0] != chosen[1]).any() and (chosen[2] | ~chosen[0]).all()
    assert not chosen[3].any() and chosen[4].all()


def test_quality_bears_on_what_is_encoded(kinds, tmp_path):
    sizes = {}
    for quality in (30, 95):
        write(kinds, tmp_path / f"{quality}.beton", quality=quality, workers=0)
        sizes[quality] = check_seal(tmp_path / f"{quality}.beton").table["size"][by_name(kinds)["alpha.png"]]
    assert sizes[30] < sizes[95]


def test_the_page_fits_the_largest_sample(tmp_path):
    side = 1700  # 8.67 MB of pixels, more than the least page
    put(tmp_path / "images" / "a" / "0.bmp", encoded(pixels(0, side, side), "BMP"))
    for i in range(1, 4):
        put(tmp_path / "images" / "a" / f"{i}.bmp", encoded(pixels(i, side - i, side), "BMP"))
    scan(tmp_path / "images", tmp_path / "m.jsonl", workers=2)
    write(tmp_path / "m.jsonl", tmp_path / "x.beton", mode="raw", workers=1)
    seal = check_seal(tmp_path / "x.beton")
    assert seal.page_size == 2**24 and seal.table["ptr"].tolist() == [2**24 * (i + 1) for i in range(4)]
    verify(tmp_path / "x.beton", workers=0)


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


def test_opencv_starts_no_threads_of_its_own(plain, tmp_path, monkeypatch):
    import cv2

    seen, resize = set(), cv2.resize
    monkeypatch.setattr(cv2, "resize", lambda *args, **more: seen.add(cv2.getNumThreads()) or resize(*args, **more))
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    write(plain, tmp_path / "x.beton", max_side=20, workers=0)
    assert seen == {1} and cv2.getNumThreads() == 3
    cv2.setNumThreads(before)


def test_what_is_complete_is_left_alone(plain, tmp_path):
    write(plain, tmp_path / "x.beton", workers=0)
    before = os.stat(tmp_path / "x.beton")
    shutil.copy(plain, tmp_path / "copy.jsonl")
    report = write(tmp_path / "copy.jsonl", tmp_path / "x.beton", workers=0)
    assert report.already_complete and report.num_samples == 150 and report.num_kept == 150
    after = os.stat(tmp_path / "x.beton")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "png"}, "mode = 'png'"),
        ({"quality": 0}, "quality = 0"),
        ({"quality": 101}, "quality = 101"),
        ({"max_side": 0}, "max_side = 0"),
        ({"mode": "smart"}, "smart_threshold"),
        ({"mode": "proportion", "proportion": 1.5}, "proportion = 1.5"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(plain, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        write(plain, tmp_path / "x.beton", **options)
    assert not os.listdir(tmp_path)


def test_two_writers_do_not_collide(plain, tmp_path):
    lock = form.beside(tmp_path / "x.beton", writer.LOCK)
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


def test_the_seal_says_what_was_done(kinds, tmp_path):
    write(kinds, tmp_path / "x.beton", quality=80, max_side=100, workers=0)
    facts = json.loads(form.beside(tmp_path / "x.beton", form.SEAL).read_bytes())
    assert facts["options"] == {"mode": "jpg", "quality": 80, "max_side": 100}
    assert facts["classes"] == ["a", "b"] and facts["num_samples"] == 16
    assert facts["image_set"] == load_manifest(kinds).image_set
    assert set(facts["versions"]) == {"ffcv", "opencv-python", "pillow", "numpy", "libjpeg_turbo"}
    assert facts["size"] == (tmp_path / "x.beton").stat().st_size
