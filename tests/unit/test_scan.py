import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import StopError, encoded, of_every_kind, pixels, plain_set, put, stop_after
from matplotlib.figure import Figure
from PIL import Image

from data_prep.beton import LOCK, beside
from data_prep.images import decode
from data_prep.manifest import load_manifest
from data_prep.scan import duplicates_path, quarantine_path, scan
from data_prep.sources import ImageFolder
from data_prep.statistics import describe, draw, find_duplicates
from data_prep.workers import WorkerError, ordered_map
from pipeline.config import UserError


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def quarantined(manifest):
    return {row["path"]: row["reason"] for row in map(json.loads, quarantine_path(manifest).read_text().splitlines())}


@pytest.fixture
def kinds(tmp_path):
    for name, data in of_every_kind().items():
        put(tmp_path / "images" / ("b" if name.endswith("png") else "a") / name, data)
    (tmp_path / "images" / "empty").mkdir()
    return tmp_path / "images"


@pytest.fixture
def small(tmp_path):
    root = plain_set(tmp_path / "images", 7)
    scan(root, tmp_path / "m.jsonl", workers=0)
    return tmp_path / "m.jsonl"


def test_every_kind_becomes_upright_rgb_by_one_rule(kinds, tmp_path):
    report = scan(kinds, tmp_path / "m.jsonl", workers=0)
    manifest = load_manifest(tmp_path / "m.jsonl")
    rows = {os.path.basename(path): i for i, path in enumerate(manifest.paths)}
    gray = pixels(1)[..., :1].repeat(3, 2)
    palette = np.asarray(Image.fromarray(pixels(2)).quantize(64).convert("RGB"))
    bilevel = np.asarray(Image.fromarray(pixels(1)[..., 0]).convert("1"), np.uint8)[..., None].repeat(3, 2) * 255
    exact = {
        "really_png.jpeg": pixels(8),
        "palette.png": palette,
        "alpha.png": pixels(9),
        "sixteen.png": gray,
        "bilevel.png": bilevel,
        "moving.gif": palette,
    }
    for name, expected in exact.items():
        assert manifest.pixel_sha256[rows[name]].tobytes() == sha(expected), name
    close = {
        "plain.JPEG": pixels(3),
        "gray.jpg": gray,
        "turned.jpg": np.rot90(pixels(4), -1),
        "upside_down.jpg": pixels(11)[::-1, ::-1],
        "upright.jpg": pixels(5),
        "cmyk.jpg": pixels(6),
        "progressive.jpg": pixels(7),
        "stereo.jpg": pixels(10),
    }
    for name, expected in close.items():
        found = decode(of_every_kind()[name])[0]
        assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 5, name
        assert manifest.pixel_sha256[rows[name]].tobytes() == sha(found)
        assert (manifest.heights[rows[name]], manifest.widths[rows[name]]) == expected.shape[:2]
    assert report.num_samples == len(rows) == 14 and report.num_quarantined == 0 and not quarantined(report.manifest)


def test_the_manifest_says_what_the_files_are(kinds, tmp_path):
    scan(kinds, tmp_path / "m.jsonl", workers=0)
    manifest = load_manifest(tmp_path / "m.jsonl")
    facts = {
        os.path.basename(path): (fmt, mode, int(turn), bool(progressive))
        for path, fmt, mode, turn, progressive in zip(
            manifest.paths, manifest.formats, manifest.modes, manifest.orientations, manifest.progressive, strict=True
        )
    }
    assert facts["turned.jpg"] == ("JPEG", "RGB", 6, False)
    assert facts["progressive.jpg"] == ("JPEG", "RGB", 1, True)
    assert facts["gray.jpg"] == ("JPEG", "L", 1, False)
    assert facts["cmyk.jpg"] == ("JPEG", "CMYK", 1, False)
    assert facts["stereo.jpg"] == ("MPO", "RGB", 1, False)
    assert facts["really_png.jpeg"] == ("PNG", "RGB", 1, False)
    assert facts["palette.png"] == ("PNG", "P", 1, False)
    for i, path in enumerate(manifest.paths):
        data = (kinds / path).read_bytes()
        assert manifest.source_sha256[i].tobytes() == hashlib.sha256(data).digest()
        assert manifest.num_bytes[i] == len(data)
    assert manifest.root == kinds and manifest.root.is_absolute()


