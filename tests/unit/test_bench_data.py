"""The loaders' benchmark: it runs on one image set, and gives no figure that the machine cannot vouch for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.scan import scan
from data_prep.write import write
from pipeline.bench import data, interleaved
from pipeline.config import UserError


@pytest.fixture(scope="module")
def image_set(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "images/a").mkdir(parents=True)
    for k in range(70):
        pixels = np.random.default_rng(k).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(folder / f"images/a/{k:02d}.jpg")
    scan(folder / "images", folder / "images.jsonl", workers=0)
    write(folder / "images.jsonl", folder / "images.beton", workers=0)
    return folder / "images.beton", folder / "images.jsonl"


@pytest.mark.slow  # compiles FFCV's stock pipeline
def test_every_contestant_has_a_figure(image_set, monkeypatch):
    monkeypatch.setattr(interleaved, "TOLERANCE", float("inf"))
    rows = data.run(*image_set, image_size=32)
    assert len(rows) == 5 and all(row.cpu_s_per_image > 0 for row in rows)
    ours = rows[0]
    assert ours.name == "patchmill ffcv" and ours.ours_is_faster == 1
    assert all(row.ours_is_faster == row.cpu_s_per_image / ours.cpu_s_per_image for row in rows)


def test_a_restless_machine_gets_no_figure(image_set, monkeypatch):
    monkeypatch.setattr(interleaved, "interleave", lambda contestants, *_: {name: (1.0, 1.05) for name in contestants})
    with pytest.raises(UserError, match=r"restless.*ffcv stock 1\.050"):
        data.run(*image_set, image_size=32)


def test_fewer_than_eight_rounds_and_other_images_are_refused(image_set, tmp_path):
    with pytest.raises(UserError, match="rounds = 7"):
        data.run(*image_set, rounds=7)
    source = image_set[0].parent / "images"
    (source / "a/00.jpg").rename(tmp_path / "00.jpg")
    scan(source, tmp_path / "other.jsonl", workers=0)
    (tmp_path / "00.jpg").rename(source / "a/00.jpg")
    with pytest.raises(UserError, match="different images"):
        data.run(image_set[0], tmp_path / "other.jsonl")


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    calls: list[tuple[str, int]] = []
    contestants = {name: lambda number, name=name: calls.append((name, number)) or 10 for name in ("a", "b")}
    figures = interleaved.interleave(contestants, 2)
    assert calls == [(name, number) for number in range(3) for name in ("a", "b", "a", "b")]
    assert set(figures) == {"a", "b"}
