"""What is told of the features while a run trains: their effective rank, a collapse, the same at any number of ranks."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import online
from pipeline.config import Config, ConfigError, UserError
from pipeline.evaluate.features import extract
from pipeline.evaluate.knn import knn_accuracy
from pipeline.launch import Portion, World
from pipeline.methods import build_method
from pipeline.online import CHUNK, Online, collapse, effective_rank, mean_cosine, my_chunks
from pipeline.order import Plan
from pipeline.runs import open_images

PLAN = Plan(4, 18, 0)


class Engine:
    """Computes with a method; ``spoil`` changes what comes out. ``sizes`` of the batches that it was given."""

    def __init__(self, cfg: Config, spoil: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        self.method, self.spoil, self.sizes = build_method(cfg).eval(), spoil, list[int]()

    @torch.no_grad()
    def call(self, name: str, images: Tensor, draw: Any) -> Tensor:
        self.sizes.append(len(images))
        return self.spoil(getattr(self.method, name)(images, draw))


@pytest.fixture
def watch(tiny_config: Callable[..., Config]) -> Iterator[tuple[Config, Online]]:
    cfg = tiny_config("mae", eval__online_every=2, eval__online_images=70, data__num_samples=200)
    found = Online(cfg, PLAN)
    yield cfg, found
    found.close()


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_effective_rank_of_r_equal_directions_is_r(rank: int) -> None:
    matrix = torch.zeros(12, 8)
    matrix[:rank, :rank] = 5 * torch.eye(rank)
    turn = torch.linalg.qr(rows(8, 8))[0]
    assert effective_rank(matrix @ turn) == pytest.approx(rank, rel=1e-5)


def test_the_effective_rank_of_equal_rows_is_1_and_of_nothing_too() -> None:
    assert effective_rank(rows(1, 8).expand(20, -1)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(20, 8)) == 1
    for bad in (math.nan, math.inf):
        assert math.isnan(effective_rank(torch.tensor([[1.0, bad], [0.0, 1.0]])))


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_the_effective_rank_is_numpys(shape: tuple[int, int]) -> None:
    matrix = rows(*shape) + 2
    values = np.linalg.svd(matrix.numpy().astype(np.float64), compute_uv=False)
    share = values / values.sum()
    assert effective_rank(matrix) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    assert effective_rank(100 * matrix) == pytest.approx(effective_rank(matrix), rel=1e-5)


def test_the_mean_cosine_is_that_of_all_pairs_of_different_rows() -> None:
    matrix = rows(9, 5) + 1
    pairs = [torch.cosine_similarity(matrix[i], matrix[j], dim=0) for i in range(9) for j in range(9) if i != j]
    assert mean_cosine(matrix) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)
    assert mean_cosine(rows(1, 5).expand(9, -1)) == pytest.approx(1, abs=1e-6)
    assert mean_cosine(torch.eye(4)) == pytest.approx(0)


@pytest.mark.parametrize(
    ("rank", "cosine", "width", "says"),
    [
        (2.5, 0.9, 96, None), (1.9, 0.9, 96, "effective rank 1.90 of 96 is under 2.00"), (5.0, 0.9, 1024, "of 1024 is under 5.12"),
        (5.5, 0.9, 1024, None), (12.0, 0.9995, 96, "mean cosine 0.9995 of two images is over 0.999"),
        (12.0, 0.998, 96, None), (math.nan, math.nan, 96, "they are not finite"),
    ],
)  # fmt: skip
def test_what_is_a_collapse(rank: float, cosine: float, width: int, says: str | None) -> None:
    found = collapse(rank, cosine, width)
    assert found is None if says is None else found is not None and says in found


@pytest.mark.parametrize(("chunks", "size"), [(7, 1), (7, 2), (7, 3), (2, 5), (8, 4)])
def test_ranks_share_the_chunks_and_compute_as_many(chunks: int, size: int) -> None:
    shares = [my_chunks(chunks, World(rank, size)) for rank in range(size)]
    assert {len(share) for share in shares} == {-(-chunks // size)}
    assert {number for share in shares for number in share} == set(range(chunks))
    assert sum(map(len, shares)) < chunks + size


def test_it_is_their_turn_every_n_epochs_and_at_the_end(watch: tuple[Config, Online]) -> None:
    assert [step for step in range(1, 19) if watch[1].due(step)] == [8, 16, 18]


def test_the_signals_are_those_of_the_probes_features(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is of one set, what is tested of another; the spread is the memory's."""
    sets = {"train": tiny_config("mae", data__num_samples=200), "val": tiny_config("mae", data__num_samples=90)}
    monkeypatch.setattr(
        online, "open_images", lambda _, which, augment: open_images(sets[which], "val", augment=augment)
    )
    cfg = tiny_config("mae", eval__online_every=2, eval__online_images=70)
    engine, watch = Engine(cfg), Online(cfg, PLAN)
    fields, text = watch.observe(engine, Portion.of(cfg, World()), World())
    watch.close()
    assert engine.sizes == [CHUNK, 6] * 2
    some = []
    for one in sets.values():
        loader = open_images(one, "val", augment=False)
        whole = extract(engine.method.encoder, loader, batch_size=64, device="cpu")
        loader.close()
        ids = np.linspace(0, len(whole.labels) - 1, 70).round().astype(int)
        some.append(dataclasses.replace(whole, features=whole.features[ids], labels=whole.labels[ids]))
    train, val = some
    assert fields["online_knn"] == knn_accuracy(train, val, num_classes=10) != knn_accuracy(val, train, num_classes=10)
    assert fields["effective_rank"] == pytest.approx(effective_rank(train.features), rel=1e-4)
    assert fields["effective_rank"] != pytest.approx(effective_rank(val.features), rel=1e-3)
    assert fields["mean_cosine"] == pytest.approx(mean_cosine(train.features), rel=1e-4)
    assert fields["online_images"] == 70 and fields["online_s"] > 0 and "collapse" not in fields
    assert text.startswith(
        f"kNN {fields['online_knn']:.2f} %, effective rank {fields['effective_rank']:.1f} of 96, mean cosine"
    )


