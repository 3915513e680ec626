"""The counter-based generator: reference values, both halves equal, and the statistics that draws rely on."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import keys, segments

MASK = (1 << 64) - 1
INT64 = st.integers(-(2**63), 2**63 - 1)
SOME = settings(max_examples=60, deadline=None)


def mix(x: int) -> int:
    """splitmix64's finaliser in plain integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def absorb(state: int, value: int) -> int:
    return mix((state + ((value & MASK) + 1) * 0x9E3779B97F4A7C15) & MASK)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def plain_hash(*values: int) -> int:
    state = 0
    for value in values:
        state = absorb(state, value)
    return signed(state)


def test_published_splitmix64_sequence() -> None:
    # The reference implementation's first outputs from the states 0 and 1234567.
    assert int(keys.hash_integers(0)[0]) & MASK == 0xE220A8397B1DCDAF
    assert keys._absorb(np.array([1234567], np.uint64), np.array([0, 1, 2], np.uint64)).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423]  # fmt: skip


@SOME
@given(st.lists(INT64, min_size=1, max_size=4))
def test_hash_equals_plain_integers(values: list[int]) -> None:
    assert int(keys.hash_integers(*values)[0]) == plain_hash(*values)


@SOME
@given(INT64, st.sampled_from(sorted(keys.TAGS)), st.integers(0, 2**40))
def test_stream_equals_plain_integers_in_both_halves(key: int, tag: str, counter: int) -> None:
    expected = signed(absorb(absorb(key & MASK, keys.TAGS[tag]), counter))
    assert int(keys.stream(key, tag, counter)[0]) == expected
    assert int(segments.stream(torch.tensor([key]), tag, counter)[0]) == expected


@pytest.mark.parametrize("tag", sorted(keys.TAGS))
def test_numpy_and_torch_are_equal_on_a_million_keys(tag: str) -> None:
    some = keys.hash_integers(11, np.arange(1_000_000))
    counter = np.arange(1_000_000) % 4099
    expected = keys.stream(some, tag, counter)
    assert np.array_equal(expected, segments.stream(torch.from_numpy(some), tag, torch.from_numpy(counter)).numpy())
    assert np.array_equal(keys.stream(some[:1000], tag), segments.stream(torch.from_numpy(some[:1000]), tag).numpy())


def test_tags_are_a_contract() -> None:
    assert {"crop", "flip", "mask", "segment", "order", "drop_path"} <= keys.TAGS.keys()
    assert len(set(keys.TAGS.values())) == len(keys.TAGS)
    # A changed constant or tag changes every run that was ever started.
    pinned = {tag: int(keys.stream(keys.sample_key(0, 0, 0), tag)[0]) for tag in ("crop", "mask", "order")}
    expected = {tag: signed(absorb(absorb(plain_hash(0, 0, 0) & MASK, number), 0)) for tag, number in
                (("crop", 1), ("mask", 3), ("order", 5))}  # fmt: skip
    assert pinned == expected


def test_a_key_depends_on_seed_epoch_and_sample_in_their_places() -> None:
    triples = list(itertools.product(range(6), repeat=3))
    found = {int(keys.sample_key(*triple)[0]) for triple in triples}
    assert len(found) == len(triples)


def test_sample_keys_broadcast_and_do_not_depend_on_batch_mates() -> None:
    ids = np.array([5, 1, 99, 1], np.int64)
    batch = keys.sample_key(3, 2, ids)
    assert batch.dtype == np.int64 and batch.shape == (4,)
    assert batch.tolist() == [plain_hash(3, 2, int(sample)) for sample in ids]


def test_uniform_is_the_upper_53_bits() -> None:
    some = keys.hash_integers(1, np.arange(1000))
    values = keys.uniform(some, "crop", 3)
    raw = [int(x) & MASK for x in keys.stream(some, "crop", 3)]
    assert values.tolist() == [(x >> 11) / 2**53 for x in raw]
    assert values.min() >= 0 and values.max() < 1


@pytest.mark.parametrize("tag", sorted(keys.TAGS))
def test_uniform_over_keys_and_over_counters(tag: str) -> None:
    over_keys = keys.uniform(keys.sample_key(0, 0, np.arange(100_000)), tag)
    over_counters = keys.uniform(keys.sample_key(0, 0, 0), tag, np.arange(100_000))
    for values in (over_keys, over_counters):
        counts = np.histogram(values, bins=100, range=(0, 1))[0]
        assert ((counts - 1000.0) ** 2 / 1000).sum() < 180  # chi square with 99 degrees of freedom: p < 1e-6 beyond
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.015


def test_every_output_bit_is_fair() -> None:
    words = keys.stream(keys.sample_key(5, 1, np.arange(40_000)), "mask").view(np.uint64)
    shares = [(words >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(64)]
    assert max(abs(share - 0.5) for share in shares) < 0.0125  # five standard deviations


def test_tags_counters_epochs_and_seeds_are_uncorrelated() -> None:
    ids = np.arange(50_000)
    rows = [keys.uniform(keys.sample_key(0, 0, ids), tag, counter) for tag in keys.TAGS for counter in (0, 1)]
    rows += [keys.uniform(keys.sample_key(seed, epoch, ids), "crop") for seed, epoch in ((0, 1), (1, 0), (1, 1))]
    correlation = np.corrcoef(np.stack(rows)) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.025


def test_text_key_is_fnv_finished_by_splitmix() -> None:
    value = 0xCBF29CE484222325
    for byte in b"encoder.cls_token":
        value = ((value ^ byte) * 0x100000001B3) & MASK
    assert keys.text_key("encoder.cls_token") == mix(value) >> 1
    assert len({keys.text_key(f"blocks.{i}.attn.qkv.weight") for i in range(1000)}) == 1000
