"""Every kind of damage to a beton: who finds it, how soon, and that nothing hangs or trains on it."""

import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from image_files import encoded, pixels, plain_set
from test_data import own_threads

from data_prep.beton import CRC, MIN_PAGE, ROW, SEAL, TABLE, beside, head_size
from data_prep.scan import scan
from data_prep.stage import stage_in
from data_prep.verify import check_seal, seal_text, verify
from data_prep.write import write
from pipeline.config import UserError
from pipeline.data import open_loader
from pipeline.stop import StopRequest
from pipeline.train import train

COUNT = 130  # more than the samples that are read at the start
BAD = 7  # a sample that is not read there
FIRST_ROW = head_size(0)


def edit(path: Path, position: int, new: bytes | None = None) -> None:
    """Put ``new`` at a position (from the end if negative), by default the byte that is there with one bit turned."""
    with open(path, "r+b") as file:
        at = file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]) if new is None else new)


def cut(position: int, suffix: str = "") -> Callable[[Path], None]:
    """Cut the beton, or what stands beside it, to a length (from the end if negative)."""
    return lambda beton: os.truncate(path := beside(beton, suffix), position % path.stat().st_size)


def flip(position: int, suffix: str = "") -> Callable[[Path], None]:
    return lambda beton: edit(beside(beton, suffix), position)


def remove(suffix: str) -> Callable[[Path], None]:
    return lambda beton: beside(beton, suffix).unlink()


def take(*suffixes: str, name: str = "y.beton") -> Callable[[Path], None]:
    """Put another set's files in the place of these."""

    def spoil(beton: Path) -> None:
        for suffix in suffixes:
            shutil.copyfile(beside(beton.with_name(name), suffix), beside(beton, suffix))

    return spoil


def forge(*, digest: bool, **change: Any) -> Callable[[Path], None]:
    """Edit the seal; with ``digest`` its own sha256 is made to agree."""

    def spoil(beton: Path) -> None:
        facts = json.loads(beside(beton, SEAL).read_bytes()) | change
        facts = {key: value for key, value in facts.items() if value is not None}
        beside(beton, SEAL).write_bytes(seal_text(facts) if digest else json.dumps(facts).encode())

    return spoil


def reseal(beton: Path) -> None:
    """Make checksums and seal agree with what the beton holds now, as if it had been written so."""
    data = beton.read_bytes()
    end = len(data) - COUNT * TABLE.itemsize
    places = np.frombuffer(data, TABLE, offset=end)
    crcs = np.array([zlib.crc32(data[p : p + s]) for p, s in places[["ptr", "size"]].tolist()], "<u4").tobytes()
    parts = {"head": data[: head_size(COUNT)], "data": data[head_size(COUNT) : end], "table": data[end:], "crc": crcs}
    beside(beton, CRC).write_bytes(crcs)
    forge(digest=True, sha256={name: hashlib.sha256(part).hexdigest() for name, part in parts.items()})(beton)


def resealed(spoil: Callable[[Path, int, int], None]) -> Callable[[Path], None]:
    """``spoil(beton, position, size)`` of the bad sample, and a seal that agrees: nothing but its meaning is wrong."""

    def spoil_and_seal(beton: Path) -> None:
        place = check_seal(beton).table[BAD]
        spoil(beton, int(place["ptr"]), int(place["size"]))
        reseal(beton)

    return spoil_and_seal


def in_table(field: str, value: Callable[[int, int], int]) -> Callable[[Path], None]:
    at = (BAD - COUNT) * TABLE.itemsize + TABLE.fields[field][1]
    return resealed(lambda beton, start, size: edit(beton, at, value(start, size).to_bytes(8, "little")))


def in_row(offset: int, new: bytes) -> Callable[[Path], None]:
    return resealed(lambda beton, start, size: edit(beton, FIRST_ROW + BAD * ROW.itemsize + offset, new))


def other_image(beton: Path, start: int, size: int) -> None:
    image = encoded(pixels(1, 16, 16), "JPEG", quality=30)
    assert len(image) <= size
    edit(beton, start, image.ljust(size, b"\0"))


