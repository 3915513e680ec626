"""What figures, logs, costs and defaults promise of every method."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from segment_paths import N
from test_costs import counted
from torch import Tensor

from pipeline import segments
from pipeline.config import Config
from pipeline.estimate import flops_per_image
from pipeline.methods import METHODS, build_method, pcae, randsac
from pipeline.methods.common import rows_to_image
from pipeline.settings import METHOD_CONFIGS, PCAEConfig, RandSACConfig
from pipeline.vit import normalise, patchify, pixel_rows

Shown = dict[str, list[np.ndarray]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The columns, by title, of the last figure that was drawn."""
    columns: Shown = {}
    for module in (pcae, randsac):
        monkeypatch.setattr(module, "panels", columns.update)
    return columns


def test_every_method_with_settings_has_a_class() -> None:
    assert METHODS.keys() == METHOD_CONFIGS.keys()


def test_the_figure_shows_the_first_segment_as_given(
    tiny_config: Callable[..., Config], images: Tensor, shown: Shown
) -> None:
    method = build_method(tiny_config("randsac"))
    draw = method.draw(torch.arange(4))
    method.figure(images, draw)
    for image in range(4):
        first = (draw.ranks[image] == 0).view(8, 8).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
        assert (shown["given"][image][first] == shown["image"][image][first]).all()
        assert (shown["given"][image][~first] == 0).all() and shown["image"][image][~first].max() > 0
        assert (shown["predicted"][image][first] == shown["image"][image][first]).all()


def test_raw_targets_of_mae_are_the_pixels(tiny_config: Callable[..., Config], images: Tensor) -> None:
    method = build_method(tiny_config("mae", method__normalise_target=False))
    found = method.predict(images, method.draw(torch.arange(4)))
    rows = pixel_rows(patchify(normalise(images), 4))
    assert torch.equal(found.target, segments.gather_tokens(rows, found.token_ids))


def test_the_figure_of_pcae_shows_the_choice_among_masked_and_among_all(
    tiny_config: Callable[..., Config], images: Tensor, shown: Shown
) -> None:
    method = build_method(tiny_config("pcae"))
    draw = method.draw(torch.arange(4))
    method.figure(images, draw)
    rows = pixel_rows(patchify(normalise(images), 4))
    everything = torch.arange(N).expand(4, -1)
    patches = patchify(normalise(images), 4)
    for title, ids in (("kept at stage", draw.masked_ids), ("whole, stage", everything)):
        for stage, left in enumerate(method.targets(patches, ids, None)[1]):
            picture = torch.full_like(rows, -10.0)
            for image in range(4):
                picture[image, left[image]] = rows[image, left[image]]
            for found, expected in zip(shown[f"{title} {stage + 1}"], rows_to_image(picture), strict=True):
                assert (found == expected).all(), (title, stage)


@pytest.mark.parametrize("name", ["randsac", "pcae", "mae"])
def test_logs_carry_no_gradient(tiny_config: Callable[..., Config], images: Tensor, name: str) -> None:
    method = build_method(tiny_config(name))
    loss, logs = method(images, method.draw(torch.arange(4)))
    assert loss.requires_grad and not any(value.requires_grad for value in logs.values())


@pytest.mark.parametrize("name", ["randsac", "pcae", "mae"])
def test_flops_are_exact(tiny_config: Callable[..., Config], name: str) -> None:
    """One per cent, as elsewhere, is wider than MAE's head on the visible tokens."""
    cfg = tiny_config(name, method__decoder_depth=1)
    found, (forward, step) = flops_per_image(cfg), counted(cfg)
    assert (found.forward, found.step) == pytest.approx((forward, step), rel=1e-6)


def test_defaults_are_a_contract() -> None:
    """A configuration that names the method alone means this; another default changes every such run."""
    assert RandSACConfig(name="randsac").model_dump() == {
        "name": "randsac", "segments": "square", "segment_size": 3, "num_segments": 11, "blob_std": (0.15, 0.25),
        "share_segments": False, "shuffled": False, "order": "hierarchical", "partition_size": 2, "num_partitions": 5,
        "prefix": False, "predict_first": False, "token_keep": 1.0, "skip": "last", "query_token": True,
        "normalise_target": True, "decoder_self_attention": True, "decoder_depth": 8, "decoder_width": 512,
        "decoder_heads": 16}  # fmt: skip
    assert PCAEConfig(name="pcae").model_dump() == {
        "name": "pcae", "mask_ratio": 0.75, "stages": 3, "keep_ratio": 0.5, "drop_case": 0, "criterion": "unit_mean",
        "selection": "least_similar", "normalise_target": True, "decoder_depth": 8, "decoder_width": 512,
        "decoder_heads": 16}  # fmt: skip
