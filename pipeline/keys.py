"""The counter-based generator: every random choice about a sample is a pure function of integers.

``sample_key(seed, epoch, sample_id)`` names a sample's visit; ``stream(key, tag, counter)`` is the
counter-th 64-bit integer that this visit owns under a tag. Nothing holds state, so a choice is the same in
any loader, at any world size, before and after a restart. The hash is splitmix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014). This is the numpy half; its torch twin is
``pipeline.segments.stream`` and a test holds the two equal.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

GAMMA: Final = 0x9E3779B97F4A7C15
MIX_1: Final = 0xBF58476D1CE4E5B9
MIX_2: Final = 0x94D049BB133111EB

# The tags are part of the contract: changing a number changes every run.
TAGS: Final[dict[str, int]] = {
    "crop": 1, "flip": 2, "mask": 3, "segment": 4, "order": 5, "drop_path": 6, "init": 7, "blob": 8, "partition": 9,
    "shuffle": 10, "prefix": 11, "token_drop": 12, "selection": 13,
    "page": 14, "window": 15, "mix": 16, "augment": 17,
}  # fmt: skip

_U64 = np.uint64


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser; uint64 arithmetic wraps around."""
    x = (x ^ (x >> _U64(30))) * _U64(MIX_1)
    x = (x ^ (x >> _U64(27))) * _U64(MIX_2)
    return x ^ (x >> _U64(31))


def _as_u64(x: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    return np.atleast_1d(np.asarray(x, np.int64)).view(_U64)


def _absorb(state: npt.NDArray[np.uint64], value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return _mix(state + (value + _U64(1)) * _U64(GAMMA))


def hash_integers(*values: npt.ArrayLike) -> Int64:
    """Hash integers (scalars or arrays that broadcast) to int64, in the order given. Shape: the broadcast, at least [1]."""
    state = np.zeros(1, _U64)
    for value in values:
        state = _absorb(state, _as_u64(value))
    return state.view(np.int64)


def sample_key(seed: int, epoch: npt.ArrayLike, sample_ids: npt.ArrayLike) -> Int64:
    """The key of each sample's visit: int64 [B] from the seed, the epoch and the sample ids [B]."""
    return hash_integers(seed, epoch, sample_ids)


def stream(keys: npt.ArrayLike, tag: str, counter: npt.ArrayLike = 0) -> Int64:
    """The ``counter``-th integer of each key under ``tag``; keys and counter broadcast. All 64 bits are uniform."""
    tagged = _absorb(_as_u64(keys), np.full(1, TAGS[tag], _U64))
    return _absorb(tagged, _as_u64(counter)).view(np.int64)


def uniform(keys: npt.ArrayLike, tag: str, counter: npt.ArrayLike = 0) -> npt.NDArray[np.float64]:
    """Uniform float64 in [0, 1): the upper 53 bits of ``stream``, exact on every machine."""
    return (stream(keys, tag, counter).view(_U64) >> _U64(11)).astype(np.float64) * 2.0**-53


def text_key(text: str) -> int:
    """A 63-bit non-negative integer for a name: the FNV-1a hash of its UTF-8 bytes, finished by splitmix64."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return int(_mix(np.array([value], _U64))[0] >> _U64(1))
