"""The loaders' common face, the threads behind it, the synthetic images and the image folder."""

import gc
import hashlib
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from data_prep.manifest import load_manifest
from data_prep.scan import scan
from pipeline.config import UserError
from pipeline.crops import crop_boxes
from pipeline.data import Batch, Loader, open_loader
from pipeline.order import run_order, sample_keys

SEED = 3


def draw_tree(root: Path, count: int = 40) -> Path:
    """A class folder tree of drawn images: JPEG, grayscale, PNG, rotated by EXIF, one pixel, a strip, a large one."""
    for k in range(count):
        rng = np.random.default_rng(k)
        height, width = {0: (1, 1), 1: (3, 500), 2: (1500, 2500)}.get(k, tuple(rng.integers(60, 300, 2)))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        image = coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)
        if k == 3:
            image = image.convert("L")
        exif = Image.Exif()
        exif[0x0112] = 6 if k == 4 else 1
        folder = root / f"class{k % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        if k == 5:
            image.save(folder / f"{k:03d}.png")
        else:
            image.save(folder / f"{k:03d}.jpg", quality=90, exif=exif)
    return root


def open_synthetic(threads: int = 1, size: int = 32, num_samples: int = 100, **more) -> Loader:
    given = {"image_size": size, "seed": SEED, "augment": True, "num_samples": num_samples, "num_classes": 7}
    return open_loader("synthetic", None, threads=threads, **(given | more))


def read(loader: Loader, first: int = 0, last: int = 5, batch: int = 24) -> list[Batch]:
    with loader.batches(run_order(SEED, first, last, loader.num_samples, batch)) as batches:
        return list(batches)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "labels", "ids", "keys"))


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("patchmill")]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- the face


def test_a_batch_is_what_it_says():
    loader = open_synthetic(num_samples=50)
    for (epoch, ids), batch in zip(run_order(SEED, 0, 4, 50, 20), read(loader, 0, 4, 20), strict=True):
        assert batch.images.shape == (20, 3, 32, 32) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.ids.tolist() == ids.tolist() and batch.keys.tolist() == sample_keys(SEED, epoch, ids).tolist()
        assert batch.labels.tolist() == loader.labels()[ids].tolist()
        assert batch.labels.dtype == batch.ids.dtype == batch.keys.dtype == torch.int64
    assert loader.num_classes == 7 and loader.num_samples == len(loader.labels()) == 50


def test_one_and_two_threads_and_two_runs_are_equal():
    one = read(open_synthetic(1))
    assert all(same(a, b) for a, b in zip(one, read(open_synthetic(2)), strict=True))
    assert all(same(a, b) for a, b in zip(one, read(open_synthetic(1)), strict=True))


def test_resuming_in_the_middle_gives_the_same_batches():
    whole = read(open_synthetic(), 0, 9)
    assert all(same(a, b) for a, b in zip(whole[5:], read(open_synthetic(), 5, 9), strict=True))