def test_order_and_labels_follow_the_sorted_names_and_an_empty_class_keeps_its_label(tmp_path):
    for path in ("b/2.png", "b/10.png", "a/x/1.png", "a/y.png", "z/0.png"):
        put(tmp_path / "images" / path, encoded(pixels(len(path)), "PNG"))
    (tmp_path / "images" / "c").mkdir()
    report = scan(tmp_path / "images", tmp_path / "m.jsonl", workers=0)
    manifest = load_manifest(tmp_path / "m.jsonl")
    assert list(manifest.paths) == ["a/x/1.png", "a/y.png", "b/10.png", "b/2.png", "z/0.png"]
    assert manifest.classes == ("a", "b", "c", "z")
    assert manifest.labels.tolist() == [0, 0, 1, 1, 3]
    assert report.empty_classes == ("c",)


def test_what_is_no_good_image_is_listed_with_its_reason(tmp_path, monkeypatch):
    root = plain_set(tmp_path / "images", 3)
    jpeg = encoded(pixels(1, 200, 200), "JPEG")
    put(root / "class0" / "cut.jpg", jpeg[: len(jpeg) // 2])
    put(root / "class0" / "empty.jpg", b"")
    put(root / "class1" / "text.jpg", b"no image at all")
    put(root / "class1" / "float.tiff", encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    put(root / "class1" / "huge.png", encoded(np.zeros((300, 300), np.uint8), "PNG"))
    put(root / "class1" / "bomb.png", encoded(np.zeros((600, 600), np.uint8), "PNG"))
    put(root / "class1" / "long.png", encoded(np.zeros((1, 2**16), np.uint8), "PNG"))
    put(root / "readme.jpg", jpeg)
    put(root / "class2" / ".hidden.jpg", b"")
    put(root / ".hidden" / "x.jpg", b"")
    (root / "class2" / "dead.jpg").symlink_to("nowhere")
    (root / "class2" / "linked").symlink_to(root / "class0")
    os.mkfifo(root / "class2" / "pipe.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80_000)
    report = scan(root, tmp_path / "m.jsonl", workers=2)
    reasons = quarantined(report.manifest)
    kinds = {path: reason.split(":")[0] for path, reason in reasons.items()}
    assert kinds == {
        "readme.jpg": "outside the class folders",
        "class0/cut.jpg": "damaged",
        "class0/empty.jpg": "empty file",
        "class1/bomb.png": "too large",
        "class1/float.tiff": "no rule for RGB",
        "class1/huge.png": "too large",
        "class1/long.png": "too large",
        "class1/text.jpg": "not an image",
        "class2/dead.jpg": "cannot be read",
        "class2/linked": "cannot be read",
        "class2/pipe.jpg": "cannot be read",
    }
    assert "truncated" in reasons["class0/cut.jpg"]
    assert report.num_samples == 3 and report.num_quarantined == 11
    assert report.reasons["too large"] == 3 and report.reasons["cannot be read"] == 3


def test_the_manifest_is_the_same_for_any_number_of_workers(kinds, tmp_path):
    put(kinds / "a" / "text.jpg", b"no image")
    outcomes = set()
    for workers in (0, 1, 3, 64):
        seen = []
        scan(
            kinds,
            tmp_path / "m.jsonl",
            workers=workers,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == [(i, 15) for i in range(16)]
        outcomes.add(((tmp_path / "m.jsonl").read_bytes(), (tmp_path / "m.quarantine.jsonl").read_bytes()))
    assert len(outcomes) == 1
    assert sorted(os.listdir(tmp_path)) == ["images", "m.duplicates.jsonl", "m.jsonl", "m.quarantine.jsonl"]


def test_a_manifest_beside_the_class_folders_is_no_stray(tmp_path):
    root = plain_set(tmp_path / "images", 3)
    for _ in range(2):
        assert scan(root, root / "m.jsonl", workers=0).num_quarantined == 0


def test_image_set_is_pixels_labels_and_class_names_whatever_the_files_are(tmp_path):
    def image_set(folder, kind, names=("a", "b"), seeds=(1, 2)):
        for name, seed in zip(names, seeds, strict=True):
            put(tmp_path / folder / name / f"x.{kind}", encoded(pixels(seed), kind))
        return scan(tmp_path / folder, tmp_path / f"{folder}.jsonl", workers=0).image_set

    first = image_set("1", "PNG")
    assert image_set("2", "BMP") == first
    assert len({first, image_set("3", "PNG", ("a", "c")), image_set("4", "PNG", seeds=(2, 1))}) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "there is no such folder"),
        (lambda root: put(root, b""), "is neither a folder, a tar"),
        (lambda root: root.mkdir(), "holds no sub-folder"),
        (lambda root: (root / "a").mkdir(parents=True), "hold no file"),
        (
            lambda root: put(root / "a" / "x.jpg", b"text"),
            "none of the 1 files is a usable image.*a/x.jpg: not an image",
        ),
    ],
)
def test_a_source_without_images_is_a_clear_error(tmp_path, make, words):
    make(tmp_path / "images")
    with pytest.raises(UserError, match=words) as error:
        scan(tmp_path / "images", tmp_path / "m.jsonl", workers=1)
    assert str(tmp_path / "images") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "m.jsonl").exists()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_cut_manifest_is_refused(tmp_path_factory, data):
    manifest = tmp_path_factory.getbasetemp() / "cut.jsonl"
    whole = tmp_path_factory.getbasetemp() / "whole.jsonl"
    if not whole.exists():
        scan(plain_set(whole.with_suffix(".images"), 5), whole, workers=0)
    text = whole.read_bytes()
    manifest.write_bytes(text[: data.draw(st.integers(0, len(text) - 2))])
    with pytest.raises(UserError, match="cut.jsonl: .*patchmill prep scan"):
        load_manifest(manifest)


def edited(manifest, line, **change):
    lines = manifest.read_text().splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **change})
    manifest.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("line", "change", "words"),
    [
        (0, {"version": 3}, "version 3"),
        (0, {"kind": "other"}, "is not a manifest"),
        (0, {"num_samples": 6}, "names 6 samples and holds 7"),
        (0, {"classes": ["x", "y", "z"]}, "changed after the scan"),
        (3, {"label": 2}, "changed after the scan"),
        (3, {"pixel_sha256": "0" * 64}, "changed after the scan"),
        (3, {"pixel_sha256": "zz"}, "line 4 is cut short or damaged"),
        (3, {"source_sha256": "00"}, "line 4 is cut short or damaged"),
        (3, {"width": "wide"}, "line 4 is cut short or damaged"),
        (3, {"path": "../../etc/passwd"}, "leads out of the source"),
        (3, {"path": "/etc/passwd"}, "leads out of the source"),
    ],
)
def test_an_edited_manifest_is_refused(small, line, change, words):
    edited(small, line, **change)
    with pytest.raises(UserError, match=words) as error:
        load_manifest(small)
    assert str(small) in str(error.value)


