"""The windowed order: a pure permutation whose windows read few pages, and the pages that are read ahead of it."""

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import plain_set
from test_data import own_threads, wait_until

from data_prep.scan import scan
from data_prep.verify import check_seal
from data_prep.write import write
from pipeline import order, train
from pipeline.config import Config, ConfigError, UserError, load_config
from pipeline.data import Batches, open_loader
from pipeline.keys import Int64
from pipeline.launch import World
from pipeline.order import Windows
from pipeline.stop import StopRequest

SOME = settings(max_examples=50, deadline=None)

# Pages as in a beton: in the order of the samples, some of them with one sample, their numbers not from 0.
PAGES = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(
    lambda counts: np.repeat(3 + np.arange(len(counts)), counts)
)


def steps(windows: Windows, first: int, last: int, batch: int, skipped: tuple = ()) -> list[tuple[int, list[int]]]:
    walk = order.run_order(3, first, last, len(windows.pages), batch, skipped, windows)
    return [(epoch, ids.tolist()) for epoch, ids in walk]


def even(num_pages: int, per_page: int) -> Int64:
    return np.repeat(np.arange(num_pages), per_page)


# ---- the permutation


@SOME
@given(st.integers(0, 2**40), st.integers(0, 500), PAGES, st.integers(1, 50))
def test_an_epoch_is_a_permutation_of_samples_and_of_pages(seed: int, epoch: int, pages: Int64, size: int) -> None:
    found = Windows(pages, size).epoch(seed, epoch)
    assert sorted(found.ids.tolist()) == list(range(len(pages)))
    assert sorted(found.pages.tolist()) == np.unique(pages).tolist()
    assert not any(array.flags.writeable for array in found)


