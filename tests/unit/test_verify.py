import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, pixels, plain_set

from data_prep import beton as form
from data_prep.manifest import load_manifest
from data_prep.scan import scan
from data_prep.verify import check_seal, seal_text, verify
from data_prep.write import _Encoder, write
from pipeline.config import UserError

COUNT = 130  # more than the samples that are read at the start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    scan(plain_set(folder / "images", COUNT), folder / "m.jsonl", workers=0)
    write(folder / "m.jsonl", folder / "x.beton", workers=0)
    return folder / "x.beton"


@pytest.fixture
def beton(whole, tmp_path):
    for suffix in ("", form.CRC, form.SEAL):
        shutil.copy(form.beside(whole, suffix), form.beside(tmp_path / "x.beton", suffix))
    return tmp_path / "x.beton"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_seal(beton, resealed, **change):
    path = form.beside(beton, form.SEAL)
    facts = {**json.loads(path.read_bytes()), **change}
    path.write_bytes(seal_text(facts) if resealed else json.dumps(facts).encode())


def test_the_seal_gives_what_a_loader_needs(beton, whole):
    seal, manifest = check_seal(beton), load_manifest(whole.with_name("m.jsonl"))
    assert (seal.num_samples, seal.classes, seal.image_set) == (COUNT, manifest.classes, manifest.image_set)
    assert seal.labels.tolist() == manifest.labels.tolist()
    assert (set(seal.widths), set(seal.heights), seal.max_width, seal.max_height) == ({48}, {32}, 48, 32)
    assert seal.options == {"mode": "jpg", "max_side": None, "quality": 90}
    assert seal.num_bytes == beton.stat().st_size and seal.page_size == form.MIN_PAGE
    report = verify(beton, workers=2)
    assert (report.num_samples, report.num_classes, report.num_jpeg, report.num_bytes) == (
        COUNT,
        3,
        COUNT,
        seal.num_bytes,
    )


