"""What a scanned set is like: figures as text and as a picture, and images that are there more than once."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.manifest import Manifest

Int64 = npt.NDArray[np.int64]
Digests = bytes | bytearray | npt.NDArray[np.uint8]


def _row(name: str, values: npt.NDArray[Any], form: str) -> str:
    figures = (values.min(), np.median(values), values.mean(), values.max())
    return f"{name:<22}" + "".join(f"{figure:>11{form}}" for figure in figures)


def _counts(values: Counter[Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in values.most_common())


def describe(manifest: Manifest) -> str:
    """Sizes, formats and classes of the images of a manifest, as a table."""
    sides = manifest.widths, manifest.heights
    per_class = np.bincount(manifest.labels, minlength=len(manifest.classes))
    lines = [
        f"{'':<22}" + "".join(f"{title:>11}" for title in ("min", "median", "mean", "max")),
        _row("longer side, pixels", np.maximum(*sides), ",.0f"),
        _row("shorter side, pixels", np.minimum(*sides), ",.0f"),
        _row("width / height", manifest.widths / manifest.heights, ",.2f"),
        _row("file, KiB", manifest.num_bytes / 1024, ",.1f"),
        _row("images a class", per_class, ",.0f"),
        f"formats: {_counts(Counter(manifest.formats))}; colours: {_counts(Counter(manifest.modes))}",
    ]
    turned, progressive = int((manifest.orientations > 1).sum()), int(manifest.progressive.sum())
    if turned or progressive:
        lines.append(f"turned by EXIF: {turned}; progressive: {progressive}")
    return "\n".join(lines)


def picture_path(manifest: Path) -> Path:
    """Where the picture of a manifest lies."""
    return manifest.with_name(f"{manifest.stem}.statistics.png")


def draw(book: Manifest) -> Path:
    """The same as four histograms, beside the manifest; returns the picture's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels: list[tuple[str, npt.NDArray[Any], bool]] = [
        ("longer side, pixels", np.maximum(book.widths, book.heights), True),
        ("width / height", book.widths / book.heights, True),
        ("file, KiB", book.num_bytes / 1024, True),
        ("images a class", np.bincount(book.labels, minlength=len(book.classes)), False),
    ]
    for axes, (title, values, logarithmic) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        low, high = float(values.min()), float(values.max())
        if logarithmic and high > low:
            axes.hist(values, bins=np.geomspace(low, high, 50))
            axes.set_xscale("log")
        else:
            axes.hist(values, bins=min(50, max(1, len(values))))
        axes.set(xlabel=title, ylabel="classes" if title == "images a class" else "images")
    figure.suptitle(f"{book.path.name}: {book.num_samples:,} images of {len(book.classes):,} classes")
    path = picture_path(book.path)
    figure.savefig(path, dpi=120)
    return path


@dataclass(frozen=True)
class Duplicates:
    """Images with the same pixels: ``groups`` of sample numbers; how many of them have another label than their group's first.

    ``elsewhere``: (sample, sample of the other manifest) of images that are in that one too.
    """

    groups: list[list[int]]
    num_conflicts: int
    elsewhere: list[tuple[int, int]]

    @property
    def num_surplus(self) -> int:
        """How many images are there already."""
        return sum(len(group) - 1 for group in self.groups)


def find_duplicates(pixels: Digests, labels: Int64, other: Digests = b"") -> Duplicates:
    """Equal pixels in a set, and in another: ``pixels`` and ``other`` are their 32-byte digests end to end, ``labels`` [N]."""
    keys = np.frombuffer(pixels, "V32")
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    groups: list[list[int]] = []
    for place in same.tolist():
        first, second = int(order[place]), int(order[place + 1])
        if groups and groups[-1][-1] == first:
            groups[-1].append(second)
        else:
            groups.append([first, second])
    groups.sort()
    conflicts = sum(int(labels[sample] != labels[group[0]]) for group in groups for sample in group[1:])
    others = np.frombuffer(other, "V32")
    _, here, there = np.intersect1d(keys, others, return_indices=True)
    return Duplicates(groups, conflicts, sorted(zip(here.tolist(), there.tolist(), strict=True)))
