"""The loaders' benchmark: it runs on one image set, and gives no figure that the machine cannot vouch for."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_prep.manifest import load_manifest
from data_prep.scan import scan
from data_prep.write import write
from pipeline import order
from pipeline.bench import data, interleaved
from pipeline.cli import app
from pipeline.config import RunFailed, UserError
from pipeline.vit import normalise


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
    calls = []
    rows = data.run(*image_set, image_size=32, progress=lambda done, total: calls.append((done, total)))
    assert len(rows) == 7 and all(row.cpu_s_per_image > 0 for row in rows)
    assert (rows[0].name, rows[1].name) == (data.OURS, data.SCALED)
    assert calls[-1] == (126, 126)  # 7 contestants, twice, 8 rounds and one that is not counted


def test_rows_compare_with_ours_and_with_ours_scaled():
    rows = data.compare({data.OURS: (2.0, 1.01), data.SCALED: (1.0, 0.99), data.STOCK: (3.0, 1.0)})
    assert rows[2] == data.Row(data.STOCK, 3.0, 1.0, 1.5, 3.0)
    assert rows[0].ours_is_faster == rows[1].scaled_is_faster == 1 and rows[1].a_over_a == 0.99
    assert "ours / this 1.50   scaled / this 3.00" in str(rows[2])


@pytest.fixture
def batches(monkeypatch):
    """The images of every batch that a DataLoader hands out."""
    seen, real = [], torch.utils.data.DataLoader.__iter__

    def spy(loader):
        for images, labels in real(loader):
            seen.append(images)
            yield images, labels

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", spy)
    return seen


def test_torchvisions_dataloader_makes_the_crops_of_mae(image_set, batches):
    book, state = load_manifest(image_set[1]), torch.get_rng_state()
    for as_float in (False, True):
        read = data._torchvision(book, 32, as_float)
        assert [read(0), read(1), read(0)] == [64, 64, 64]  # whole batches of 64 from 70 images
    assert torch.equal(torch.get_rng_state(), state)
    assert {images.shape for images in batches} == {(64, 3, 32, 32)}
    whole, other, again, floats = *batches[:3], batches[3]
    assert whole.dtype == torch.uint8 and floats.dtype == torch.float32
    assert torch.equal(whole, again) and not torch.equal(whole, other)
    assert torch.allclose(floats, normalise(whole), atol=1e-5)


def test_a_restless_machine_gets_no_figure(image_set, monkeypatch):
    monkeypatch.setattr(interleaved, "interleave", lambda contestants, *_: {name: (1.0, 1.05) for name in contestants})
    with pytest.raises(RunFailed, match=r"restless.*ffcv stock 1\.050"):
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


def test_images_that_are_no_files_are_refused(image_set, monkeypatch):
    book = dataclasses.replace(load_manifest(image_set[1]), source_kind="webdataset")
    monkeypatch.setattr(data, "load_manifest", lambda path: book)
    with pytest.raises(UserError, match="of kind webdataset; a DataLoader of files needs a folder"):
        data.run(*image_set)


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    calls: list[tuple[str, int]] = []
    contestants = {name: lambda number, name=name: calls.append((name, number)) or 10 for name in ("a", "b")}
    figures = interleaved.interleave(contestants, 2)
    assert calls == [(name, number) for number in range(3) for name in ("a", "b", "a", "b")]
    assert set(figures) == {"a", "b"}


def test_a_clock_measures_what_it_counts():
    ticks = iter(range(100))
    figures = interleaved.interleave({"a": lambda number: 10}, 2, clock=lambda: 5.0 * next(ticks))
    assert figures == {"a": (0.5, 1.0)}


def test_threads_are_timed_by_the_clock_and_a_restless_machine_gets_no_figure(image_set, monkeypatch):
    used = []

    def interleave(contestants, rounds, progress, clock):
        used.append(clock)
        return dict(zip(contestants, figures, strict=True))

    monkeypatch.setattr(interleaved, "interleave", interleave)
    monkeypatch.setattr(data, "_patchmill", lambda *args: used.append(args[-1]))
    monkeypatch.setattr(data, "_others_cpu_s", lambda: 100.0)
    figures = [(0.4, 1.01), (0.2, 0.98)]
    rows = data.run_threads(image_set[0], 3)
    assert rows == [data.ThreadsRow(1, 0.4, 1.01, 1.0), data.ThreadsRow(3, 0.2, 0.98, 2.0)]
    assert used == [1, 3, data.time.perf_counter]
    assert "to one thread 2.00 (goal" in str(rows[1]) and "goal" not in str(rows[0])
    times = iter([100.0, 200.0])
    monkeypatch.setattr(data, "_others_cpu_s", lambda: next(times))
    with pytest.raises(UserError, match=r"not idle: other processes used .* CPUs"):
        data.run_threads(image_set[0], 3)
    monkeypatch.setattr(data, "_others_cpu_s", lambda: 100.0)
    figures[1] = (0.2, 0.9)
    with pytest.raises(RunFailed, match="restless"):
        data.run_threads(image_set[0], 3)


def test_resuming_is_timed_from_nothing(monkeypatch):
    monkeypatch.setattr(data, "IMAGENET", 1000)
    monkeypatch.setattr(data, "RESUME_STEP", 5)
    monkeypatch.setattr(data, "RESUME_BATCH", 100)
    made, real = [], order.hash_integers
    monkeypatch.setattr(order, "hash_integers", lambda *given: made.append(given) or real(*given))
    for _ in range(2):
        order.epoch_permutation.cache_clear()
        rows = data.run_resume(rounds=3)
    assert [row.name for row in rows] == ["full", "windowed"] and all(row.seconds > 0 for row in rows)
    assert made == 4 * [(-1, 0), (-2, 0), (-3, 0)]


def test_the_command_measures_the_loaders_or_the_threads_and_writes_a_report(image_set, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        data, "run", lambda *args, **more: asked.append((args, more)) or [data.Row("x", 0.5, 1.0, 2.0, 3.0)]
    )
    monkeypatch.setattr(data, "run_resume", lambda: [data.ResumeRow("full", 0.25)])
    monkeypatch.setattr(
        data, "run_threads", lambda *args, **more: asked.append((args, more)) or [data.ThreadsRow(2, 0.5, 1.0, 1.8)]
    )
    words = ["bench", "data", "a.beton", "a.jsonl", "--size", "96", "--out", str(tmp_path / "out.json")]
    assert CliRunner().invoke(app, words).exit_code == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["x", "full"] and rows[0]["scaled_is_faster"] == 3.0
    assert asked[0][0] == (Path("a.beton"), Path("a.jsonl")) and asked[0][1]["image_size"] == 96
    result = CliRunner().invoke(app, [*words, "--threads", "2"])
    assert result.exit_code == 0 and "2 threads" in result.output and len(asked) == 2
    assert asked[1][0] == (Path("a.beton"), 2) and asked[1][1]["rounds"] == 8
    wrong = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "no/out.json")])
    assert isinstance(wrong.exception, UserError) and len(asked) == 2