def test_verify_says_how_far_it_is(beton):
    for workers in (0, 2):
        seen = []
        verify(beton, workers=workers, progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen == [(64, COUNT), (128, COUNT), (COUNT, COUNT)]


DAMAGE = {
    "cut short": (lambda b: os.truncate(b, b.stat().st_size - 1), "bytes instead of"),
    "grown": (lambda b: b.write_bytes(b.read_bytes() + b"\0"), "bytes instead of"),
    "empty": (lambda b: os.truncate(b, 0), "has 0 bytes instead of"),
    "header": (lambda b: flip(b, 5), "header or metadata is damaged"),
    "descriptor": (lambda b: flip(b, 100), "header or metadata is damaged"),
    "last metadata": (lambda b: flip(b, form.head_size(COUNT) - 1), "header or metadata is damaged"),
    "table": (lambda b: flip(b, -1), "allocation table is damaged"),
    "table's start": (lambda b: flip(b, -24 * COUNT), "allocation table is damaged"),
    "first sample": (lambda b: flip(b, form.MIN_PAGE), "sample 0: its bytes are damaged"),
    "last sample": (lambda b: flip(b, -24 * COUNT - 1), f"sample {COUNT - 1}: its bytes are damaged"),
    "no seal": (lambda b: form.beside(b, form.SEAL).unlink(), "has no seal"),
    "no checksums": (lambda b: form.beside(b, form.CRC).unlink(), "x.beton.crc cannot be read"),
    "checksums": (lambda b: flip(form.beside(b, form.CRC), 77), "x.beton.crc are damaged"),
    "seal cut": (lambda b: os.truncate(form.beside(b, form.SEAL), 300), "x.beton.seal.json is damaged"),
    "seal is a list": (lambda b: form.beside(b, form.SEAL).write_text("[]"), "x.beton.seal.json is damaged"),
    "seal edited": (lambda b: edit_seal(b, False, image_set="0" * 64), "x.beton.seal.json is damaged"),
    "seal's classes": (lambda b: edit_seal(b, False, classes=["a", "b", "c"]), "x.beton.seal.json is damaged"),
    "newer seal": (lambda b: edit_seal(b, True, version=2), "has version 2"),
    "no beton": (lambda b: b.unlink(), "there is no such file"),
    "unfinished": (lambda b: b.rename(form.beside(b, form.PARTIAL)), "is not finished"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_the_file_and_the_command(beton, name):
    damage, words = DAMAGE[name]
    damage(beton)
    for check in (check_seal, lambda path: verify(path, workers=0)):
        with pytest.raises(UserError, match=words) as error:
            check(beton)
        text = str(error.value)
        assert "\n" not in text and f"{beton}" in text
        assert f"patchmill prep verify {beton}" in text or f"patchmill prep write MANIFEST {beton}" in text


def test_what_the_quick_check_does_not_read_verify_finds(beton):
    seal = check_seal(beton)
    flip(beton, int(seal.table["ptr"][1]) + 300)
    check_seal(beton)
    with pytest.raises(UserError, match="is broken: sample 1: its bytes are damaged; delete it and make it again"):
        verify(beton, workers=2)
    with pytest.raises(UserError, match="sample 1: its bytes are damaged"):
        check_seal(beton, num_sampled=COUNT)


def test_verify_lists_the_first_few_of_many(beton):
    data, ptrs = bytearray(beton.read_bytes()), check_seal(beton).table["ptr"]
    for sample in range(100, 110):
        data[ptrs[sample]] ^= 1
    beton.write_bytes(data)
    with pytest.raises(UserError, match="sample 100, 101, 102, 103, 104 and 5 more: its bytes are damaged"):
        verify(beton, workers=0)


def test_verify_finds_damage_between_the_samples(beton):
    flip(beton, form.MIN_PAGE - 1)
    check_seal(beton, num_sampled=COUNT)
    with pytest.raises(UserError, match="bytes between the samples are damaged"):
        verify(beton, workers=0)


def cut_jpeg(sample):
    return replace(sample, data=sample.data[:400])


def other_jpeg(sample):
    return replace(sample, data=encoded(pixels(1, 32, 48), "JPEG"))


def not_jpeg(sample):
    return replace(sample, data=b"text")


def as_raw(sample):
    row = np.frombuffer(sample.row, form.ROW).copy()
    row["f0"]["mode"] = form.RAW
    return replace(sample, row=row.tobytes())


def wrong_label(sample):
    row = np.frombuffer(sample.row, form.ROW).copy()
    row["f1"] = 3
    return replace(sample, row=row.tobytes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut_jpeg, "FFCV cannot decode it at its size"),
        (other_jpeg, "FFCV cannot decode it at its size"),
        (not_jpeg, "FFCV cannot decode it at its size"),
        (as_raw, "its bytes are not width x height x 3"),
        (wrong_label, "has a label that is no class"),
    ],
)
def test_verify_finds_a_sample_that_was_wrong_when_it_was_sealed(whole, tmp_path, monkeypatch, change, words):
    encode = _Encoder._one

    def spoil(self, index):
        sample = encode(self, index)
        if index != 7:
            return sample
        sample = change(sample)
        from zlib import crc32

        return replace(sample, crc=crc32(sample.data))

    monkeypatch.setattr(_Encoder, "_one", spoil)
    write(whole.with_name("m.jsonl"), tmp_path / "x.beton", workers=0)
    check_seal(tmp_path / "x.beton", num_sampled=COUNT)
    with pytest.raises(UserError, match=f"sample 7: {words}"):
        verify(tmp_path / "x.beton", workers=0)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({9: ("ptr", 0)}, "sample 9: lies outside the data"),
        ({9: ("ptr", form.MIN_PAGE)}, "sample 9: overlaps the sample before it"),
        ({9: ("size", form.MIN_PAGE)}, "sample 9: crosses a page border"),
        ({9: ("ptr", form.MIN_PAGE + 1)}, "sample 9: has a metadata row that points elsewhere"),
    ],
)
def test_verify_finds_a_layout_that_was_wrong_when_it_was_sealed(beton, table, words):
    import hashlib

    data = bytearray(beton.read_bytes())
    rows = np.frombuffer(data, form.TABLE, COUNT, len(data) - COUNT * 24)
    for sample, (name, value) in table.items():
        rows[sample][name] = value
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    beton.write_bytes(data)
    facts = json.loads(form.beside(beton, form.SEAL).read_bytes())
    edit_seal(beton, True, sha256={**facts["sha256"], "table": digest})
    with pytest.raises(UserError, match=words):
        verify(beton, workers=0)


def test_the_quick_check_loads_neither_torch_nor_ffcv_nor_an_image_library(beton):
    code = (
        "import sys; from pathlib import Path; from data_prep.verify import check_seal; check_seal(Path(sys.argv[1]));"
        "print(sorted({'torch', 'ffcv', 'cv2', 'PIL', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, beton], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_torchs_threads_stay_as_they_were(beton):
    code = (
        "import torch; torch.set_num_threads(3); from data_prep.verify import import_ffcv; import_ffcv();"
        "print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


@pytest.mark.skipif("PATCHMILL_DATA" not in os.environ, reason="PATCHMILL_DATA names no folder of real images")
def test_real_images_pass_through_the_whole_chain(tmp_path):
    with tarfile.open(Path(os.environ["PATCHMILL_DATA"]) / "imagenet_samples.tar") as tar:
        tar.extractall(tmp_path / "images", filter="data")
    report = scan(tmp_path / "images", tmp_path / "m.jsonl", workers=2)
    assert (report.num_samples, report.num_quarantined) == (569, 0)
    manifest = load_manifest(tmp_path / "m.jsonl")
    written = write(tmp_path / "m.jsonl", tmp_path / "jpg.beton", workers=2)
    assert written.num_kept == ((manifest.orientations == 1) & ~manifest.progressive).sum() == 568
    assert verify(tmp_path / "jpg.beton", workers=2).num_jpeg == 569
    write(tmp_path / "m.jsonl", tmp_path / "raw.beton", mode="raw", max_side=500, workers=2)
    assert verify(tmp_path / "raw.beton", workers=2).num_jpeg == 0
    seal = check_seal(tmp_path / "raw.beton")
    assert seal.max_width == seal.max_height == 500 and seal.labels.tolist() == list(range(569))
