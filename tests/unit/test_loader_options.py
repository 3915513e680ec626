"""Scaled decoding, bicubic resampling, compiling behind the first batches, threads: the same crops, and the same bits."""

import errno
import gc
import io
import logging
import os
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import SEED, own_threads, read, same, wait_until
from test_ffcv_loader import imagenet, overwrite  # noqa: F401  a fixture

from data_prep.images import decode
from data_prep.scan import scan
from data_prep.verify import check_seal
from data_prep.write import write
from pipeline import data, ffcv_loader
from pipeline.config import UserError
from pipeline.crops import scaled_boxes
from pipeline.data import Loader, decode_threads, open_loader

SIZE = 32
OPTIONS = [
    {"decode": decode, "resample": resample} for decode, resample in product(("full", "scaled"), ("area", "bicubic"))
]
options = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: "-".join(option.values()))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Forty JPEGs of sides 40 to 700, some gray, some turned, and a PNG."""
    folder = tmp_path_factory.mktemp("scaled")
    for k in range(40):
        rng = np.random.default_rng(k)
        width, height = (int(side) for side in rng.integers(40, 700, 2))
        image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        exif = Image.Exif()
        exif[0x0112] = 6 if k in (7, 8) else 1
        path = folder / "images" / f"class{k % 2}" / f"{k:03d}.{'png' if k == 9 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = image.convert("L") if k % 9 == 1 else image
        image.save(path) if k == 9 else image.save(path, quality=92, exif=exif)
    scan(folder / "images", folder / "m.jsonl", workers=0)
    return folder / "m.jsonl"


@pytest.fixture(scope="module")
def betons(manifest) -> dict[str, Path]:
    found = {mode: manifest.parent / f"{mode}.beton" for mode in ("jpg", "raw")}
    for mode, path in found.items():
        write(manifest, path, mode=mode, workers=0)
    return found


def ffcv(path: Path, threads: int = 1, **more) -> Loader:
    given = {"image_size": SIZE, "seed": SEED, "augment": True, "jit": "off"}
    return open_loader("ffcv", path, threads=threads, **(given | more))


def folder(path: Path, **more) -> Loader:
    return open_loader("folder", path, image_size=SIZE, seed=SEED, threads=1, augment=True, **more)


# ---- boxes on a scale


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 400), st.data())
def test_scaled_boxes_against_their_definition(height, width, size, draw):
    box_h, box_w = draw.draw(st.integers(1, height)), draw.draw(st.integers(1, width))
    top, left = draw.draw(st.integers(0, height - box_h)), draw.draw(st.integers(0, width - box_w))
    (eighths,), (box,) = scaled_boxes(np.array([[top, left, box_h, box_w, 1]], np.int32), size)
    assert eighths == next((m for m in (1, 2, 4) if box_h * m / 8 >= size and box_w * m / 8 >= size), 8)
    rows, cols = -(-height * eighths // 8), -(-width * eighths // 8)
    assert box[0] >= 0 and box[1] >= 0 and box[0] + box[2] <= rows and box[1] + box[3] <= cols and box[4] == 1
    for got, whole in ((box[0], top), (box[1], left), (box[0] + box[2], top + box_h), (box[1] + box[3], left + box_w)):
        assert abs(got * 8 / eighths - whole) <= 4 / eighths
    if eighths == 8:
        assert box.tolist() == [top, left, box_h, box_w, 1]
    else:
        assert min(box[2], box[3]) >= size and eighths in (1, 2, 4)


# ---- pixels


def test_scaled_pixels_are_the_boxes_of_the_scaled_image(betons):
    from ffcv.libffcv import imdecode, resize_crop

    loader, seal, ids = ffcv(betons["jpg"], decode="scaled"), check_seal(betons["jpg"]), np.arange(40)
    batch = next(loader.batches(iter([(1, ids)])))
    eighths, boxes = scaled_boxes(loader.boxes(1, ids), SIZE)
    assert set(eighths.tolist()) >= {2, 4, 8}
    for k in range(40):
        place, field, m = seal.table[k], seal.rows["f0"][k], int(eighths[k])
        stored = np.fromfile(betons["jpg"], np.uint8, int(place["size"]), offset=int(place["ptr"]))
        height, width = int(field["height"]), int(field["width"])
        image = np.empty((-(-height * m // 8), -(-width * m // 8), 3), np.uint8)
        assert imdecode(stored, image, height, width, height, width, 0, 0, m, 8, False, False) == 0
        top, left, box_h, box_w, flip = boxes[k].tolist()
        out = np.empty((SIZE, SIZE, 3), np.uint8)
        resize_crop(image, top, top + box_h, left, left + box_w, out)
        assert (batch.images[k].numpy() == (out[:, ::-1] if flip else out).transpose(2, 0, 1)).all(), k


def test_bicubic_is_pillows_crop_and_resize(betons):
    loader, seal, ids = ffcv(betons["raw"], resample="bicubic"), check_seal(betons["raw"]), np.arange(40)
    batch = next(loader.batches(iter([(1, ids)])))
    for k, (top, left, height, width, flip) in enumerate(loader.boxes(1, ids).tolist()):
        place, field = seal.table[k], seal.rows["f0"][k]
        stored = np.fromfile(betons["raw"], np.uint8, int(place["size"]), offset=int(place["ptr"]))
        image = Image.fromarray(stored.reshape(field["height"], field["width"], 3))
        out = np.asarray(
            image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        )
        assert (batch.images[k].numpy() == (out[:, ::-1] if flip else out).transpose(2, 0, 1)).all(), k


def difference(a: Loader, b: Loader, step: int = 64) -> float:
    """Mean absolute difference of the same visits, in grey levels; the boxes are equal."""
    ids, found = np.arange(a.num_samples), []
    assert (a.boxes(1, ids) == b.boxes(1, ids)).all()
    parts = [(1, ids[k : k + step]) for k in range(0, len(ids), step)]
    with a.batches(iter(parts)) as left, b.batches(iter(parts)) as right:
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
            found.append((one.images.float() - other.images.float()).abs().mean((1, 2, 3)))
    return float(torch.cat(found).mean())


@options
def test_folder_and_beton_cut_alike(manifest, betons, option):
    assert difference(folder(manifest, **option), ffcv(betons["jpg"], **option)) < 1.5


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("sides", [(64, 48), (63, 97), (8, 9), (401, 15)])
def test_pillow_delivers_the_scale_that_is_asked_for(mode, sides):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides[::-1], 3), dtype=np.uint8)).convert(mode)
    turned = Image.Exif()
    turned[0x0112] = 3
    for options, is_scaled in [
        ({"format": "JPEG"}, True),
        ({"format": "JPEG", "progressive": True}, True),
        ({"format": "JPEG", "exif": turned}, False),
        ({"format": "PNG"}, False),
    ]:
        file = io.BytesIO()
        image.save(file, **options)
        for shrink in (1, 2, 4, 8):
            pixels, facts = decode(file.getvalue(), shrink)
            by = shrink if is_scaled else 1
            assert pixels.shape == (-(-sides[1] // by), -(-sides[0] // by), 3)
            assert (facts.width, facts.height) == sides


def test_nothing_is_scaled_in_a_beton_of_pixels(betons):
    assert difference(ffcv(betons["raw"], decode="scaled"), ffcv(betons["raw"])) == 0


def test_bicubic_of_the_folder_and_of_pixels_is_equal(manifest, betons):
    assert difference(folder(manifest, resample="bicubic"), ffcv(betons["raw"], resample="bicubic")) == 0


def test_scaled_and_whole_are_alike_but_not_equal(betons):
    assert 0.1 < difference(ffcv(betons["jpg"], decode="scaled"), ffcv(betons["jpg"])) < 3.5


def test_differences_on_imagenet(imagenet, capsys):  # noqa: F811
    """The figures that docstrings state, in grey levels at 96 and 224 pixels."""
    manifest, beton = imagenet / "manifest.jsonl", imagenet / "images.beton"
    for size, bounds in ((96, (4.2, 0.5, 1.5, 2.0)), (224, (0.5, 1.5, 1.5, 2.0))):
        full, scaled, bicubic = (
            ffcv(beton, 2, image_size=size, **more) for more in ({}, {"decode": "scaled"}, {"resample": "bicubic"})
        )
        found = (
            difference(scaled, full),
            difference(
                scaled,
                open_loader("folder", manifest, image_size=size, seed=SEED, threads=2, augment=True, decode="scaled"),
            ),
            difference(
                bicubic,
                open_loader(
                    "folder", manifest, image_size=size, seed=SEED, threads=2, augment=True, resample="bicubic"
                ),
            ),
            difference(bicubic, full),
        )
        with capsys.disabled():
            sys.stdout.write(
                f"\n{size} px: scaled/full, scaled/folder, bicubic/folder, bicubic/area {np.round(found, 2)}\n"
            )
        assert all(value < bound for value, bound in zip(found, bounds, strict=True))


# ---- the same bits


@options
def test_threads_compilation_parts_and_resuming_change_no_bit(betons, option):
    expected = read(ffcv(betons["jpg"], **option))
    compiled = ffcv(betons["jpg"], 2, jit="on", **option)
    for loader in (ffcv(betons["jpg"], 2, **option), compiled):
        assert all(same(a, b) for a, b in zip(expected, read(loader), strict=True))
    assert len(compiled._decode.signatures) == 1  # no batch had to wait for another compilation
    assert all(same(a, b) for a, b in zip(expected[3:], read(ffcv(betons["jpg"], **option), 3), strict=True))
    loader, ids = ffcv(betons["jpg"], **option), np.random.default_rng(0).permutation(40)[:24]
    for world in (2, 4):
        whole, *parts = loader.batches(iter([(3, ids), *((3, part) for part in np.array_split(ids, world))]))
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


# ---- damage


@pytest.fixture
def copy(betons, tmp_path) -> Path:
    for item in betons["jpg"].parent.glob("jpg.beton*"):
        (tmp_path / item.name).write_bytes(item.read_bytes())
    return tmp_path / "jpg.beton"


@options
@pytest.mark.parametrize("jit", ["off", "on"])
@pytest.mark.parametrize("damage", ["zeroed", "cut short"])
def test_a_damaged_sample_is_named_in_every_mode(copy, option, jit, damage):
    loader = ffcv(copy, threads=2, jit=jit, **option)  # the damage comes after the check of the seal
    place = check_seal(copy).table[17]
    position, size = int(place["ptr"]), int(place["size"])
    overwrite(
        copy,
        position + (size // 2 if damage == "cut short" else 0),
        bytes(size - size // 2 if damage == "cut short" else size),
    )
    started = time.monotonic()
    with loader.batches(iter([(0, np.arange(8)), (0, np.arange(8, 40))])) as batches:
        assert next(batches).ids[0] == 0
        with pytest.raises(UserError, match="sample 17 cannot be decoded"):
            next(batches)
    assert time.monotonic() - started < 5


@pytest.mark.timeout(60)
def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_crash(copy):
    code = f"""if True:
        import os, sys, threading, numpy as np
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_loader_options import ffcv, Path, UserError
        loader = ffcv(Path({str(copy)!r}), 2)
        with loader.batches((0, np.arange(40)) for _ in range(10000)) as batches:
            next(batches)
            threading.Timer(0.05, os.truncate, (loader._path, 2**23 + 100)).start()
            try:
                for _ in batches: pass
            except UserError as error:
                print(error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "is gone: the file was cut to 8388708 bytes while it was read" in done.stdout


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_reads_that_come_in_pieces_change_nothing_and_one_that_fails_names_the_sample(betons, mode, monkeypatch):
    expected, loader, whole = read(ffcv(betons[mode])), ffcv(betons[mode]), os.preadv

    def in_pieces(file: int, buffers: list[memoryview], offset: int) -> int:
        return whole(file, [buffers[0][:1000]], offset)

    def fails(file: int, buffers: list[memoryview], offset: int) -> int:
        if offset == loader._table[5, 3]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", in_pieces)
    assert all(same(a, b) for a, b in zip(expected, read(loader), strict=True))
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(UserError, match=rf"{mode}.beton: sample 5 cannot be read: Input/output error"):
        read(loader)


# ---- compilation behind the first batches


def test_batches_come_while_the_decoder_is_compiled_and_are_the_same(betons, monkeypatch):
    compile_now, go_on = ffcv_loader._compile, threading.Event()

    def slow(*args):
        assert go_on.wait(20)
        compile_now(*args)

    expected = read(ffcv(betons["jpg"]))
    monkeypatch.setattr(ffcv_loader, "_compile", slow)
    loader = ffcv(betons["jpg"], jit="auto")
    first = read(loader)
    assert not hasattr(loader._decode, "py_func")
    go_on.set()
    deadline = time.monotonic() + 60
    while not hasattr(loader._decode, "py_func"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(same(a, b) and same(a, c) for a, b, c in zip(expected, first, read(loader), strict=True))
    loader.close()
    wait_until(lambda: not own_threads())


def test_a_decoder_that_cannot_be_compiled_goes_on_with_a_warning(betons, monkeypatch, caplog):
    def fails(*args):
        raise ValueError("no such machine")

    monkeypatch.setattr(ffcv_loader, "_compile", fails)
    with caplog.at_level(logging.WARNING):
        loader = ffcv(betons["jpg"], jit="auto")
        wait_until(lambda: not own_threads())
    assert "cannot be compiled and goes on without, slower: ValueError: no such machine" in caplog.text
    assert len(read(loader)) == 5


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pause", [0.0, 0.3, 1.5])
def test_a_process_ends_in_peace_while_the_decoder_is_compiled(betons, pause):
    code = f"""if True:
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_loader_options import ffcv, Path, read
        loader = ffcv(Path({str(betons["jpg"])!r}), jit="auto")
        read(loader)
        loader.close()
        del loader
        time.sleep({pause})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- threads and memory


@pytest.mark.parametrize(
    ("cpus", "quota", "expected"),
    [
        (4, None, (4, "the CPUs of this process")),
        (4, "max 100000", (4, "the CPUs of this process")),
        (4, "250000 100000", (2, "the CPU quota of this control group")),
        (4, "50000 100000", (1, "the CPU quota of this control group")),
        (64, "max 100000", (16, "at most 16 by default")),
        (64, "6400000 100000", (16, "at most 16 by default")),
    ],
)
def test_decoding_threads_follow_the_job(cpus, quota, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    monkeypatch.setattr(data, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert decode_threads(None) == expected
    assert decode_threads(40) == (40, "data.threads")


def test_fifty_epochs_leave_no_thread_and_no_memory(betons):
    loader, process, used = ffcv(betons["jpg"], threads=2, decode="scaled", resample="bicubic"), psutil.Process(), []
    for epoch in range(50):
        batches = loader.batches((epoch, np.arange(40)) for _ in range(5))
        next(batches)
        if epoch % 2:
            list(batches)
        used.append(process.memory_info().rss)
    loader.close()
    del batches
    gc.collect()
    wait_until(lambda: not own_threads())
    assert max(used[40:]) - max(used[5:15]) < 24e6