def test_parts_of_a_batch_concatenate_to_it():
    loader = open_synthetic()
    whole = read(loader, 0, 1, 24)[0]
    ids = whole.ids.numpy()
    parts = list(loader.batches(iter([(0, ids[:5]), (0, ids[5:])])))
    for name in ("images", "labels", "ids", "keys"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_batches_own_their_memory():
    batches = read(open_synthetic(), 0, 6)
    images = [batch.images.clone() for batch in batches]
    batches[0].images.zero_()
    assert all(torch.equal(a.images, b) for a, b in zip(batches[1:], images[1:], strict=True))
    assert len({batch.images.data_ptr() for batch in batches}) == 6


def test_an_epoch_changes_the_crops_and_the_evaluation_view_does_not():
    ids = np.arange(10)
    random_views = list(open_synthetic().batches(iter([(0, ids), (1, ids)])))
    centred = list(open_synthetic(augment=False).batches(iter([(0, ids), (1, ids)])))
    assert not torch.equal(random_views[0].images, random_views[1].images)
    assert torch.equal(centred[0].images, centred[1].images)


# ---- threads and faults


class Broken(Loader):
    """Fails, or is slow, on one sample."""

    def __init__(self, bad: int, error: BaseException | None) -> None:
        inner = open_synthetic()
        sides = np.full(100, 256)
        super().__init__("broken", (sides, sides), inner.labels(), 7, inner.crops, SEED, 2)
        self.inner, self.bad, self.error = inner, bad, error

    def decode(self, ids, boxes, out):
        if self.bad in ids:
            if self.error is not None:
                raise self.error
            time.sleep(0.5)
        self.inner.decode(ids, boxes, out)


@pytest.mark.parametrize("error", [UserError("sample 40"), MemoryError("full"), SystemExit(3)])
def test_an_error_is_raised_after_the_good_batches_before_it(error):
    loader = Broken(40, error)
    order = iter([(0, np.arange(10 * k, 10 * k + 10)) for k in range(8)])
    batches, started = loader.batches(order), time.monotonic()
    assert [next(batches).ids[0].item() for _ in range(4)] == [0, 10, 20, 30]
    with pytest.raises(type(error), match=str(error)):
        next(batches)
    assert time.monotonic() - started < 5
    assert not own_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_an_order_that_fails_is_raised():
    def order():
        yield 0, np.arange(4)
        raise OSError("no order")

    batches = open_synthetic().batches(order())
    next(batches)
    with pytest.raises(OSError, match="no order"):
        next(batches)


def test_a_sample_id_out_of_range_is_raised():
    with pytest.raises(IndexError):
        next(open_synthetic().batches(iter([(0, np.array([100]))])))


def test_waiting_for_data_is_counted():
    slow = Broken(5, None).batches(iter([(0, np.arange(10))]))
    next(slow)
    assert 0.4 < slow.waited < 5
    ready = open_synthetic().batches(iter([(0, np.arange(2))]))
    wait_until(ready._queue.full)
    next(ready)
    assert ready.waited < 0.4


def test_no_more_than_a_few_batches_are_made_ahead():
    taken = itertools.count()
    order = ((0, np.array([next(taken) % 100])) for _ in range(1000))
    with open_synthetic().batches(order) as batches:
        wait_until(batches._queue.full)
        time.sleep(0.5)
        assert next(taken) <= 3


def test_closing_or_dropping_iterators_leaves_no_thread_and_no_memory():
    loader = open_synthetic(threads=2, size=64)
    process, rss = psutil.Process(), []
    for epoch in range(20):
        batches = loader.batches((epoch, np.arange(64)) for _ in range(50))
        next(batches)
        if epoch % 2:
            batches.close()
        rss.append(process.memory_info().rss)
    held = [loader.batches((0, np.arange(64)) for _ in range(50)) for _ in range(3)]
    loader.close()
    assert not own_threads() and len(held) == 3
    assert rss[-1] - rss[4] < 16e6
    abandoned = loader.batches((0, np.arange(64)) for _ in range(50))
    next(abandoned)
    del abandoned
    gc.collect()
    wait_until(lambda: not own_threads())


def test_a_process_ends_with_an_iterator_open():
    code = """if True:
        import itertools, numpy as np
        from pipeline.data import open_loader
        loader = open_loader("synthetic", None, image_size=32, seed=0, threads=2, augment=True)
        batches = loader.batches((0, np.arange(8)) for _ in itertools.count())
        next(batches)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- synthetic images


def test_synthetic_images_are_fixed():
    """Recorded losses of whole runs rest on them."""
    images = read(open_synthetic(), 0, 1, 16)[0].images.numpy()
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "a3c5bd4e121c8ce7"


def test_synthetic_images_are_mirrored_by_the_flip_bit():
    loader = open_synthetic()
    out = np.empty((2, 3, 32, 32), np.uint8)
    loader.decode(np.array([4, 4]), np.array([[10, 20, 90, 100, 0], [10, 20, 90, 100, 1]], np.int32), out)
    assert (out[0] == out[1, :, :, ::-1]).all() and not (out[0] == out[1]).all()


def test_a_synthetic_crop_is_a_part_of_its_image():
    loader = open_synthetic(size=128)
    out = np.empty((2, 3, 128, 128), np.uint8)
    loader.decode(np.array([4, 4]), np.array([[0, 0, 256, 256, 0], [64, 128, 128, 128, 0]], np.int32), out)
    part, zoomed = out[0, :, 32:96, 64:].astype(int), out[1].reshape(3, 64, 2, 64, 2).mean((2, 4))
    assert np.abs(part.mean((1, 2)) - zoomed.mean((1, 2))).max() < 2
    assert np.abs(part - zoomed).mean() < 12 < np.abs(out[0, :, :64, :64].astype(int) - zoomed).mean()


def test_synthetic_images_of_a_class_are_alike():
    loader = open_synthetic(num_samples=140)
    out = np.empty((140, 3, 32, 32), np.uint8)
    loader.decode(np.arange(140), np.tile(np.array([0, 0, 256, 256, 0], np.int32), (140, 1)), out)
    flat = out.reshape(140, -1).astype(float)
    distance = ((flat[:, None] - flat) ** 2).mean(-1)
    np.fill_diagonal(distance, np.inf)
    assert (loader.labels()[distance.argmin(1)] == loader.labels()).mean() > 0.9
    assert distance.min() > 100


def test_synthetic_sets_with_another_seed_differ():
    a, b = open_synthetic(), open_synthetic(seed=4)
    ids = np.arange(4)
    views = [next(loader.batches(iter([(0, ids)]))).images for loader in (a, b)]
    assert a.image_set != b.image_set and not torch.equal(*views)


# ---- image folders


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    report = scan(draw_tree(folder / "images"), folder / "images.jsonl", workers=0)
    assert report.num_samples == 40
    return folder / "images.jsonl"


@pytest.fixture
def own_manifest(tmp_path) -> Path:
    scan(draw_tree(tmp_path / "images", 12), tmp_path / "images.jsonl", workers=0)
    return tmp_path / "images.jsonl"


def open_folder(path: Path, threads: int = 1, **more) -> Loader:
    return open_loader("folder", path, **({"image_size": 48, "seed": SEED, "threads": threads, "augment": True} | more))


def test_folder_pixels_are_the_boxes_of_the_upright_image(manifest):
    import cv2
    from PIL import ImageOps

    loader, facts = open_folder(manifest, 2), load_manifest(manifest)
    assert (loader.image_set, loader.num_classes, loader.num_samples) == (facts.image_set, 3, 40)
    ids = np.arange(40)
    batch = next(loader.batches(iter([(2, ids)])))
    assert batch.labels.tolist() == facts.labels.tolist()
    boxes = crop_boxes(sample_keys(SEED, 2, ids), facts.heights, facts.widths, (0.2, 1.0))
    for k, (top, left, height, width, flip) in enumerate(boxes.tolist()):
        pixels = np.asarray(ImageOps.exif_transpose(Image.open(facts.root / facts.paths[k])).convert("RGB"))
        crop = cv2.resize(pixels[top : top + height, left : left + width], (48, 48), interpolation=cv2.INTER_AREA)
        assert (batch.images[k].permute(1, 2, 0).numpy() == (crop[:, ::-1] if flip else crop)).all(), facts.paths[k]


def test_folder_batches_are_equal_for_one_and_two_threads(manifest):
    assert all(same(a, b) for a, b in zip(read(open_folder(manifest)), read(open_folder(manifest, 2)), strict=True))


def break_missing(path: Path) -> None:
    path.unlink()


def break_changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def break_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [break_missing, break_changed, break_cut])
def test_a_file_that_is_not_the_scanned_one_is_named(own_manifest, damage):
    facts = load_manifest(own_manifest)
    damage(facts.root / facts.paths[7])
    batches = open_folder(own_manifest).batches(iter([(0, np.arange(4)), (0, np.arange(4, 12))]))
    next(batches)
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{facts.paths[7]}: sample 7: .*patchmill prep scan"):
        next(batches)
    assert time.monotonic() - started < 5 and not own_threads()


def test_a_file_that_pillow_cannot_decode_is_named(own_manifest):
    """A manifest from a machine whose Pillow read it."""
    loader = open_folder(own_manifest)
    path = loader._source.root / loader._paths[7]
    path.write_bytes(b"garbage")
    loader._digests = loader._digests.copy()
    loader._digests[7] = np.frombuffer(hashlib.sha256(b"garbage").digest(), np.uint8)
    with pytest.raises(UserError, match="sample 7"):
        read(loader, 0, 1, 12)


def test_a_folder_in_place_of_a_manifest_names_the_command(own_manifest):
    folder = own_manifest.parent / "images"
    with pytest.raises(UserError, match=f"patchmill prep scan {folder} "):
        open_folder(folder)


def test_a_source_that_has_moved_is_said_at_once(own_manifest):
    (own_manifest.parent / "images").rename(own_manifest.parent / "moved")
    with pytest.raises(UserError, match="images"):
        open_folder(own_manifest)


@pytest.mark.parametrize("kind", ["folder", "ffcv"])
def test_a_path_is_needed(kind):
    with pytest.raises(UserError, match="path"):
        open_loader(kind, None, image_size=32, seed=0, threads=1, augment=True)