@dataclass(frozen=True)
class Damage:
    """``found``: by check (whatever opens the beton, at once), by the loader that opens it, by copy (staging), by decode (the
    batch that holds it), or by nobody but verify, which finds everything. ``words``: what verify says."""

    name: str
    spoil: Callable[[Path], None]
    found: Literal["check", "open", "copy", "decode", "verify"]
    words: str


HEAD, SIZE, TABLE_WORDS = "header or metadata is damaged", "bytes instead of", "allocation table is damaged"
SEAL_WORDS, CRC_WORDS, UNDECODABLE = (
    "seal.json is damaged",
    "x.beton.crc are damaged",
    f"sample {BAD}: FFCV cannot decode",
)

MATRIX = [
    Damage("byte in the header", flip(5), "check", HEAD),
    Damage("byte in the header's version", flip(0), "check", HEAD),
    Damage("byte in the first field descriptor", flip(30), "check", HEAD),
    Damage("byte in the second field descriptor", flip(FIRST_ROW - 1), "check", HEAD),
    Damage("byte in the first metadata", flip(FIRST_ROW), "check", HEAD),
    Damage("byte in the last metadata", flip(head_size(COUNT) - 1), "check", HEAD),
    Damage("byte in the table's start", flip(-24 * COUNT), "check", TABLE_WORDS),
    Damage("byte in the table's end", flip(-1), "check", TABLE_WORDS),
    Damage("byte in the first sample", flip(MIN_PAGE), "check", "sample 0: its bytes are damaged"),
    Damage("byte in a sample", lambda b: edit(b, int(check_seal(b).table["ptr"][BAD]) + 300), "copy",
           f"sample {BAD}: its bytes are damaged"),
    Damage("byte in the padding", flip(MIN_PAGE - 1), "copy", "bytes between the samples are damaged"),
    Damage("cut in the header", cut(20), "check", SIZE),
    Damage("cut in the metadata", cut(FIRST_ROW + 1000), "check", SIZE),
    Damage("cut in the first sample", cut(MIN_PAGE + 9), "check", SIZE),
    Damage("cut in the middle of a page", lambda b: os.truncate(b, int(check_seal(b).table["ptr"][COUNT // 2])), "check", SIZE),
    Damage("cut in the table", cut(-12 * COUNT), "check", SIZE),
    Damage("one byte short", cut(-1), "check", SIZE),
    Damage("one byte more", lambda b: b.write_bytes(b.read_bytes() + b"\0"), "check", SIZE),
    Damage("empty", cut(0), "check", "has 0 bytes instead of"),
    Damage("gone", remove(""), "check", "there is no such file"),
    Damage("another beton", take(""), "check", SIZE),
    Damage("another beton of the same size", take("", name="twin.beton"), "check", "sample 0"),
    Damage("seal of another", take(SEAL), "check", CRC_WORDS),
    Damage("seal and checksums of another", take(SEAL, CRC), "check", SIZE),
    Damage("seal and checksums of one of the same size", take(SEAL, CRC, name="twin.beton"), "check", "sample 0"),
    Damage("seal edited", forge(digest=False, image_set="0" * 64), "check", SEAL_WORDS),
    Damage("seal's classes edited", forge(digest=False, classes=["a", "b", "c"]), "check", SEAL_WORDS),
    Damage("seal forged: samples", forge(digest=True, num_samples=COUNT + 1), "check", "131 samples and x.beton.crc has 130"),
    Damage("seal forged: more samples than bytes", forge(digest=True, num_samples=10**15), "check", "x.beton.crc has 130"),
    Damage("seal forged: size", forge(digest=True, size=5), "check", "bytes instead of 5"),
    Damage("seal forged: page size", forge(digest=True, page_size=2 * MIN_PAGE), "check", "not the one that its seal describes"),
    Damage("seal forged: huge page size", forge(digest=True, page_size=2**32 + MIN_PAGE), "check", "not the one that its seal"),
    Damage("seal forged: digests", forge(digest=True, sha256={}), "check", CRC_WORDS),
    Damage("seal forged: nothing for a key", forge(digest=True, size=None), "check", SEAL_WORDS),
    Damage("seal forged: text for a number", forge(digest=True, num_samples="130"), "check", SEAL_WORDS),
    Damage("seal forged: a class less", forge(digest=True, classes=["class0", "class1"]), "verify", "has a label that is no class"),
    Damage("seal of an older version", forge(digest=True, version=0), "check", "has version 0, this program reads 1"),
    Damage("seal of a newer version", forge(digest=True, version=2), "check", "has version 2, this program reads 1"),
    Damage("seal cut", cut(300, SEAL), "check", SEAL_WORDS),
    Damage("seal empty", cut(0, SEAL), "check", SEAL_WORDS),
    Damage("seal is a list", lambda b: beside(b, SEAL).write_text("[]"), "check", SEAL_WORDS),
    Damage("seal gone", remove(SEAL), "check", "has no seal"),
    Damage("checksums cut", cut(-1, CRC), "check", CRC_WORDS),
    Damage("checksums empty", cut(0, CRC), "check", CRC_WORDS),
    Damage("byte in the checksums", flip(77, CRC), "check", CRC_WORDS),
    Damage("checksums of another", take(CRC), "check", CRC_WORDS),
    Damage("checksums gone", remove(CRC), "check", "x.beton.crc cannot be read"),
    Damage("sealed so: header", resealed(lambda b, start, size: edit(b, 4, bytes(4))), "check", "not the one that its seal"),
    Damage("sealed so: field's kind", resealed(lambda b, start, size: edit(b, 24)), "check", "not the one that its seal"),
    Damage("sealed so: zeros for an image", resealed(lambda b, start, size: edit(b, start, bytes(size))), "decode", UNDECODABLE),
    Damage("sealed so: zeros from the middle of an image",
           resealed(lambda b, start, size: edit(b, start + size // 2, bytes(size - size // 2))), "decode", UNDECODABLE),
    Damage("sealed so: an image cut", in_table("size", lambda start, size: size // 2), "decode", UNDECODABLE),
    Damage("sealed so: an image of no bytes", in_table("size", lambda start, size: 0), "decode", UNDECODABLE),
    Damage("sealed so: text for an image",
           resealed(lambda b, start, size: edit(b, start, b"text".ljust(size))), "decode", UNDECODABLE),
    Damage("sealed so: an image of another size", resealed(other_image), "verify", UNDECODABLE),
    Damage("sealed so: an image as pixels", in_row(0, b"\1"), "open", f"sample {BAD}: its bytes are not width x height x 3"),
    Damage("sealed so: a label that is no class", in_row(16, b"\3"), "verify", f"sample {BAD}: has a label that is no class"),
    Damage("sealed so: a row that points elsewhere", in_row(8, b"\1"), "verify", f"sample {BAD}: has a metadata row that points"),
    Damage("sealed so: a number twice", in_table("sample_id", lambda start, size: 0), "verify", f"sample {BAD}: has another"),
    Damage("sealed so: a sample before the data", in_table("ptr", lambda start, size: 0), "verify", f"sample {BAD}: lies outside"),
    Damage("sealed so: a sample behind the data", in_table("size", lambda start, size: 2**40), "decode",
           f"sample {BAD}: lies outside"),
]  # fmt: skip


def damaged(*found: str) -> pytest.MarkDecorator:
    chosen = [damage for damage in MATRIX if not found or damage.found in found]
    return pytest.mark.parametrize("damage", chosen, ids=[damage.name for damage in chosen])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x.beton; y.beton of other images; twin.beton, whose head and table are those of x."""
    folder = tmp_path_factory.mktemp("sets")
    for name, width in (("x", 48), ("y", 40)):
        scan(plain_set(folder / name, COUNT, width), folder / f"{name}.jsonl", workers=0)
        write(folder / f"{name}.jsonl", folder / f"{name}.beton", workers=0)
    for suffix in ("", CRC, SEAL):
        shutil.copyfile(beside(folder / "x.beton", suffix), beside(folder / "twin.beton", suffix))
    for place in check_seal(folder / "twin.beton").table:
        edit(folder / "twin.beton", int(place["ptr"]) + 300)
    reseal(folder / "twin.beton")
    return folder


@pytest.fixture
def beton(sets: Path, tmp_path: Path) -> Path:
    for path in sets.glob("*.beton*"):
        if path.name.startswith("x"):
            shutil.copyfile(path, tmp_path / path.name)
        else:
            os.link(path, tmp_path / path.name)
    return tmp_path / "x.beton"


def open_beton(beton: Path, threads: int = 2):
    return open_loader("ffcv", beton, image_size=16, seed=0, threads=threads, augment=True, jit="off")


def test_the_samples_that_are_read_at_the_start_leave_the_bad_one_out():
    assert BAD not in np.linspace(0, COUNT - 1, 64).astype(int)


def test_nothing_is_found_where_nothing_is_wrong(beton):
    for name in ("x.beton", "y.beton"):
        check_seal(beton.with_name(name))
        verify(beton.with_name(name), workers=0)
    reseal(beton)
    assert verify(stage_in(beton, beton.parent / "fast"), workers=0).num_samples == COUNT
    assert len(list(open_beton(beton).batches(iter([(0, np.arange(COUNT))])))) == 1


@damaged()
def test_verify_finds(beton, damage):
    damage.spoil(beton)
    with pytest.raises(UserError, match=re.escape(damage.words)) as error:
        verify(beton, workers=0)
    assert str(beton) in str(error.value) and "\n" not in str(error.value)
    assert f"patchmill prep write MANIFEST {beton}" in str(error.value)


@damaged("check")
def test_nothing_opens(beton, damage):
    damage.spoil(beton)
    for use in (check_seal, open_beton):
        started = time.monotonic()
        with pytest.raises(UserError, match=f"{re.escape(str(beton))}.*patchmill prep write MANIFEST"):
            use(beton)
        assert time.monotonic() - started < 1


@damaged("open")
def test_the_loader_does_not_open(beton, damage):
    damage.spoil(beton)
    check_seal(beton)
    with pytest.raises(UserError, match=f"{re.escape(str(beton))}: {damage.words}.*patchmill prep verify"):
        open_beton(beton)


@damaged("check", "copy")
def test_staging_refuses(beton, damage):
    damage.spoil(beton)
    with pytest.raises(UserError, match=re.escape(str(beton))):
        stage_in(beton, beton.parent / "fast")
    assert not list((beton.parent / "fast").glob("*.beton"))


@damaged("decode")
@pytest.mark.timeout(30)
def test_the_batch_that_holds_it_raises(beton, damage):
    damage.spoil(beton)
    batches = open_beton(beton).batches(iter([(0, np.arange(20, 40)), (0, np.arange(20)), (0, np.arange(20))]))
    assert next(batches).ids[0] == 20
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{re.escape(str(beton))}: sample {BAD} .*"):
        next(batches)
    assert time.monotonic() - started < 5 and not own_threads()


@damaged("copy", "verify")
def test_the_rest_is_for_verify(beton, damage):
    """The table above says who finds what: these must not stand there as found sooner."""
    damage.spoil(beton)
    open_beton(beton)


@pytest.mark.timeout(60)
def test_training_ends_at_a_sample_that_cannot_be_decoded(beton, tmp_path, tiny_config):
    next(damage for damage in MATRIX if damage.name == "sealed so: zeros for an image").spoil(beton)
    cfg = tiny_config("mae", data__loader="ffcv", data__train=beton, data__jit="off", run__dir=tmp_path / "run",
                      train__global_batch=10, tracking__uri="none")  # fmt: skip
    words = f"{beton}: sample {BAD} cannot be decoded"
    with pytest.raises(UserError, match=re.escape(words)):
        train(cfg, StopRequest())
    assert words in json.loads((tmp_path / "run" / "why_stopped.json").read_text())["reason"] and not own_threads()
