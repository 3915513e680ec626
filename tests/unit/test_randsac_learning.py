"""RandSAC learns what it should from little: properties 20 and 21, with controls that must not learn."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pipeline.config import Config
from pipeline.drawn import draw_image
from pipeline.methods import build_method
from pipeline.methods.randsac import RandSAC


def tiled(number: int, seed: int, *, same: bool) -> Tensor:
    """Images [B, 3, 32, 32] of one random patch, repeated and covered by noise of its own size; or of as many as places.

    Each further look at the patch averages more noise away; where all patches differ, no look helps.
    """
    generator = torch.Generator().manual_seed(seed)
    side = 4 if same else 32
    tile = torch.randn(number, 3, side, side, generator=generator).repeat(1, 1, 32 // side, 32 // side)
    pixels = tile + torch.randn(number, 3, 32, 32, generator=generator)
    return (128 + 40 * pixels).round().clamp(0, 255).to(torch.uint8)


def steps(method: RandSAC, number: int, lr: float) -> Iterator[tuple[int, Callable[[Tensor], None]]]:
    """``number`` updates with AdamW after a short warm-up: yields (step, the function that takes the loss)."""
    optimizer = torch.optim.AdamW(
        [p for p in method.parameters() if p.requires_grad], betas=(0.9, 0.95), weight_decay=0
    )

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()

    for step in range(number):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20)
        yield step, update


@pytest.fixture(scope="module")
def raster(tiny_config: Callable[..., Config]) -> RandSAC:
    method = build_method(tiny_config("randsac", method__order="raster"))
    for step, update in steps(method, 150, 2e-3):
        keys = torch.arange(16) + 16 * step
        update(method(tiled(16, step, same=True), method.draw(keys))[0])
    return method


def loss_by_rank(method: RandSAC, images: Tensor) -> tuple[float, Tensor]:
    with torch.no_grad():
        loss, logs = method(images, method.draw(torch.arange(len(images))))
    return float(loss), torch.stack([value for name, value in logs.items() if name.startswith("loss_rank_")])


def test_property_20_more_context_means_less_loss(raster: RandSAC) -> None:
    loss, by_rank = loss_by_rank(raster, tiled(128, 10**6, same=True))
    assert loss < 0.8
    assert by_rank[0] > by_rank[1] > by_rank[2:5].mean() > by_rank[5:].mean()
    assert by_rank[0] - by_rank[5:].mean() > 0.03


def test_property_20_control_where_context_says_nothing_no_rank_is_predicted(raster: RandSAC) -> None:
    _, by_rank = loss_by_rank(raster, tiled(128, 10**6, same=False))
    assert by_rank.min() > 0.97


def test_property_20_without_memory_the_loss_is_the_zero_predictors(
    raster: RandSAC, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = raster.decoder.memories
    monkeypatch.setattr(raster.decoder, "memories", lambda layers: [torch.zeros_like(m) for m in right(layers)])
    loss, by_rank = loss_by_rank(raster, tiled(128, 10**6, same=True))
    assert loss == pytest.approx(47 / 48, abs=0.05) and by_rank.max() - by_rank.min() < 0.05


def overfit(method: RandSAC, images: Tensor, *, shuffled: bool) -> tuple[float, float]:
    """(the last ten losses' mean, the loss of the best constant): 300 steps on the same images and draws.

    ``shuffled``: each step the targets are dealt to the queries anew, so that there is nothing to learn but their mean.
    """
    draw = method.draw(torch.arange(len(images)))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _, update in steps(method, 300, 3e-3):
        found = method.predict(images, draw)
        target = found.target.flatten(0, 1)
        constant = float(target.var(dim=0, correction=0).mean())
        if shuffled:
            target = target[torch.randperm(len(target), generator=generator)]
        loss = (found.pred.flatten(0, 1) - target).square().mean()
        update(loss)
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10, constant


@pytest.fixture(scope="module")
def eight() -> Tensor:
    """Eight drawn images, the middle 32 x 32 pixels of each."""
    drawn = [torch.from_numpy(draw_image(0, 0, index)) for index in range(8)]
    edges = [(len(image) - 32) // 2 for image in drawn]
    return torch.stack([image[e : e + 32, e : e + 32].permute(2, 0, 1) for image, e in zip(drawn, edges, strict=True)])


def test_property_21_eight_images_are_learnt_by_heart(tiny_config: Callable[..., Config], eight: Tensor) -> None:
    loss, _ = overfit(build_method(tiny_config("randsac")), eight, shuffled=False)
    assert loss < 0.2


def test_property_21_control_shuffled_targets_are_not(tiny_config: Callable[..., Config], eight: Tensor) -> None:
    loss, constant = overfit(build_method(tiny_config("randsac")), eight, shuffled=True)
    assert loss > 0.97 * constant > 0.5
