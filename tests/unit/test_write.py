import json
import os
import shutil
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import contents, encoded, of_every_kind, pixels, plain_set, put

from data_prep import beton as form
from data_prep import journal
from data_prep.images import decode
from data_prep.manifest import load_manifest
from data_prep.scan import scan
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


def test_the_seal_says_what_was_done(kinds, tmp_path):
    write(kinds, tmp_path / "x.beton", quality=80, max_side=100, workers=0)
    facts = json.loads(form.beside(tmp_path / "x.beton", form.SEAL).read_bytes())
    assert facts["options"] == {"mode": "jpg", "quality": 80, "max_side": 100}
    assert facts["classes"] == ["a", "b"] and facts["num_samples"] == 16
    assert facts["image_set"] == load_manifest(kinds).image_set
    assert set(facts["versions"]) == {"ffcv", "opencv-python", "pillow", "numpy", "libjpeg_turbo"}
    assert facts["size"] == (tmp_path / "x.beton").stat().st_size
