"""What a chain has to pack before it trains."""

import os
from dataclasses import dataclass
from pathlib import Path

from data_prep.kinds import open_source
from data_prep.manifest import load_header
from data_prep.verify import check_seal, load_seal
from pipeline.config import Config, UserError


@dataclass(frozen=True)
class Pack:
    """A beton that is still to be made (``which``: train or val), and of what."""

    which: str
    images: Path
    beton: Path

    @property
    def manifest(self) -> Path:
        """Where the scan lists the images."""
        return self.beton.with_suffix(".jsonl")


def sealed(beton: Path) -> bool:
    """Whether a beton is there and good. Raises UserError for one that `prep write` would not replace."""
    if not beton.exists():
        return False
    load_seal(beton)
    try:
        check_seal(beton)
    except UserError:
        return False  # `prep write` puts the same content in its place
    return True


def packs_of(cfg: Config) -> tuple[list[Pack], list[str]]:
    """The betons that are still to be made, and what stands against it."""
    packs, problems = list[Pack](), list[str]()
    for which, images, beton in (
        ("train", cfg.chain.train_images, cfg.data.train),
        ("val", cfg.chain.val_images, cfg.data.val),
    ):
        if images is None:
            continue
        try:
            if cfg.data.loader != "ffcv":
                raise UserError(f"is packed into a beton; set data.loader=ffcv (not {cfg.data.loader}) or leave it out")
            if beton is None:
                raise UserError(f"data.{which} is not set: the beton to pack it into")
            if not sealed(Path(beton)):
                packs.append(Pack(which, Path(images), Path(beton)))
                _require_packable(packs[-1], None if which == "train" or packs[0].which == "train" else cfg.data.train)
        except UserError as error:
            problems.append(f"chain.{which}_images = {images}: {error}")
    return packs, problems


def _require_packable(pack: Pack, train: str | None) -> None:
    """Raises UserError where `prep scan` would. ``train``: the beton whose manifest must be there, for its class index."""
    source, folder = open_source(pack.images), pack.beton.parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written; make it, or choose another data.{pack.which}")
    if pack.manifest.exists() and load_header(pack.manifest)["source"] != str(source.root):
        raise UserError(f"{pack.manifest} is the manifest of {load_header(pack.manifest)['source']}; delete it, or choose "
                        f"another data.{pack.which}")  # fmt: skip
    if train is not None and not Path(train).with_suffix(".jsonl").exists():
        raise UserError(f"needs {Path(train).with_suffix('.jsonl')} for the class index of data.train, and it is not there; "
                        "pack it by hand with: patchmill prep scan --against")  # fmt: skip