@SOME
@given(st.integers(0, 2**40), st.integers(0, 500), PAGES, st.integers(1, 50))
def test_a_window_is_all_samples_of_its_pages_and_of_no_others(seed: int, epoch: int, pages: Int64, size: int) -> None:
    windows = Windows(pages, size)
    found = windows.epoch(seed, epoch)
    parts = np.split(found.ids, found.starts[1:])
    assert found.starts[0] == 0 and len(parts) == -(-len(found.pages) // size)
    for number, ids in enumerate(parts):
        own = windows.pages_of(seed, epoch, number)
        assert len(own) == size or number == len(parts) - 1
        assert sorted(ids.tolist()) == np.flatnonzero(np.isin(pages, own)).tolist()


def test_it_is_a_function_of_seed_epoch_pages_and_their_number() -> None:
    def ids(seed: int = 1, epoch: int = 2, per_page: int = 4, size: int = 5) -> tuple[int, ...]:
        return tuple(Windows(even(120 // per_page, per_page), size).epoch(seed, epoch).ids.tolist())

    np.random.seed(0)
    first = ids()
    np.random.seed(1)
    assert ids() == first
    others = [ids(seed=2), ids(epoch=3), ids(per_page=3), ids(size=6)]
    assert len({first, *others}) == 5
    assert first != tuple(order.epoch_permutation(1, 2, 120).tolist())


def test_pages_need_not_be_in_the_order_of_the_samples() -> None:
    shuffled = np.random.default_rng(0).permutation(even(30, 4))
    windows = Windows(shuffled, 5)
    found = windows.epoch(0, 0)
    assert set(shuffled[found.ids[:20]].tolist()) == set(windows.pages_of(0, 0, 0).tolist())


def test_first_place_is_uniform_over_samples() -> None:
    windows = Windows(even(5, 4), 2)
    first = np.bincount([windows.epoch(1, epoch).ids[0] for epoch in range(5000)], minlength=20)
    assert ((first - 250.0) ** 2 / 250).sum() < 70  # chi square with 19 degrees of freedom: p < 1e-6 beyond


def test_the_pages_that_share_a_window_change_with_the_epoch() -> None:
    windows = Windows(even(40, 3), 4)
    found = [{frozenset(windows.pages_of(0, epoch, number).tolist()) for number in range(10)} for epoch in range(20)]
    assert len(set.union(*found)) > 195


def test_one_window_of_all_pages_is_a_full_shuffle() -> None:
    """Any two samples follow each other equally often, whether or not they share a page."""
    windows, count = Windows(even(4, 3), 99), 12
    pairs = np.zeros((count, count))
    for epoch in range(3000):
        ids = windows.epoch(5, epoch).ids
        pairs[ids[:-1], ids[1:]] += 1
    expected = 3000 * (count - 1) / (count * (count - 1))
    chi_square = ((pairs[~np.eye(count, dtype=bool)] - expected) ** 2 / expected).sum()
    assert chi_square < 131 + 6 * (2 * 131) ** 0.5


def test_a_window_mixes_its_pages() -> None:
    windows = Windows(even(64, 50), 8)
    ids = windows.epoch(0, 0).ids[:100]
    assert len(set(windows.pages[ids].tolist())) == 8
    assert len(set(np.diff(ids).tolist())) > 60  # and not by dealing them in turn


# ---- the contract of the full order


@SOME
@given(PAGES, st.integers(1, 12), st.integers(1, 30), st.integers(0, 30), st.integers(0, 30))
def test_resuming_at_any_step_gives_the_tail_of_the_whole(pages: Int64, size: int, batch: int, a: int, b: int) -> None:
    if len(pages) < batch:
        return
    first, last = sorted((a, b))
    assert steps(Windows(pages, size), first, last, batch) == steps(Windows(pages, size), 0, 30, batch)[first:last]


def test_epochs_have_whole_batches_and_the_samples_left_out_differ() -> None:
    windows, batch, left = Windows(even(10, 5), 3), 8, []
    walk = steps(windows, 0, 6 * 400, batch)
    assert [epoch for epoch, _ in walk] == [step // 6 for step in range(2400)]
    for epoch in range(400):
        seen = [sample for _, ids in walk[6 * epoch : 6 * epoch + 6] for sample in ids]
        assert len(seen) == len(set(seen)) == 48
        left.append(frozenset(range(50)) - set(seen))
    assert len(set(left)) > 90  # of 100: two samples of the page that makes the last window
    assert frozenset().union(*left) == frozenset(range(50))


def test_skipped_batches_are_left_out() -> None:
    windows = Windows(even(10, 5), 3)
    whole = steps(windows, 0, 30, 5)
    assert steps(windows, 0, 20, 5, ((3, 7), (12, 14))) == [
        whole[i] for i in range(26) if i not in (3, 4, 5, 6, 12, 13)
    ]


# ---- what is announced


def walk_and_announce(
    pages: Int64, size: int, batch: int, first: int, last: int, skipped: tuple = ()
) -> list[set[int]]:
    """What had been announced, over all the walk, when each step's ids were handed out."""
    known: list[int] = []
    windows = Windows(pages, size, lambda found: known.extend(found.tolist()))
    return [set(known) for _ in order.run_order(3, first, last, len(pages), batch, skipped, windows)]


@SOME
@given(PAGES, st.integers(1, 12), st.integers(1, 30), st.integers(0, 40), st.integers(1, 40))
def test_no_page_is_read_that_was_not_announced(pages: Int64, size: int, batch: int, first: int, count: int) -> None:
    if len(pages) < batch:
        return
    known = walk_and_announce(pages, size, batch, first, first + count)
    for (_, ids), pages_known in zip(steps(Windows(pages, size), first, first + count, batch), known, strict=True):
        assert set(pages[ids].tolist()) <= pages_known


def test_a_window_is_announced_once_while_the_one_before_it_is_read() -> None:
    pages, calls = even(20, 5), []
    windows = Windows(pages, 4, lambda found: calls.append(sorted(found.tolist())))  # windows of 20 samples, 2 batches
    first = [sorted(windows.pages_of(3, epoch, number).tolist()) for epoch in (0, 1) for number in range(5)]
    told = [len(calls) for _ in order.run_order(3, 1, 14, 100, 10, (), windows)]
    # Step 1 stands in window 0 and needs it and window 1; each following window comes when the one before it begins.
    assert told == [2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    assert calls == first[:8]


def test_the_end_of_the_run_announces_no_next_epoch_and_a_jump_its_own_windows() -> None:
    pages, calls = even(20, 5), []
    windows = Windows(pages, 4, lambda found: calls.append(sorted(found.tolist())))
    own = [sorted(windows.pages_of(3, 0, number).tolist()) for number in range(5)]
    list(order.run_order(3, 7, 10, 100, 10, (), windows))
    assert calls == own[3:]
    calls.clear()
    list(order.run_order(3, 0, 2, 100, 10, ((1, 8),), windows))
    assert calls == [own[0], own[1], own[4]]


def test_a_window_in_the_left_out_tail_is_not_announced_but_the_next_epoch_is() -> None:
    pages, calls = even(5, 10), []
    windows = Windows(pages, 2, lambda found: calls.append(found.tolist()))  # windows of 20, 20 and 10 samples
    list(order.run_order(3, 0, 2, 50, 40, (), windows))
    assert calls[:3] == [windows.pages_of(3, *place).tolist() for place in ((0, 0), (0, 1), (1, 0))]


# ---- a beton's pages


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 raw images of 1.5 MB: five a page."""
    folder = tmp_path_factory.mktemp("windowed")
    scan(plain_set(folder / "images", 12, 800, 640), folder / "images.jsonl", workers=0)
    write(folder / "images.jsonl", folder / "images.beton", mode="raw", workers=0)
    return folder / "images.beton"


def test_a_betons_windows_follow_its_allocation_table(beton: Path) -> None:
    seal = check_seal(beton)
    loader = open_loader("ffcv", beton, image_size=16, seed=0, threads=1, augment=True, jit="off")
    windows = loader.windows(2)
    assert windows.num_pages == 2
    assert windows.pages.tolist() == (seal.table["ptr"] // seal.page_size).tolist() == [1] * 5 + [2] * 5 + [3] * 2


def test_the_pages_of_a_window_are_read_ahead_on_a_thread_that_ends(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, names = [], set()
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: (calls.append(rest), names.update(own_threads())))
    loader = open_loader("ffcv", beton, image_size=16, seed=0, threads=1, augment=True, jit="off")
    windows, page = loader.windows(1), check_seal(beton).page_size
    assert not own_threads()
    with loader.batches(order.run_order(0, 0, 1, 12, 4, (), windows)) as batches:
        wanted = sorted(page * number for number in windows.epoch(0, 0).pages[:2].tolist())
        assert len(next(batches).ids) == 4
        wait_until(lambda: sum(length for _, length, _ in calls) >= 2 * page)
    assert any(name.startswith("patchmill-ahead") for name in names)
    assert {advice for *_, advice in calls} == {os.POSIX_FADV_WILLNEED}
    assert max(length for _, length, _ in calls) <= 128 * 1024
    covered = sorted(byte for start, length, _ in calls for byte in range(start, start + length, 4096))
    assert covered == [byte for start in wanted for byte in range(start, start + page, 4096)]
    del windows, batches
    gc.collect()
    wait_until(lambda: not own_threads())


def test_batches_do_not_wait_for_the_reading_ahead(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: gate.wait(20))
    loader = open_loader("ffcv", beton, image_size=16, seed=0, threads=1, augment=True, jit="off")
    try:
        with loader.batches(order.run_order(0, 0, 6, 12, 4, (), loader.windows(1))) as batches:
            assert len(list(batches)) == 6
        assert not gate.is_set()
    finally:
        gate.set()


def test_a_file_system_that_takes_no_advice_is_read_all_the_same(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    loader = open_loader("ffcv", beton, image_size=16, seed=0, threads=1, augment=True, jit="off")
    with loader.batches(order.run_order(0, 0, 6, 12, 4, (), loader.windows(1))) as batches:
        assert len(list(batches)) == 6


# ---- the settings


def test_windows_need_a_beton(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(tiny_config("mae").to_yaml())
    with pytest.raises(ConfigError, match=r"^data.shuffle = windowed: .* set data.loader=ffcv \(not synthetic\)"):
        load_config([tmp_path / "config.yaml"], ["data.shuffle=windowed"])
    with pytest.raises(UserError, match=r"data.shuffle = windowed: .* set data.loader=ffcv"):
        open_loader("synthetic", None, image_size=16, seed=0, threads=1, augment=True).windows(2)


def test_training_reads_the_order_that_is_asked_for(
    beton: Path, tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def read(_: train.Trainer, batches: Batches, *__: object) -> None:
        seen.append([batch.ids.tolist() for batch in batches])

    monkeypatch.setattr(train.Trainer, "_loop", read)
    monkeypatch.setattr(train.Trainer, "_finish", lambda *_: train.DONE)
    for shuffle in ("full", "windowed"):
        cfg = tiny_config("mae", data__loader="ffcv", data__train=beton, data__jit="off", data__shuffle=shuffle,
                          data__window_pages=1, train__global_batch=4, train__steps=6, tracking__uri="none")  # fmt: skip
        (tmp_path / shuffle).mkdir()
        train.Trainer(cfg, tmp_path / shuffle, World(), torch.device("cpu")).run(StopRequest())
        pages = check_seal(beton).table["ptr"] // check_seal(beton).page_size
        windows = Windows(pages.astype(np.int64), 1) if shuffle == "windowed" else None
        walk = order.run_order(cfg.train.seed, 0, 6, 12, 4, (), windows)
        assert seen[-1] == [ids.tolist() for _, ids in walk]
