"""Patches, positions, the keyed block and first weights, against plain loops and timm."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.methods import build_method
from pipeline.vit import (
    Block,
    KeyedBlock,
    LayerNorm,
    _statistics,
    build_encoder,
    embed,
    encode_visible,
    encoder_kwargs,
    initialise,
    normalise,
    patchify,
    pixel_rows,
    sincos_2d,
    standardise,
    timm,
    unpatchify,
)

few = settings(max_examples=25, deadline=None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Patches


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4))
@few
def test_patchify_is_raster_order_and_unpatchify_its_inverse(batch: int, grid: int, size: int, channels: int) -> None:
    images = torch.arange(batch * channels * (grid * size) ** 2).view(batch, channels, grid * size, grid * size)
    patches = patchify(images, size)
    assert patches.shape == (batch, grid**2, channels, size, size)
    for row in range(grid):
        for column in range(grid):
            cut = images[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            assert torch.equal(patches[:, row * grid + column], cut)
    assert torch.equal(unpatchify(patches), images)


def test_pixel_rows_are_pixels_in_raster_order_channels_fastest() -> None:
    images, size, grid = random(2, 3, 8, 8), 4, 2
    rows = pixel_rows(patchify(images, size))
    assert rows.shape == (2, 4, 48)
    mae = images.reshape(2, 3, grid, size, grid, size)  # MAE: einsum('nchpwq->nhwpqc')
    assert torch.equal(rows, torch.einsum("nchpwq->nhwpqc", mae).reshape(2, 4, 48))
    assert rows[1, 3, (2 * size + 1) * 3 + 2] == images[1, 2, 4 + 2, 4 + 1]


def test_normalise_is_imagenet_s() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    got = normalise(images)
    assert got.dtype == torch.float32
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        torch.testing.assert_close(got[:, channel], ((images[:, channel].double() / 255 - mean) / std).float())


def test_standardise_is_mean_zero_and_unbiased_variance_one() -> None:
    rows = standardise(5 + 3 * random(4, 7, 48).bfloat16())
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.mean(-1), torch.zeros(4, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(-1), torch.ones(4, 7), atol=1e-5, rtol=0)
    assert torch.equal(standardise(torch.full((1, 1, 48), 2.0)), torch.zeros(1, 1, 48))


# Positions


@pytest.mark.parametrize(("grid", "width"), [(2, 4), (3, 8), (7, 96), (14, 768)])
def test_positions_are_the_plain_double_loop(grid: int, width: int) -> None:
    table = sincos_2d(grid, width, class_token=False)
    assert table.shape == (1, grid**2, width) and table.dtype == torch.float32
    quarter = width // 4
    expected = np.zeros((grid**2, width))
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                omega = 1 / 10000 ** (i / quarter)
                values = (
                    math.sin(column * omega),
                    math.cos(column * omega),
                    math.sin(row * omega),
                    math.cos(row * omega),
                )
                for part, value in enumerate(values):
                    expected[row * grid + column, part * quarter + i] = value
    assert np.abs(table[0].numpy() - expected).max() < 1e-6


def test_positions_equal_mae_s_meshgrid_where_width_goes_first() -> None:
    grid, width = 5, 24

    def one_axis(places: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4.0))
        out = np.einsum("m,d->md", places.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    mesh = np.stack(np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid, dtype=np.float64)))
    expected = np.concatenate([one_axis(mesh[0]), one_axis(mesh[1])], axis=1)
    got = sincos_2d(grid, width, class_token=True)[0].numpy()
    assert not got[0].any() and np.abs(got[1:] - expected).max() < 1e-6


@pytest.mark.parametrize("width", [2, 6, 98])
def test_positions_refuse_a_width_they_cannot_fill(width: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 4, not {width}"):
        sincos_2d(4, width, class_token=False)


# The block


def blocks(rate: float) -> tuple[KeyedBlock, Block]:
    ours = KeyedBlock(48, 3, qkv_bias=True, norm_layer=LayerNorm, drop_path=rate)
    theirs = Block(48, 3, qkv_bias=True, norm_layer=LayerNorm)
    with torch.no_grad():
        for index, parameter in enumerate(ours.parameters()):
            parameter.add_(0.1 * random(*parameter.shape, seed=index))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def branches(block: Block, x: Tensor, attention: Tensor, mlp: Tensor) -> Tensor:
    """timm's arithmetic with a factor [B] on each branch."""
    x = x + attention[:, None, None] * block.attn(block.norm1(x))
    return x + mlp[:, None, None] * block.mlp(block.norm2(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_block_without_a_draw_is_timm_s(rate: float, training: bool) -> None:
    ours, theirs = blocks(rate)
    x = random(3, 5, 48)
    ours.train(training), theirs.train(training)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours(x, attn_mask=mask), theirs(x, attn_mask=mask))
        assert not torch.equal(ours(x, attn_mask=mask), ours(x))


@pytest.mark.parametrize("rate", [0.1, 0.6])
def test_kept_branches_are_scaled_and_dropped_ones_are_not_there(rate: float) -> None:
    ours, theirs = blocks(rate)
    x = random(4, 5, 48)
    keep = torch.tensor([[True, True, False, False], [True, False, True, False]])
    factor = keep.float() / (1 - rate)
    with torch.no_grad():
        got, expected = ours(x, factors=ours.factors(keep)), branches(theirs, x, factor[0], factor[1])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(got[3], x[3])
        everything = ours(x, factors=ours.factors(torch.ones(2, 4, dtype=torch.bool)))
        torch.testing.assert_close(everything[0], got[0])
        assert not torch.allclose(everything[0], ours(x)[0], atol=1e-3)


def test_a_dropped_branch_gives_no_gradient_and_bf16_stays_bf16() -> None:
    ours, _ = blocks(0.5)
    ours(random(2, 5, 48), factors=ours.factors(torch.tensor([[False, False], [True, True]]))).sum().backward()
    assert not ours.attn.qkv.weight.grad.any() and ours.mlp.fc1.weight.grad.any()
    out = ours.bfloat16()(random(2, 5, 48).bfloat16(), factors=ours.factors(torch.ones(2, 2, dtype=torch.bool)))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["randsac", "pcae", "mae"])
