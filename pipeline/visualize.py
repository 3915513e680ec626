"""Pictures of what a run's method does with images: one file a kind, in the run's figures and in MLflow."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from PIL import Image
from torch import Tensor

from pipeline import pictures
from pipeline.config import UserError
from pipeline.data import Batch
from pipeline.methods.common import Draw, panels, render, rows_to_image
from pipeline.runs import Restored, open_images, restore, spread
from pipeline.tracking import send_figures
from pipeline.vit import normalise, patchify, pixel_rows

EVERY: Final = ("method", "attention")
OWN: Final = {"pcae": ("kept",), "randsac": ("generation", "free", "ranks")}
RANK_IMAGES, MAX_STEPS = 128, 16


@dataclass(frozen=True)
class Subject:
    """A trained method, some images of ``which`` with their draw, and the block whose attention is wanted, from 1."""

    restored: Restored
    which: Literal["train", "val"]
    images: Tensor
    draw: Draw
    block: int

    @property
    def rows(self) -> Tensor:
        """The images' normalised pixel rows, [B, N, p*p*C]."""
        return pixel_rows(patchify(normalise(self.images), self.restored.method.patch_size))

    def title(self, text: str) -> str:
        """Run, step and what is shown."""
        return f"{self.restored.cfg.method.name}, step {self.restored.step:,}: {text}"


def _batch(restored: Restored, which: Literal["train", "val"], number: int) -> Batch:
    with contextlib.closing(open_images(restored.cfg, which, augment=False)) as loader:
        with loader.batches(iter([(0, spread(loader.num_samples, number))])) as batches:
            return next(batches)


def _method(subject: Subject) -> Image.Image:
    return subject.restored.method.figure(subject.images, subject.draw, subject.restored.teacher)


def _attention(subject: Subject) -> Image.Image:
    encoder, grid = subject.restored.method.encoder, subject.restored.cfg.grid
    maps = pictures.attention_maps(encoder, subject.images, subject.block - 1)
    columns = [("image", list(rows_to_image(subject.rows)))]
    heads = {"mean of heads": maps.mean(dim=1), **{f"head {n + 1}": maps[:, n] for n in range(maps.shape[1])}}
    columns += [(name, list(some.unflatten(1, (grid, grid)).numpy())) for name, some in heads.items()]
    who = "that the class token gives" if encoder.has_class_token else "that all patches give, on average,"
    return panels(columns, subject.title(f"attention {who} to each patch in block {subject.block} of {len(encoder.blocks)}, "
                                         "nothing masked; in each panel dark is the least, bright the most"))  # fmt: skip


def _steps(subject: Subject, steps: Sequence[Tensor], title: str) -> Image.Image:
    """The image, and at most 16 of the steps, evenly spread."""
    first = pictures.first_predicted(subject.restored.method)
    shown = spread(len(steps), MAX_STEPS)
    names = [("given" if rank < first else f"segment {rank}") for rank in shown.tolist()]
    columns = [("image", list(rows_to_image(subject.rows)))]
    columns += [(name, list(rows_to_image(steps[rank]))) for name, rank in zip(names, shown.tolist(), strict=True)]
    return panels(columns, subject.title(title))


def _generation(subject: Subject) -> Image.Image:
    method = subject.restored.method
    scale = ", with mean and contrast of the true patches" if method.method.normalise_target else ""
    return _steps(subject, pictures.teacher_forced(method, subject.images, subject.draw),
                  f"each segment as predicted from the true ones before it{scale}; black is not seen")  # fmt: skip


def _free(subject: Subject) -> Image.Image:
    method = subject.restored.method
    means = "the given segment's patches" if pictures.first_predicted(method) else "ImageNet's pixels"
    scale = f"; mean and contrast of every patch are the averages of {means}" if method.method.normalise_target else ""
    return _steps(subject, pictures.generate(method, subject.images, subject.draw),
                  f"each segment as predicted from the predictions before it{scale}; black is not made yet")  # fmt: skip


def _kept(subject: Subject) -> Image.Image:
    restored, rows = subject.restored, subject.rows
    columns = [("image", list(rows_to_image(rows)))]
    stages = pictures.kept_tokens(restored.method, subject.images, subject.draw, restored.teacher)
    for number, kept in enumerate(stages, 1):
        name = f"stage {number}: {int(kept[0].sum())} of {kept.shape[1]}"
        columns.append((name, list(rows_to_image(pictures.dimmed(rows, kept)))))
    return panels(
        columns, subject.title("patches of the whole image that the teacher keeps at each stage; faded: dropped")
    )


def _ranks(subject: Subject) -> Image.Image:
    method = subject.restored.method
    batch = _batch(subject.restored, subject.which, RANK_IMAGES)
    losses = pictures.losses_by_rank(method, batch.images, method.draw(batch.keys, batch.batch_key))
    pixels = "patch-standardised" if method.method.normalise_target else "normalised"
    figure = pictures.draw_losses(losses, subject.title(f"loss by rank on {len(losses)} images of data.{subject.which}"),
                                  f"mean squared error of {pixels} pixels")  # fmt: skip
    return render(figure)


DRAWN: Final[dict[str, Callable[[Subject], Image.Image]]] = {
    "method": _method, "attention": _attention, "generation": _generation, "free": _free, "kept": _kept, "ranks": _ranks,
}  # fmt: skip


def choose(method: str, kinds: Sequence[str]) -> Sequence[str]:
    """``kinds``, or all that a method has when none is named. Raises UserError for one that it has not."""
    known = [*EVERY, *OWN.get(method, ())]
    for kind in kinds:
        if kind not in known:
            raise UserError(f"--kind {kind}: {method} has no such picture; it has {', '.join(known)}")
    return list(dict.fromkeys(kinds)) or known


def visualize(
    run_dir: Path, num_images: int, kinds: Sequence[str] = (), block: int | None = None, out: Path | None = None
) -> list[Path]:
    """Draw pictures of images spread over data.val, or over data.train when there is none; returns the files.

    ``kinds`` of the method's, all by default; ``block``: whose attention, counted from 1, the last by default. They go to
    ``out``, or to the run's figures and the MLflow store that has the run. Raises UserError for a folder that is not a run
    or holds no checkpoint, for a kind or a block that is not there, and where nothing can be written.
    """
    run_dir = Path(run_dir).resolve()
    restored = restore(run_dir)
    cfg, method, depth = restored.cfg, restored.method.eval(), len(restored.method.encoder.blocks)
    chosen, block = choose(cfg.method.name, kinds), depth if block is None else block
    if not 1 <= block <= depth:
        raise UserError(f"--block {block}: the encoder has blocks 1 to {depth}")
    folder = run_dir / "figures" if out is None else out
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder with --out")
    which: Literal["train", "val"] = "val" if cfg.data.val else "train"
    batch = _batch(restored, which, num_images)
    subject = Subject(restored, which, batch.images, method.draw(batch.keys, batch.batch_key), block)
    paths = []
    for kind in chosen:
        name = f"attention_block{block:02d}" if kind == "attention" else kind
        paths.append(folder / f"{cfg.method.name}_step{restored.step:08d}_{name}.png")
        picture = DRAWN[kind](subject)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(paths[-1])
        except OSError as error:
            raise UserError(
                f"{paths[-1]}: cannot be written ({error.strerror}); name another folder with --out"
            ) from None
    if out is None:
        send_figures(run_dir, paths)
    return paths