def test_a_manifest_that_cannot_be_written_is_a_clear_error(tmp_path):
    root = plain_set(tmp_path / "images", 3)
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(UserError, match="m.jsonl: cannot be written: Is a directory"):
        scan(root, tmp_path / "m.jsonl", workers=2)
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        scan(root, tmp_path / "nowhere" / "m.jsonl", workers=2)


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl: the manifest cannot be read"):
        load_manifest(tmp_path / "nothing.jsonl")


@pytest.mark.timeout(60)
def test_a_killed_worker_is_a_clear_error_and_the_next_scan_goes_on(tmp_path, monkeypatch):
    root = plain_set(tmp_path / "images", 20)
    scan(root, tmp_path / "whole.jsonl", workers=0)
    read, seen = ImageFolder.read, []

    def deadly(self, path, *place):
        if path.endswith("0013.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, path, *place)

    def listed(self, path, *place):
        seen.append(path)
        return read(self, path, *place)

    monkeypatch.setattr(ImageFolder, "read", deadly)
    with pytest.raises(WorkerError, match="was killed by signal 9"):
        scan(root, tmp_path / "m.jsonl", workers=3)
    assert sorted(os.listdir(tmp_path)) == ["images", "m.jsonl.partial", "whole.jsonl", "whole.quarantine.jsonl"]
    monkeypatch.setattr(ImageFolder, "read", listed)
    report = scan(root, tmp_path / "m.jsonl", workers=0)
    assert 0 < report.num_resumed == 20 - len(seen)
    assert (tmp_path / "m.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "m.jsonl.partial").exists()


@pytest.mark.timeout(60)
def test_a_worker_killed_while_it_sends_is_noticed():
    def work(item):
        if item == 5:  # the others stay blocked on full pipes
            os.kill(os.getpid(), signal.SIGKILL)
        return bytes(2**22)

    results = ordered_map(work, range(40), 3)
    assert len(next(results)) == 2**22
    time.sleep(0.2)
    with pytest.raises(WorkerError):
        list(results)


def test_results_come_in_order_and_errors_come_as_they_are():
    def work(item):
        time.sleep(0.01 * (item % 3))
        return item * item, os.getpid()

    results = list(ordered_map(work, range(50), 4))
    assert [square for square, _ in results] == [i * i for i in range(50)]
    assert len({pid for _, pid in results} - {os.getpid()}) == 4
    assert list(ordered_map(abs, [], 4)) == []

    def mistaken(item):
        raise UserError(f"file {item} is wrong") if item == 3 else ZeroDivisionError("in work")

    for first, error, words in ((3, UserError, "file 3 is wrong"), (4, RuntimeError, "ZeroDivisionError: in work")):
        with pytest.raises(error, match=words):
            list(ordered_map(mistaken, [first] * 9, 2))


def test_no_worker_is_left_while_an_error_is_handled(tmp_path):
    def progress(done, total):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as held:  # its traceback keeps every frame alive
        scan(plain_set(tmp_path / "images", 60), tmp_path / "m.jsonl", workers=2, progress=progress)
    assert held and not multiprocessing.active_children()


def test_workers_have_ended_when_the_iterator_is_closed():
    results = ordered_map(lambda item: os.getpid(), range(100), 2)
    pids = {next(results), next(results)}
    results.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_duplicates_are_kept_and_listed(tmp_path):
    same, other = encoded(pixels(1), "PNG"), encoded(pixels(2), "JPEG")
    images = {
        "a/1.png": same,
        "a/2.png": encoded(pixels(3), "PNG"),
        "b/1.bmp": encoded(pixels(1), "BMP"),
        "b/2.png": same,
    }
    for path, data in {**images, "b/3.jpg": other}.items():
        put(tmp_path / "train" / path, data)
    report = scan(tmp_path / "train", tmp_path / "train.jsonl", workers=0)
    assert report.num_samples == 5 and report.duplicates.groups == [[0, 2, 3]]
    assert (report.duplicates.num_surplus, report.duplicates.num_conflicts) == (2, 2)
    assert "2 images have the pixels of another (2 with another label), 0 are in the other" in str(report)
    listed = [json.loads(line) for line in duplicates_path(tmp_path / "train.jsonl").read_text().splitlines()]
    assert listed == [{"paths": ["a/1.png", "b/1.bmp", "b/2.png"], "labels": [0, 1, 1]}]
    put(tmp_path / "val" / "a" / "x.jpg", other)
    put(tmp_path / "val" / "b" / "y.jpg", encoded(pixels(4), "JPEG"))
    scan(tmp_path / "val", tmp_path / "val.jsonl", workers=0, against=tmp_path / "train.jsonl")
    listed = [json.loads(line) for line in duplicates_path(tmp_path / "val.jsonl").read_text().splitlines()]
    assert listed == [{"path": "a/x.jpg", "also": "b/3.jpg", "in": str(tmp_path / "train.jsonl")}]
    scan(tmp_path / "val", tmp_path / "val.jsonl", workers=0)
    assert not duplicates_path(tmp_path / "val.jsonl").exists()


def test_duplicates_against_a_slow_search():
    rng = np.random.default_rng(0)
    for _ in range(50):
        keys = [bytes([k]) * 31 + b"\0" for k in rng.integers(0, 12, rng.integers(1, 15))]
        others = [bytes([k]) * 31 + b"\0" for k in rng.integers(0, 12, rng.integers(0, 5))]
        labels = rng.integers(0, 3, len(keys))
        found = find_duplicates(b"".join(keys), labels, b"".join(others))
        groups = [[k for k, key in enumerate(keys) if key == one] for one in dict.fromkeys(keys)]
        assert found.groups == [group for group in groups if len(group) > 1]
        assert found.num_conflicts == sum(labels[k] != labels[group[0]] for group in groups for k in group)
        assert found.elsewhere == [(keys.index(one), others.index(one)) for one in dict.fromkeys(keys) if one in others]


def test_statistics_are_those_of_the_images(kinds, tmp_path):
    scan(kinds, tmp_path / "m.jsonl", workers=0)
    book = load_manifest(tmp_path / "m.jsonl")
    text = describe(book)
    row = next(line for line in text.splitlines() if line.startswith("longer side")).split()[3:]
    longer = np.maximum(book.widths, book.heights)
    assert row == [f"{x:,.0f}" for x in (longer.min(), np.median(longer), longer.mean(), longer.max())]
    assert "JPEG 7" in text and "PNG 5" in text and "CMYK 1" in text and "turned by EXIF: 2; progressive: 1" in text
    assert draw(book) == tmp_path / "m.statistics.png"
    with Image.open(tmp_path / "m.statistics.png") as picture:
        assert picture.size == (1080, 720)
    put(kinds / "m.statistics.png", b"")
    assert load_manifest(tmp_path / "m.jsonl").num_samples == scan(kinds, kinds / "m.jsonl", workers=0).num_samples


def test_the_figure_says_what_its_axes_are(kinds, tmp_path, monkeypatch):
    scan(kinds, tmp_path / "m.jsonl", workers=0)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    draw(load_manifest(tmp_path / "m.jsonl"))
    axes = drawn[0].axes
    assert [a.get_xlabel() for a in axes] == ["longer side, pixels", "width / height", "file, KiB", "images a class"]
    assert [a.get_ylabel() for a in axes] == ["images", "images", "images", "classes"]
    counts = [sum(patch.get_height() for patch in a.patches) for a in axes]
    assert counts == [14, 14, 14, 3]


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A scan of 30 files that was stopped near its end; (source, manifest, its partial file, the whole manifest)."""
    root, manifest = plain_set(tmp_path / "images", 30), tmp_path / "m.jsonl"
    put(root / "class1" / "text.jpg", b"text")
    scan(root, tmp_path / "whole.jsonl", workers=0)
    with pytest.raises(StopError):
        scan(root, manifest, workers=0, progress=stop_after(28))
    return root, manifest, tmp_path / "m.jsonl.partial", tmp_path / "whole.jsonl"


def test_a_scan_goes_on_wherever_its_partial_file_was_cut(stopped):
    root, manifest, partial, whole = stopped
    data = partial.read_bytes()
    head = data.index(b"\n") + 1
    lines = [k for k, byte in enumerate(data) if byte == 10]
    for cut in (0, 1, head - 1, head, head + 1, lines[5], lines[6] + 1, *range(head + 50, len(data), len(data) // 7)):
        for tail in (b"", b"\0" * 70_000):  # a crash of the machine may leave zeros
            partial.write_bytes(data[:cut] + tail)
            report = scan(root, manifest, workers=0)
            assert report.num_resumed == max(0, data[:cut].count(b"\n") - 1)
            assert manifest.read_bytes() == whole.read_bytes()
            assert quarantine_path(manifest).read_bytes() == quarantine_path(whole).read_bytes()
            assert not partial.exists()


def test_a_scan_of_something_else_begins_anew(stopped):
    root, manifest, partial, whole = stopped
    data = partial.read_bytes()
    put(root / "class0" / "0000a.jpg", encoded(pixels(5), "JPEG"))
    assert scan(root, manifest, workers=0).num_resumed == 0
    assert load_manifest(manifest).num_samples == 31
    (root / "class0" / "0000a.jpg").unlink()
    partial.write_bytes(data.replace(b'"pillow"', b'"pillow_"', 1))
    assert scan(root, manifest, workers=0).num_resumed == 0
    assert manifest.read_bytes() == whole.read_bytes()


def test_what_a_stopped_scan_says_of_no_image_is_not_kept(tmp_path):
    root = tmp_path / "images"
    put(root / "a" / "x.jpg", b"text")
    with pytest.raises(UserError, match="none of the 1 files is a usable image"):
        scan(root, tmp_path / "m.jsonl", workers=0)
    put(root / "a" / "x.jpg", encoded(pixels(1), "JPEG"))
    assert scan(root, tmp_path / "m.jsonl", workers=0).num_samples == 1


def test_two_scans_do_not_collide(tmp_path):
    root, manifest = plain_set(tmp_path / "images", 3), tmp_path / "m.jsonl"
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    lock = beside(manifest, LOCK)
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(UserError, match="another `patchmill prep scan` is working on it"):
            scan(root, manifest, workers=0)
        other.communicate(b"\n")
    assert scan(root, manifest, workers=0).num_samples == 3 and not lock.exists()
