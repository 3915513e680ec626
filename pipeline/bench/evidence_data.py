"""CIFAR-10 as two betons for `patchmill bench evidence`: from the official archive, or from JPEGs of its images in an npz."""

import io
import tarfile
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from pipeline.config import UserError
from pipeline.metrics import Progress

ARCHIVE: Final = "cifar-10-python.tar.gz"
JPEGS: Final = "cifar10_jpeg_q75.npz"
SPLITS: Final = {"train": 50_000, "test": 10_000}


def find_images(folder: Path | None) -> Path:
    """The archive in ``folder``, else the npz. Raises UserError when no folder is given or neither is there."""
    if folder is None:
        raise UserError(
            "--data: name the folder that holds CIFAR-10, here or in the environment variable PATCHMILL_DATA"
        )
    for name in (ARCHIVE, JPEGS):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--data {folder}: holds neither {ARCHIVE} nor {JPEGS}; name the folder with one of them")


def _add(tar: tarfile.TarFile, arrays: dict[str, npt.NDArray[np.generic]], split: str) -> None:
    """The JPEGs of a split, in class folders under its name."""
    names = [str(name) for name in arrays["names"]]
    data, offsets = arrays[f"{split}_jpeg"].tobytes(), arrays[f"{split}_offsets"].tolist()
    for number, label in enumerate(arrays[f"{split}_labels"].tolist()):
        jpeg = data[offsets[number] : offsets[number + 1]]
        member = tarfile.TarInfo(f"{split}/{names[label]}/{number:05}.jpg")
        member.size = len(jpeg)
        tar.addfile(member, io.BytesIO(jpeg))


def write_tar(npz: Path, tar: Path) -> None:
    """The JPEGs of ``npz``, byte for byte, as class folders in ``tar``, whole or not at all.

    ``npz`` has, for train and test: ``*_jpeg`` (uint8, all files one after another), ``*_offsets`` (int64 [N + 1]),
    ``*_labels`` [N]; and ``names``. Raises UserError when it has not.
    """
    partial = tar.with_name(f"{tar.name}.partial")
    try:
        with np.load(npz, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        with tarfile.open(partial, "w") as out:
            for split in SPLITS:
                _add(out, arrays, split)
    except (KeyError, ValueError, IndexError, EOFError, BadZipFile) as error:
        raise UserError(f"{npz}: is not CIFAR-10 as JPEGs, or damaged ({error})") from None
    partial.replace(tar)


def pack(images: Path, folder: Path, workers: int) -> None:
    """``train.beton`` and ``test.beton`` in ``folder``; what is there is not done again, what was killed goes on.

    A JPEG keeps its own bytes; the archive's pixels are encoded at quality 90. Raises UserError for damaged ``images``.
    """
    from data_prep.kinds import open_source
    from data_prep.manifest import load_manifest
    from data_prep.scan import scan
    from data_prep.write import write

    folder.mkdir(parents=True, exist_ok=True)
    tar = folder / "cifar10.tar"
    if images.name == JPEGS and not tar.exists():
        write_tar(images, tar)
    for split, expected in SPLITS.items():
        manifest, beton = folder / f"{split}.jsonl", folder / f"{split}.beton"
        if not manifest.exists():
            source = open_source(tar / split) if images.name == JPEGS else open_source(images, split=split)
            with Progress(f"scan {split}", None, "image") as progress:
                scan(source, manifest, workers=workers, progress=progress.update)
        found = load_manifest(manifest).num_samples
        if found != expected:
            raise UserError(
                f"{images}: has {found} good {split} images instead of {expected}; remove {folder} with a whole one"
            )
        with Progress(f"write {split}.beton", None, "image") as progress:
            write(manifest, beton, mode="jpg", workers=workers, progress=progress.update)


def packed(folder: Path) -> bool:
    """Whether both sealed betons are there."""
    return all((folder / f"{split}.beton.seal.json").is_file() for split in SPLITS)


def image_sets(folder: Path) -> dict[str, str]:
    """What was packed there: the file it comes from, and the hash of each split's images; empty before."""
    from data_prep.manifest import load_header
    from data_prep.verify import load_seal

    if not packed(folder):
        return {}
    kind = load_header(folder / "train.jsonl")["source_kind"]
    sets = {split: str(load_seal(folder / f"{split}.beton")["image_set"]) for split in SPLITS}
    return {"source": ARCHIVE if kind == "cifar" else JPEGS, **sets}
