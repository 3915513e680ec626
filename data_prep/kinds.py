"""Which kind of source a path is, and how a manifest leads back to it."""

import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Final

from data_prep.archives import VAL_NAME, ImageTar, ValidationTar, WebDataset, members, packing
from data_prep.cifar import CIFAR
from data_prep.shards import Parquet
from data_prep.sources import SPLITS, ImageFolder, Source
from pipeline.config import UserError

SHARDED: Final[dict[str, type[Parquet] | type[WebDataset]]] = {".parquet": Parquet, ".tar": WebDataset}
BY_KIND: Final[dict[str, Callable[[Path], Source]]] = {
    kind.kind: kind for kind in (ImageFolder, ImageTar, WebDataset, Parquet, CIFAR)
}


def open_source(path: Path, *, devkit: Path | None = None, split: str | None = None) -> Source:
    """The source at ``path``: a folder of class folders, a tar, a parquet file, CIFAR's archive, or shards.

    A folder in a tar is named as if the tar were one: ``x.tar/train``. Shards are all of a folder without sub-folders, or
    those that a pattern such as ``train-*.parquet`` in place of a name picks. ``devkit`` goes with ImageNet's validation
    tar, ``split`` with CIFAR. Raises UserError when there is nothing, or something of no known kind.
    """
    source = _open(path, devkit, split)
    for option, given, fits, what in (
        ("--devkit", devkit, ValidationTar, "ILSVRC2012_img_val.tar"),
        ("--split", split, CIFAR, "CIFAR's archives"),
    ):
        if given is not None and not isinstance(source, fits):
            raise UserError(f"{option} {given}: goes with {what} only, and {path} is of kind {source.kind}")
    return source


def _open(path: Path, devkit: Path | None, split: str | None) -> Source:
    if any(c in path.name for c in "*?["):
        return _shards(path.parent, [item for item in path.parent.glob(path.name) if item.is_file()], path)
    if path.is_dir():
        items = [item for item in path.iterdir() if not item.name.startswith(".")]
        shards = [item for item in items if item.suffix in SHARDED and item.is_file()]
        return ImageFolder(path) if not shards or any(item.is_dir() for item in items) else _shards(path, shards, path)
    archive = next((parent for parent in path.parents if parent.is_file()), None)
    if archive is not None:
        return ImageTar(archive, path.relative_to(archive).as_posix())
    if not path.exists():
        raise UserError(f"{path}: there is no such folder or file")
    if path.suffix == ".parquet":
        return Parquet(path.parent, [path])
    if packing(path):
        return CIFAR(path, split)
    return _tar(path, devkit)


def _tar(path: Path, devkit: Path | None) -> Source:
    if not tarfile.is_tarfile(path):
        raise UserError(f"{path}: is neither a folder, a tar, a parquet file nor one of CIFAR's archives")
    first = [member.name for member in islice(members(path), 8)]
    if any(name.endswith(".cls") for name in first):
        return WebDataset(path.parent, [path])
    if any(VAL_NAME.fullmatch(name.rpartition("/")[2]) and name.count("/") < 2 for name in first[:1]):
        if devkit is None:
            raise UserError(f"{path}: ImageNet's validation images have no labels of their own; "
                            "add --devkit ILSVRC2012_devkit_t12.tar.gz")  # fmt: skip
        return ValidationTar(path, devkit)
    return ImageTar(path)


def _shards(root: Path, found: list[Path], path: Path) -> Source:
    suffixes = {item.suffix for item in found}
    if len(suffixes) != 1 or not suffixes <= set(SHARDED):
        what = "no file" if not found else f"files of the kinds {', '.join(sorted(suffixes))}"
        raise UserError(f"{path}: stands for {what}; shards are either .parquet or .tar files")
    splits = {split for split in SPLITS for item in found if item.name.startswith(f"{split}-")}
    if len(splits) > 1:
        one = root / f"{min(splits)}-*{found[0].suffix}"
        raise UserError(f"{path}: holds shards of {', '.join(sorted(splits))}; name those of one, such as '{one}'")
    return SHARDED[suffixes.pop()](root, found)


def reopen(kind: str, root: Path) -> Source:
    """The source that a manifest names, for reading. Raises UserError when it is gone or of no kind known here."""
    if kind not in BY_KIND:
        raise UserError(f"{root}: is a source of kind {kind!r}, which this version does not know")
    return BY_KIND[kind](root)


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names of a text file, one a line. Raises UserError when it cannot be read or names one twice."""
    try:
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the class index cannot be read: {error}") from None
    if not names or len(set(names)) != len(names):
        twice = next((name for name in names if names.count(name) > 1), "")
        raise UserError(f"{path}: {f'names the class {twice!r} twice' if twice else 'holds no class name'}")
    return names
