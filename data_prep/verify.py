"""The seal of a beton: the quick check that every training run makes, and the full proof.

Beside ``X.beton`` stand ``X.beton.crc`` (crc32 of every sample's stored bytes, uint32 little-endian) and
``X.beton.seal.json``: sizes, the image set, the classes, the options, the library versions, and three sha256 that
together cover every byte of the beton: ``head`` (header, descriptors, metadata), ``data`` (up to the allocation table)
and ``table``. They are apart because the head is known last and stands first, so one digest over the file could not be
computed while it is written.
"""

import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data_prep.beton import CRC, JPG, PARTIAL, ROW, SEAL, TABLE, Array, beside, head_bytes, head_size
from data_prep.workers import ordered_map
from pipeline.config import UserError

SEAL_KIND: Final = "patchmill-seal"
SEAL_VERSION: Final = 1
FACTS: Final = {"size": int, "num_samples": int, "page_size": int, "num_kept": int, "image_set": str, "classes": list,
                "options": dict, "sha256": dict}  # fmt: skip
BLOCK: Final = 64  # samples that a worker checks at a time
SHOWN: Final = 5


@dataclass(frozen=True, eq=False)
class Seal:
    """A sealed beton whose tables have been read and found whole.

    ``rows`` [N] is FFCV's metadata (``beton.ROW``), ``table`` [N] its allocation table (``beton.TABLE``), ``crcs``
    uint32 [N]. ``data`` and ``facts`` are what the seal says besides. ``num_bytes`` is the file's size.
    """

    beton: Path
    num_samples: int
    classes: tuple[str, ...]
    image_set: str
    num_bytes: int
    page_size: int
    facts: dict[str, Any]
    rows: Array
    table: Array
    crcs: npt.NDArray[np.uint32]

    @property
    def options(self) -> dict[str, Any]:
        """The options that the beton was written with."""
        options: dict[str, Any] = self.facts["options"]
        return options

    @property
    def widths(self) -> npt.NDArray[np.uint16]:
        """The stored images' widths in pixels, [N]."""
        return self.rows["f0"]["width"]

    @property
    def heights(self) -> npt.NDArray[np.uint16]:
        """The stored images' heights in pixels, [N]."""
        return self.rows["f0"]["height"]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The labels, [N]: indices into ``classes``."""
        return self.rows["f1"]

    @property
    def max_width(self) -> int:
        """The largest stored width in pixels."""
        return int(self.widths.max())

    @property
    def max_height(self) -> int:
        """The largest stored height in pixels."""
        return int(self.heights.max())


@dataclass(frozen=True)
class VerifyReport:
    """A beton that was proved whole. ``num_jpeg`` of its samples are stored as JPEG, the others as pixels."""

    beton: Path
    num_samples: int
    num_classes: int
    image_set: str
    num_jpeg: int
    num_bytes: int
    seconds: float

    def __str__(self) -> str:
        """One line for people."""
        return (f"{self.beton} is whole: {self.num_samples} images of {self.num_classes} classes ({self.num_jpeg} as JPEG), "
                f"{self.num_bytes / 2**20:.1f} MiB, every hash and every image checked in {self.seconds:.1f} s")  # fmt: skip


def _digest(facts: dict[str, Any]) -> str:
    """The seal's own sha256, over everything else in it."""
    rest = {key: value for key, value in facts.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def seal_text(facts: dict[str, Any]) -> bytes:
    """The seal file that holds ``facts``."""
    facts = {"kind": SEAL_KIND, "version": SEAL_VERSION, **facts}
    return (json.dumps({**facts, "digest": _digest(facts)}, indent=1) + "\n").encode()


def _again(beton: Path) -> str:
    return f"delete it and make it again with: patchmill prep write MANIFEST {beton}"


def _broken(beton: Path, why: str) -> UserError:
    return UserError(f"{beton}: {why}; {_again(beton)}")


def load_seal(beton: Path) -> dict[str, Any]:
    """What a beton's seal says. Raises UserError when the beton or its seal is missing or the seal damaged."""
    path = beside(beton, SEAL)
    if not beton.is_file():
        if beside(beton, PARTIAL).exists():
            raise UserError(f"{beton}: is not finished; go on with: patchmill prep write MANIFEST {beton}")
        raise UserError(f"{beton}: there is no such file; make it with: patchmill prep write MANIFEST {beton}")
    if not path.is_file():
        raise UserError(f"{beton}: has no seal ({path.name}), so nothing proves it whole; {_again(beton)}")
    try:
        facts = json.loads(path.read_bytes())
        if facts["kind"] != SEAL_KIND or facts["digest"] != _digest(facts):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise _broken(beton, f"its seal {path.name} is damaged") from None
    if facts["version"] != SEAL_VERSION:
        raise UserError(f"{path}: has version {facts['version']}, this program reads {SEAL_VERSION}; {_again(beton)}")
    if not all(isinstance(facts.get(name), kind) for name, kind in FACTS.items()):
        raise _broken(beton, f"its seal {path.name} is damaged")
    return dict(facts)


def _load_crcs(beton: Path, facts: dict[str, Any]) -> npt.NDArray[np.uint32]:
    path = beside(beton, CRC)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _broken(beton, f"its checksums {path.name} cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != facts["sha256"].get("crc"):
        raise _broken(beton, f"its checksums {path.name} are damaged")
    if len(data) != 4 * facts["num_samples"]:
        raise _broken(beton, f"its seal has {facts['num_samples']} samples and {path.name} has {len(data) / 4:g}")
    return np.frombuffer(data, "<u4")


def _load_tables(beton: Path, facts: dict[str, Any]) -> tuple[Array, Array]:
    count = facts["num_samples"]
    with open(beton, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != facts["size"]:
            raise _broken(beton, f"has {size} bytes instead of {facts['size']}")
        head = file.read(head_size(count))
        file.seek(max(0, size - count * TABLE.itemsize))
        table = file.read()
    for name, data in (("head", head), ("table", table)):
        if hashlib.sha256(data).hexdigest() != facts["sha256"].get(name):
            raise _broken(beton, f"its {'header or metadata' if name == 'head' else 'allocation table'} is damaged")
    page_size = facts["page_size"]
    if not 0 < page_size < 2**32 or not head.startswith(head_bytes(count, page_size, size - len(table), b"")):
        raise _broken(beton, "its header is not the one that its seal describes")
    return np.frombuffer(head, ROW, count, len(head) - count * ROW.itemsize), np.frombuffer(table, TABLE)


def check_seal(beton: Path, *, num_sampled: int = 64) -> Seal:
    """Check a beton's size, tables, checksum file and ``num_sampled`` evenly spread samples, in a moment.

    The same samples are read each time, so that the answer repeats. Damage to the others is found by ``verify`` only.
    Raises UserError, naming the file and the command to run, for whatever is missing or does not agree.
    """
    facts = load_seal(beton)
    crcs = _load_crcs(beton, facts)
    rows, table = _load_tables(beton, facts)
    count = facts["num_samples"]
    with open(beton, "rb") as file:
        for sample in np.unique(np.linspace(0, count - 1, min(num_sampled, count)).astype(int)):
            file.seek(int(table["ptr"][sample]))
            if zlib.crc32(file.read(int(table["size"][sample]))) != crcs[sample]:
                raise _broken(beton, f"sample {sample}: its bytes are damaged")
    return Seal(
        beton=beton,
        num_samples=count,
        classes=tuple(facts["classes"]),
        image_set=facts["image_set"],
        num_bytes=facts["size"],
        page_size=facts["page_size"],
        facts=facts,
        rows=rows,
        table=table,
        crcs=crcs,
    )


def import_ffcv() -> None:
    """Import ffcv and leave torch's thread count as it was; ffcv sets it to 1."""
    import torch

    threads = torch.get_num_threads()
    import ffcv  # noqa: F401

    torch.set_num_threads(threads)


def decodes(data: bytes, width: int, height: int) -> bool:
    """Whether FFCV's own decoder takes the JPEG ``data`` for an image of this size; ``import_ffcv`` comes before.

    The JPEG's header is asked for its size: the decoder garbles an image of another size and reports no error.
    """
    from ffcv.libffcv import imdecode
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.size != (width, height):
                return False
    except OSError:
        return False
    pixels = np.empty(height * width * 3, np.uint8)
    source = np.frombuffer(data, np.uint8)
    return bool(imdecode(source, pixels, height, width, height, width, 0, 0, 1, 1, False, False) == 0)


def _check_samples(seal: Seal, start: int) -> list[tuple[int, str]]:
    """(sample, what is wrong) in the block of samples from ``start``."""
    file = np.memmap(seal.beton, np.uint8, "r")
    wrong = []
    for sample in range(start, min(start + BLOCK, seal.num_samples)):
        entry, image = seal.table[sample], seal.rows["f0"][sample]
        position, size = int(entry["ptr"]), int(entry["size"])
        data = file[position : position + size].tobytes()
        if zlib.crc32(data) != seal.crcs[sample]:
            wrong.append((sample, "its bytes are damaged"))
        elif image["mode"] == JPG and not decodes(data, int(image["width"]), int(image["height"])):
            wrong.append((sample, "FFCV cannot decode it at its size"))
        elif image["mode"] != JPG and size != int(image["width"]) * int(image["height"]) * 3:
            wrong.append((sample, "its bytes are not width x height x 3"))
    return wrong


def _check_layout(seal: Seal) -> list[str]:
    """What is wrong with where the samples lie, and with how FFCV's own reader sees the file."""
    from ffcv.reader import Reader

    begin = seal.table["ptr"].astype(np.int64)
    end = begin + seal.table["size"].astype(np.int64)
    outside = (begin < head_size(seal.num_samples)) | (end > seal.num_bytes - seal.table.nbytes)
    problems = {
        "lies outside the data": outside,
        "overlaps the sample before it": np.r_[False, begin[1:] < end[:-1]],
        "crosses a page border": begin // seal.page_size != (end - 1) // seal.page_size,
        "has another number in the allocation table": seal.table["sample_id"] != np.arange(seal.num_samples),
        "has a metadata row that points elsewhere": seal.rows["f0"]["data_ptr"] != seal.table["ptr"],
        "has a label that is no class": (seal.labels < 0) | (seal.labels >= len(seal.classes)),
    }
    reader = Reader(str(seal.beton))
    same = np.array_equal(reader.metadata["f1"], seal.labels) and np.array_equal(reader.alloc_table, seal.table)
    found = [f"{_listed(np.flatnonzero(bad))}: {what}" for what, bad in problems.items() if bad.any()]
    return found + ([] if same else ["FFCV's reader does not see the sealed samples"])


def _listed(samples: Sequence[int] | npt.NDArray[np.intp]) -> str:
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return f"sample {', '.join(str(sample) for sample in samples[:SHOWN])}{more}"


def _data_digest(seal: Seal) -> str:
    digest = hashlib.sha256()
    with open(seal.beton, "rb") as file:
        file.seek(head_size(seal.num_samples))
        left = seal.num_bytes - seal.table.nbytes - file.tell()
        while left and (data := file.read(min(left, 2**20))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def verify(beton: Path, *, workers: int, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Prove a beton whole: every byte by sha256, every sample by crc32 and FFCV's decoder, the layout, FFCV's reader.

    ``progress`` gets (samples done, samples). Raises UserError that names what is wrong and the first samples it hits.
    """
    started = time.monotonic()
    seal = check_seal(beton, num_sampled=0)
    import_ffcv()
    problems = _check_layout(seal)
    wrong: dict[str, list[int]] = {}
    with ThreadPoolExecutor(1) as pool:  # sha256 leaves the interpreter's lock while it computes
        starts = range(0, seal.num_samples, BLOCK)
        with closing(ordered_map(partial(_check_samples, seal), starts, workers)) as results:
            digest = pool.submit(_data_digest, seal)
            for start, found in zip(starts, results, strict=True):
                for sample, what in found:
                    wrong.setdefault(what, []).append(sample)
                if progress is not None:
                    progress(min(start + BLOCK, seal.num_samples), seal.num_samples)
        problems += [f"{_listed(samples)}: {what}" for what, samples in wrong.items()]
        if digest.result() != seal.facts["sha256"]["data"] and not problems:
            problems.append("bytes between the samples are damaged")
    if problems:
        raise UserError(f"{beton}: is broken: {'; '.join(problems)}; {_again(beton)}")
    return VerifyReport(
        beton=beton,
        num_samples=seal.num_samples,
        num_classes=len(seal.classes),
        image_set=seal.image_set,
        num_jpeg=int((seal.rows["f0"]["mode"] == JPG).sum()),
        num_bytes=seal.num_bytes,
        seconds=time.monotonic() - started,
    )
