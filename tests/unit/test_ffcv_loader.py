"""The FFCV loader: its pixels, its sameness over threads, processes and compilation, and what it does with damage."""

import hashlib
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import SEED, draw_tree, own_threads, read, same

from data_prep.scan import scan
from data_prep.verify import check_seal
from data_prep.write import write
from pipeline import ffcv_loader
from pipeline.config import UserError
from pipeline.crops import crop_boxes
from pipeline.data import Batch, Loader, open_loader
from pipeline.order import sample_keys

SIZE = 48


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ffcv")
    scan(draw_tree(folder / "images"), folder / "images.jsonl", workers=0)
    return folder / "images.jsonl"


@pytest.fixture(scope="module")
def betons(manifest) -> dict[str, Path]:
    found = {}
    for mode in ("jpg", "raw", "proportion"):
        found[mode] = manifest.parent / f"{mode}.beton"
        write(manifest, found[mode], mode=mode, workers=0)
    return found


def open_ffcv(path: Path, threads: int = 1, **more) -> Loader:
    given = {"image_size": SIZE, "seed": SEED, "augment": True, "jit": "off"}
    return open_loader("ffcv", path, threads=threads, **(given | more))


def digest(batches: list[Batch]) -> str:
    return hashlib.sha256(b"".join(batch.images.numpy().tobytes() for batch in batches)).hexdigest()[:16]


def by_hand(beton: Path, sample: int, box: list[int]) -> np.ndarray:
    """A sample [3, SIZE, SIZE] by FFCV's library, straight from the file."""
    from ffcv.libffcv import imdecode, resize_crop

    seal = check_seal(beton)
    field, place = seal.rows["f0"][sample], seal.table[sample]
    height, width = int(field["height"]), int(field["width"])
    data = np.fromfile(beton, np.uint8, int(place["size"]), offset=int(place["ptr"]))
    if field["mode"] == 0:
        image = np.empty((height, width, 3), np.uint8)
        assert imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False) == 0
    else:
        image = data.reshape(height, width, 3)
    top, left, box_h, box_w, flip = box
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    resize_crop(image, top, top + box_h, left, left + box_w, out)
    return (out[:, ::-1] if flip else out).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion"])
def test_pixels_are_the_boxes_of_the_stored_image(betons, mode):
    seal, ids = check_seal(betons[mode]), np.arange(40)
    loader = open_ffcv(betons[mode], threads=2)
    batch = next(loader.batches(iter([(2, ids)])))
    boxes = crop_boxes(sample_keys(SEED, 2, ids), seal.heights, seal.widths, (0.2, 1.0))
    assert set(boxes[:, 4].tolist()) == {0, 1}
    for k in range(40):
        assert (batch.images[k].numpy() == by_hand(betons[mode], k, boxes[k].tolist())).all(), k
    assert batch.labels.tolist() == seal.labels.tolist()
    assert (loader.image_set, loader.num_classes) == (seal.image_set, 3)


def test_threads_and_compilation_do_not_change_a_bit(betons):
    from ffcv.pipeline.compiler import Compiler

    expected = read(open_ffcv(betons["proportion"]))
    before = Compiler.is_enabled, Compiler.num_threads
    for threads, jit in [(2, "off"), (1, "on"), (2, "on")]:
        loader = open_ffcv(betons["proportion"], threads, jit=jit)
        assert hasattr(loader._decode, "py_func") == (jit == "on")
        assert all(same(a, b) for a, b in zip(expected, read(loader), strict=True))
    assert (Compiler.is_enabled, Compiler.num_threads) == before