def test_a_forward_pass_draws_from_no_global_generator(name: str, tiny_config: Any, images: Tensor) -> None:
    method = build_method(tiny_config(name, model__drop_path=0.5)).train()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    losses = []
    for _ in range(2):
        loss, _ = method(images, method.draw(torch.arange(4)))
        loss.backward()
        losses.append(float(loss))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert losses[0] == losses[1]


def test_drop_path_rates_rise_linearly(tiny_config: Any) -> None:
    encoder = build_method(tiny_config("mae", model__drop_path=0.3)).encoder
    assert [block.drop_rate for block in encoder.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])


# The encoder


@pytest.mark.parametrize("class_token", [True, False])
def test_our_path_through_the_encoder_is_timm_s(class_token: bool, tiny_config: Any, images: Tensor) -> None:
    cfg = tiny_config("mae")
    encoder = build_encoder(cfg.shape, 32, class_token=class_token, drop_path=0.0).eval()
    for index, parameter in enumerate(encoder.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    model = timm.create_model(cfg.shape.timm_name, **encoder_kwargs(cfg.shape, 32, class_token=class_token)).eval()
    model.load_state_dict(encoder.state_dict(), strict=True)
    ids = torch.arange(64).expand(4, -1)
    patches = patchify(normalise(images), 4)
    with torch.no_grad():
        expected = model.forward_features(normalise(images))
        if class_token:
            got = encode_visible(encoder, patches, ids, None)
        else:
            x = embed(encoder, patches, ids)
            for block in encoder.blocks:
                x = block(x)
            got = encoder.norm(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert encoder.pos_embed.requires_grad is False and encoder.norm.eps == model.norm.eps == 1e-6


def test_tokens_carry_their_own_position(tiny_config: Any, images: Tensor) -> None:
    method = build_method(tiny_config("mae"))
    ids = torch.tensor([[5, 0, 63], [1, 1, 2], [7, 8, 9], [60, 2, 0]])
    patches = patchify(normalise(images), 4)
    chosen = torch.stack([patches[i, ids[i]] for i in range(4)])
    every = embed(method.encoder, patches, torch.arange(64).expand(4, -1))
    some = embed(method.encoder, chosen, ids)
    torch.testing.assert_close(some, torch.stack([every[i, ids[i]] for i in range(4)]), atol=1e-6, rtol=0)


# First weights


def test_first_weights_follow_mae_s_rule(tiny_config: Any) -> None:
    named = dict(build_method(tiny_config("pcae", model__patch_size=8)).named_parameters())
    for name, value in named.items():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("cls_token", "mask_token"):
            assert 0.01 < float(value.std()) < 0.03 and abs(float(value.mean())) < 0.01, name
        elif kind == "bias":
            assert not value.any(), name
        elif ".norm" in name:
            assert (value == 1).all(), name
        elif kind == "weight":
            matrix = value.flatten(1)  # the fused qkv is one matrix, the patch convolution its flattened one
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.98 * bound < float(matrix.abs().max()) <= bound, name
            assert float(matrix.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    positions = sincos_2d(4, 96, class_token=True)
    assert torch.equal(named["encoder.pos_embed"], positions) and torch.equal(named["decoder.pos_embed"], positions)


def test_initialise_depends_on_seed_and_name_alone() -> None:
    first, second = nn.ModuleDict({"a": nn.Linear(3, 5)}), nn.ModuleDict({"z": nn.Linear(2, 2), "a": nn.Linear(3, 5)})
    other = nn.ModuleDict({"b": nn.Linear(3, 5)})
    state = torch.get_rng_state()
    for module, seed in ((first, 4), (second, 4), (other, 4)):
        initialise(module, seed, {})
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first["a"].weight, second["a"].weight)
    assert not torch.equal(first["a"].weight, other["b"].weight)
    initialise(second, 5, {"z.weight": torch.eye(2)})
    assert not torch.equal(first["a"].weight, second["a"].weight) and torch.equal(second["z"].weight, torch.eye(2))
    with pytest.raises(KeyError, match="nothing"):
        initialise(first, 0, {"nothing": torch.zeros(1)})


# timm beside a torchvision that does not load


def python(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    lines = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}" if path else code
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120, check=False)


def test_timm_imports_after_ours() -> None:
    done = python("import pipeline.vit, timm, torch\n"
                  "m = timm.create_model('vit_tiny_patch16_224', depth=1).eval()\n"
                  "print(tuple(m(torch.zeros(1, 3, 224, 224)).shape))")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 1000)"


def test_another_failure_of_torchvision_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('something else')\n")
    done = python("import pipeline.vit", tmp_path)
    assert done.returncode == 1 and "something else" in done.stderr.splitlines()[-1]


def test_statistics_that_an_evaluation_asked_for_first_let_gradients_pass() -> None:
    _statistics.cache_clear()
    with torch.inference_mode():
        normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    pixels = torch.zeros(1, 3, 2, 2, requires_grad=True)
    normalise(pixels).square().sum().backward()
    assert pixels.grad is not None
