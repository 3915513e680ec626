"""CIFAR-10 and CIFAR-100 from their archives of Python pickles, which are read without running what they name."""

import pickle
import tarfile
from pathlib import Path
from typing import IO, Any, ClassVar, Final, NoReturn

import numpy as np
import numpy.typing as npt

from data_prep.images import ImageError
from data_prep.sources import Entries, Entry, Index, Progress, number_classes
from pipeline.config import UserError

MAX_MEMBER: Final = 2**28
SIDE: Final = 32
TRAIN: Final = (*(f"data_batch_{k}" for k in range(1, 6)), "train")
TEST: Final = ("test_batch", "test")
NAMES: Final = {"batches.meta": b"label_names", "meta": b"fine_label_names"}


class _DType:
    """Stands in for numpy's dtype in a pickle; all that counts is its name."""

    def __init__(self, name: bytes | str = b"", *rest: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands in for numpy's ndarray: keeps what the pickle says, (version, shape, dtype, fortran order, bytes)."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def images(self) -> npt.NDArray[np.uint8]:
        """The pixels, uint8 [n, 3, 32, 32]. Raises ValueError for any other array."""
        _, shape, dtype, fortran, data = self.state
        if dtype.name != "u1" or fortran or len(shape) != 2 or shape[1] != 3 * SIDE**2:
            raise ValueError(f"an array of {dtype.name} {shape} instead of u1 [n, 3072]")
        return np.frombuffer(data, np.uint8).reshape(shape[0], 3, SIDE, SIDE)


class _Unpickler(pickle.Unpickler):
    """Knows three names, those of a numpy array, and has stand-ins for them that run nothing."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return lambda *arguments: _Array()
            case "numpy", "ndarray":
                return _Array
            case "numpy", "dtype":
                return _DType
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in CIFAR")


def _load(file: IO[bytes]) -> dict[bytes, Any]:
    loaded = _Unpickler(file, encoding="bytes").load()
    if not isinstance(loaded, dict):
        raise ValueError("is no dictionary")
    return loaded


def _read_members(archive: Path) -> dict[str, dict[bytes, Any]]:
    def damaged(why: object) -> NoReturn:
        raise UserError(f"{archive}: {why}") from None

    found: dict[str, dict[bytes, Any]] = {}
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if not member.isreg() or name not in (*TRAIN, *TEST, *NAMES):
                    continue
                if member.size > MAX_MEMBER:
                    damaged(f"{name} has {member.size} bytes, more than any of CIFAR")
                file = tar.extractfile(member)
                assert file is not None  # it is a regular file
                try:
                    found[name] = _load(file)
                except Exception as error:  # a damaged pickle raises anything
                    damaged(f"{name} is not CIFAR's or damaged: {error}")
    except OSError as error:
        damaged(f"cannot be read: {error.strerror or error}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        damaged(f"is no archive, damaged or cut short: {error}")
    return found


class CIFAR:
    """``cifar-10-python.tar.gz`` or ``cifar-100-python.tar.gz`` (fine labels), held in memory; ``split`` train or test.

    An image has no file in there: its bytes are a PPM of its pixels. The order is the archive's own.
    """

    kind: ClassVar[str] = "cifar"
    counted_in: ClassVar[str] = "batch"
    any_order: ClassVar[bool] = True

    def __init__(self, path: Path, split: str | None = None) -> None:
        """``split`` is needed for the index only. Raises UserError for an archive that is not CIFAR's or damaged."""
        self.root, self._split = path.resolve(), split
        found = _read_members(path)
        self._names = next(([str(n, "latin1") for n in found[m][key]] for m, key in NAMES.items() if m in found), None)
        self._labels: dict[str, list[int]] = {}
        self._images: dict[str, npt.NDArray[np.uint8]] = {}
        for name in (name for name in (*TRAIN, *TEST) if name in found):
            batch = found[name]
            try:
                labels = batch[b"fine_labels"] if b"fine_labels" in batch else batch[b"labels"]
                self._labels[name], self._images[name] = [int(label) for label in labels], batch[b"data"].images()
                if len(labels) != len(self._images[name]) or min(self._labels[name]) < 0:
                    raise ValueError(f"{len(labels)} labels for {len(self._images[name])} images")
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: {name} is not CIFAR's or damaged: {error}") from None
        if not self._images:
            raise UserError(f"{path}: holds no batch of CIFAR-10 or CIFAR-100 (their python versions)")

    def index(self, classes: tuple[str, ...] | None = None, progress: Progress | None = None) -> Index:
        """As in ``Source``."""
        wanted = {"train": TRAIN, "test": TEST}.get(self._split or "", ())
        batches = [name for name in wanted if name in self._images]
        if not batches:
            raise UserError(
                f"{self.root}: holds {', '.join(self._images)}; say which with --split train or --split test"
            )
        entries = Entries()
        for done, name in enumerate(batches, 1):
            for row, label in enumerate(self._labels[name]):
                entries.append(Entry(f"{name}/{row:05}", label, row))
            if progress is not None:
                progress(done, len(batches))
        return Index(number_classes(max(entries.labels), self._names, classes, self.root), entries, [])

    def read(self, path: str, position: int, size: int = -1) -> bytes:
        """As in ``Source``."""
        images = self._images.get(path.partition("/")[0], np.empty((0, 3, SIDE, SIDE), np.uint8))
        if position >= len(images):
            raise ImageError("cannot be read: the archive has no such image")
        pixels: bytes = images[position].transpose(1, 2, 0).tobytes()
        return b"P6 32 32 255\n" + pixels