def test_ranks_have_the_bits_of_one(watch: tuple[Config, Online]) -> None:
    cfg, signals = watch
    engine, portion = Engine(cfg), Portion.of(cfg, World())
    alone, _ = signals.observe(engine, portion, World())
    for size in (2, 3):
        told: list[Any] = []
        hear = lambda mine, told=told: told.append(mine) or told  # noqa: E731
        for rank in reversed(range(size)):  # the main one is the last, and hears all
            world = SimpleNamespace(rank=rank, size=size, is_main=rank == 0, gather=hear)
            fields, text = signals.observe(engine, portion, world)
            assert rank == 0 or (fields, text) == ({}, "")
        same = ("online_knn", "effective_rank", "mean_cosine", "online_images")
        assert [fields[name] for name in same] == [alone[name] for name in same]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (torch.ones_like, "effective rank 1.00 of 96"),
        (lambda found: found * math.nan, "not finite"),
        (lambda found: 100 + 2 * rows(*found.shape), "mean cosine 0.9996"),
    ],
)
def test_an_encoder_that_is_constant_or_broken_is_told_and_stops_nothing(
    watch: tuple[Config, Online], spoil: Callable[[Tensor], Tensor], says: str
) -> None:
    cfg, signals = watch
    fields, text = signals.observe(Engine(cfg, spoil), Portion.of(cfg, World()), World())
    assert says in fields["collapse"]
    assert ("online_knn" in fields) is ("cosine" in says) and "effective rank" in text


def test_settings_that_do_not_go_together(tiny_config: Callable[..., Config]) -> None:
    cfg = tiny_config("mae", eval__online_every=1, data__num_samples=10)
    with pytest.raises(
        UserError, match=r"eval.knn_k = 20: is more than the 10 images of data.train; lower it or leave"
    ):
        Online(cfg, PLAN)
    with pytest.raises(ConfigError, match=r"eval.online_images = 19: should be eval.knn_k \(20\) or more"):
        tiny_config("mae", eval__online_every=1, eval__online_images=19)
    assert tiny_config("mae", eval__online_images=19).eval.online_every is None
    with pytest.raises(
        ConfigError, match=r"data.val: is required and not set: eval.online_every = 3 probes its images"
    ):
        tiny_config("mae", eval__online_every=3, data__loader="folder", data__train="x.jsonl")