def test_another_process_makes_the_same_and_torch_keeps_its_threads(betons):
    code = f"""if True:
        import sys, torch
        torch.set_num_threads(2)
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_data import read
        from test_ffcv_loader import Path, digest, open_ffcv
        torch.set_num_threads(2)  # the tests' own set-up changes it
        batches = read(open_ffcv(Path({str(betons["jpg"])!r}), threads=2))
        print(digest(batches), torch.get_num_threads())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == [digest(read(open_ffcv(betons["jpg"]))), "2"], done.stderr


def test_auto_compiles_long_runs_only(betons):
    for expected, compiled in [(19_999, False), (20_000, True), (None, True)]:
        loader = open_ffcv(betons["raw"], jit="auto", expected_images=expected)
        deadline = time.monotonic() + 60
        while "patchmill-compile" in own_threads():
            assert compiled and time.monotonic() < deadline
            time.sleep(0.05)
        assert hasattr(loader._decode, "py_func") == compiled


def test_resuming_in_the_middle_gives_the_same_batches(betons):
    whole = read(open_ffcv(betons["jpg"]), 0, 7, 12)
    assert all(same(a, b) for a, b in zip(whole[4:], read(open_ffcv(betons["jpg"]), 4, 7, 12), strict=True))


def test_parts_of_a_batch_concatenate_to_it(betons):
    loader, ids = open_ffcv(betons["jpg"]), np.random.default_rng(0).permutation(40)[:24]
    whole, *parts = loader.batches(iter([(3, ids), (3, ids[:11]), (3, ids[11:])]))
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_no_thread_is_left_over_many_epochs(betons):
    loader = open_ffcv(betons["jpg"], threads=2)
    for epoch in range(20):
        batches = loader.batches((epoch, np.arange(16)) for _ in range(9))
        next(batches)
    del batches  # its threads have been told to end, but not yet waited for
    loader.close()
    assert not own_threads()


# ---- folder and beton


def assert_alike(folder: Loader, ffcv: Loader, bound: float) -> None:
    """The same samples and boxes, and pixels that differ by less than ``bound`` grey levels in the mean."""
    assert folder.image_set == ffcv.image_set and (folder.labels() == ffcv.labels()).all()
    ids, differences = np.arange(folder.num_samples), []
    assert (folder.boxes(1, ids) == ffcv.boxes(1, ids)).all()
    order = [(1, part) for part in np.array_split(ids, max(1, len(ids) // 64))]
    with folder.batches(iter(order)) as a, ffcv.batches(iter(order)) as b:
        for left, right in zip(a, b, strict=True):
            assert all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("labels", "ids", "keys"))
            differences.append((left.images.float() - right.images.float()).abs().mean((1, 2, 3)))
    assert torch.cat(differences).mean() < bound


@pytest.mark.parametrize("augment", [True, False])
def test_folder_and_beton_agree(manifest, betons, augment):
    folder = open_loader("folder", manifest, image_size=SIZE, seed=SEED, threads=1, augment=augment)
    assert_alike(folder, open_ffcv(betons["jpg"], augment=augment), 1.5)
    assert_alike(folder, open_ffcv(betons["raw"], augment=augment), 0.1)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    data = os.environ.get("PATCHMILL_DATA")
    if not data:
        pytest.skip("PATCHMILL_DATA names no folder with imagenet_samples.tar")
    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(Path(data) / "imagenet_samples.tar") as tar:
        tar.extractall(folder / "images", filter="data")
    scan(folder / "images", folder / "manifest.jsonl", workers=1)
    write(folder / "manifest.jsonl", folder / "images.beton", workers=1)
    return folder


@pytest.mark.parametrize("size", [192, 224])
def test_imagenet_samples(imagenet, size):
    ffcv = open_ffcv(imagenet / "images.beton", threads=2, image_size=size)
    folder = open_loader("folder", imagenet / "manifest.jsonl", image_size=size, seed=SEED, threads=1, augment=True)
    assert ffcv.num_samples == 569
    assert_alike(folder, ffcv, 1.5)
    assert digest(read(ffcv, 0, 2, 128)) == digest(
        read(open_ffcv(imagenet / "images.beton", image_size=size, jit="on"), 0, 2, 128)
    )


# ---- damage


@pytest.fixture
def small(tmp_path) -> Path:
    """A sealed beton of 150 small JPEGs, more than the seal's check samples."""
    for k in range(150):
        pixels = np.random.default_rng(k).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        (tmp_path / f"images/{k % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((64, 48)).save(tmp_path / f"images/{k % 2}/{k:03d}.jpg")
    scan(tmp_path / "images", tmp_path / "images.jsonl", workers=0)
    write(tmp_path / "images.jsonl", tmp_path / "small.beton", workers=0)
    return tmp_path / "small.beton"


def overwrite(path: Path, position: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(data)


@pytest.mark.parametrize("jit", ["off", "on"])
def test_a_damaged_sample_is_named_after_the_good_batches(small, jit):
    sampled = np.linspace(0, 149, 64).astype(int)
    bad = next(k for k in range(35, 150) if k not in sampled)
    place = check_seal(small).table[bad]
    overwrite(small, int(place["ptr"]), bytes(int(place["size"])))
    loader = open_ffcv(small, threads=2, jit=jit)
    batches = loader.batches(iter([(0, np.arange(k, k + 30)) for k in range(0, 150, 30)]))
    assert next(batches).ids[0] == 0
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{small}: sample {bad} cannot be decoded.*patchmill prep verify"):
        next(batches)
    assert time.monotonic() - started < 5 and not own_threads()


def test_pixels_of_another_size_than_they_should_have_are_named(betons, monkeypatch):
    seal = check_seal(betons["raw"])
    table = seal.table.copy()
    table["size"][3] -= 1
    monkeypatch.setattr(ffcv_loader, "check_seal", lambda path: replace(seal, table=table))
    with pytest.raises(UserError, match=f"{betons['raw']}: sample 3: its bytes are not width x height x 3"):
        open_ffcv(betons["raw"])


def test_a_broken_seal_never_trains(small):
    overwrite(small, small.stat().st_size - 3, b"\xff")
    with pytest.raises(UserError, match="allocation table"):
        open_ffcv(small)


def test_a_fault_in_a_thread_is_raised(betons, monkeypatch):
    loader, calls = open_ffcv(betons["jpg"]), []
    decode = loader._decode

    def faulty(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("injected")
        decode(*args)

    monkeypatch.setattr(loader, "_decode", faulty)
    batches, started = loader.batches((0, np.arange(8)) for _ in range(9)), time.monotonic()
    next(batches), next(batches)
    with pytest.raises(RuntimeError, match="injected"):
        next(batches)
    assert time.monotonic() - started < 5 and not own_threads()
