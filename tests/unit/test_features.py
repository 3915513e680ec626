"""Feature extraction: which tokens are averaged, in which mode, in which order, and the cache."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import UserError
from pipeline.evaluate.features import Features, cached, check_probe, extract, pixels
from pipeline.evaluate.heads import heads_accuracy
from pipeline.evaluate.knn import knn_accuracy
from pipeline.evaluate.linear import linear_accuracy
from pipeline.vit import VisionTransformer, normalise


class FakeLoader:
    """Images [N, 3, 8, 8] and labels in memory behind the loaders' face; remembers whether its iterator was closed."""

    def __init__(self, num: int = 10, side: int = 8, num_classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=generator)
        self.all_labels = torch.arange(num) % num_classes
        self.num_samples = num
        self.sizes: list[int] = []
        self.closed = 0

    def labels(self) -> np.ndarray:
        return self.all_labels.numpy()

    def batches(self, order: Iterator[tuple[int, np.ndarray]], device: torch.device) -> "FakeLoader":
        self.order = order
        return self

    def __enter__(self) -> Iterator[Any]:
        for _, ids in self.order:
            self.sizes.append(len(ids))
            yield SimpleNamespace(images=self.images[ids], labels=self.all_labels[ids], ids=torch.as_tensor(ids))

    def __exit__(self, *error: object) -> None:
        self.closed += 1


def build(class_token: bool, depth: int = 2, **options: Any) -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(img_size=8, patch_size=4, embed_dim=24, depth=depth, num_heads=3, class_token=class_token,
                             global_pool="", num_classes=0, **options)  # fmt: skip


def by_hand(encoder: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Each block's tokens through the final norm, from timm's parts: embedding, blocks, norm."""
    tokens = []
    with torch.no_grad():
        x = encoder._pos_embed(encoder.patch_embed(normalise(images)))
        for block in encoder.blocks:
            x = block(x)
            tokens.append(encoder.norm(x))
    return tokens


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("depth", [2, 6])
def test_features_are_means_of_patch_tokens_and_the_class_token_after_the_norm(class_token: bool, depth: int) -> None:
    loader, encoder = FakeLoader(), build(class_token, depth).eval()
    with torch.no_grad():
        encoder.norm.weight.uniform_(0.5, 2)
        encoder.norm.bias.uniform_(-1, 1)
    made = extract(encoder, loader, batch_size=4, device="cpu")
    tokens = by_hand(encoder, loader.images)
    means = [each[:, int(class_token) :].mean(1) for each in tokens]
    torch.testing.assert_close(made.features, means[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.others["last4"], torch.cat(means[-4:], 1), rtol=1e-4, atol=1e-5)
    assert set(made.others) == ({"last4", "cls"} if class_token else {"last4"})
    if class_token:
        torch.testing.assert_close(made.others["cls"], tokens[-1][:, 0], rtol=1e-4, atol=1e-5)
    assert made.features.dtype == torch.float32 and made.labels.dtype == torch.int64
    assert torch.equal(made.labels, loader.all_labels)


def test_every_image_is_seen_once_in_order_whatever_the_batch() -> None:
    encoder, loader = build(True), FakeLoader()
    small = extract(encoder, loader, batch_size=4, device="cpu")
    assert loader.sizes == [4, 4, 2] and loader.closed == 1
    whole = extract(encoder, FakeLoader(), batch_size=64, device="cpu")
    torch.testing.assert_close(small.features, whole.features, rtol=1e-5, atol=1e-6)


def test_dropout_is_off_and_every_mode_is_restored() -> None:
    encoder = build(True, drop_path_rate=0.5, proj_drop_rate=0.5).train()
    encoder.patch_embed.eval()  # a frozen part stays as it was
    modes = {name: part.training for name, part in encoder.named_modules()}
    first = extract(encoder, FakeLoader(), batch_size=4, device="cpu")
    second = extract(encoder, FakeLoader(), batch_size=4, device="cpu")
    assert torch.equal(first.features, second.features)
    assert {name: part.training for name, part in encoder.named_modules()} == modes
    assert len(set(modes.values())) == 2


def test_mode_is_restored_and_the_loader_closed_after_an_error() -> None:
    encoder, loader = build(True).train(), FakeLoader(side=12)  # the encoder refuses this size
    with pytest.raises(AssertionError):
        extract(encoder, loader, batch_size=4, device="cpu")
    assert encoder.training and loader.closed == 1


def test_features_carry_no_gradient_but_a_probe_can_be_fitted_on_them() -> None:
    encoder = build(True)
    train = extract(encoder, FakeLoader(60), batch_size=16, device="cpu")
    assert not train.features.requires_grad and not train.features.is_inference() and not train.labels.is_inference()
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert linear_accuracy(train, train, num_classes=3) > 50
    assert knn_accuracy(train, train, num_classes=3, k=1) == 100


def test_pixels_are_flat_values_in_0_to_1_and_large_images_are_averaged() -> None:
    loader = FakeLoader()
    made = pixels(loader, batch_size=4, device="cpu")
    torch.testing.assert_close(made.features, loader.images.flatten(1) / 255)
    assert torch.equal(made.labels, loader.all_labels)
    halved = pixels(loader, batch_size=4, device="cpu", size=4).features.view(10, 3, 4, 4)
    expected = loader.images.float().view(10, 3, 4, 2, 4, 2).mean((3, 5)) / 255
    torch.testing.assert_close(halved, expected)


KEY = {"checkpoint": "abc", "image_set": "def"}


def counting() -> tuple[Any, list[int]]:
    calls: list[int] = []

    def compute() -> Features:
        calls.append(1)
        values = torch.full((4, 2), float(len(calls)))
        return Features(values, torch.tensor([0, 1, 0, 1]), {"cls": values + 1, "last4": values + 2})

    return compute, calls


def test_cache_is_read_back_equal(tmp_path: Path) -> None:
    compute, calls = counting()
    path = tmp_path / "new" / "features.safetensors"
    first, second = cached(path, KEY, compute), cached(path, dict(reversed(KEY.items())), compute)
    assert len(calls) == 1
    assert torch.equal(first.features, second.features) and torch.equal(first.labels, second.labels)
    assert set(second.others) == {"cls", "last4"}
    assert all(torch.equal(first.others[name], second.others[name]) for name in first.others)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("key", [{**KEY, "checkpoint": "x"}, {**KEY, "image_set": "x"}, {**KEY, "crop": "1"}, {}])
def test_stale_cache_is_computed_again_and_replaced(tmp_path: Path, key: dict[str, str]) -> None:
    compute, calls = counting()
    path = tmp_path / "features.safetensors"
    cached(path, KEY, compute)
    assert cached(path, key, compute).features[0, 0] == 2
    assert cached(path, key, compute).features[0, 0] == 2 and len(calls) == 2


def test_a_file_of_a_version_that_kept_the_mean_only_is_stale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compute, calls = counting()
    path = tmp_path / "features.safetensors"
    save_file({"features": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64)}, path, metadata=KEY)
    assert "cls" in cached(path, KEY, compute).others and len(calls) == 1
    assert "cls" in cached(path, KEY, compute).others and len(calls) == 1
    assert not caplog.text  # nothing is wrong with it


@pytest.mark.parametrize("length", [0, 5, -1])
def test_damaged_cache_is_computed_again_and_said_so(
    tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    compute, calls = counting()
    path = tmp_path / "features.safetensors"
    cached(path, KEY, compute)
    path.write_bytes(path.read_bytes()[:length])
    with caplog.at_level("WARNING", logger="patchmill"):
        assert cached(path, KEY, compute).features[0, 0] == 2
    assert "features.safetensors is damaged" in caplog.text
    assert cached(path, KEY, compute).features[0, 0] == 2 and len(calls) == 2


def test_failed_computation_leaves_no_cache(tmp_path: Path) -> None:
    def fail() -> Features:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached(tmp_path / "features.safetensors", KEY, fail)
    assert list(tmp_path.iterdir()) == []


def some(num: int = 6, width: int = 4) -> Features:
    return Features(torch.randn(num, width, generator=torch.Generator().manual_seed(0)), torch.arange(num) % 3)


def broken(**change: Any) -> Features:
    return Features(**{"features": some().features, "labels": some().labels, **change})


NAN = some().features.clone()
NAN[2, 1] = float("nan")
INF = some().features.clone()
INF[4, 0] = float("inf")
PROBLEMS = [
    (broken(features=NAN), some(), "training features of image 2 are not finite"),
    (some(), broken(features=INF), "test features of image 4 are not finite"),
    (broken(features=torch.ones(6, 4)), some(), "same features"),
    (broken(labels=torch.full((6,), 2)), some(), "have the label 2"),
    (some(), broken(labels=torch.full((6,), 3)), "test labels go from 3 to 3"),
    (broken(labels=torch.arange(6) % 3 - 1), some(), "training labels go from -1 to 1"),
    (some(), some(width=5), "4 columns, test features 5"),
    (some(0), some(), "training set of the probe is empty"),
    (some(), some(0), "test set of the probe is empty"),
]


HEADS = partial(heads_accuracy, lrs=(0.1,), epochs=1, batch_size=4, seed=0)


@pytest.mark.parametrize("probe", [knn_accuracy, linear_accuracy, HEADS], ids=["knn", "linear", "heads"])
@pytest.mark.parametrize(("train", "test", "message"), PROBLEMS, ids=[problem[2] for problem in PROBLEMS])
def test_unusable_features_are_refused_in_one_line(probe: Any, train: Features, test: Features, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        probe(train, test, num_classes=3)
    assert "\n" not in str(caught.value)


def test_usable_features_pass() -> None:
    check_probe(some(), some(), 3)
    one_constant_column = some().features.index_fill(1, torch.tensor([2]), 5.0)
    check_probe(broken(features=one_constant_column), some(), 3)
    check_probe(some(), broken(labels=torch.zeros(6, dtype=torch.int64)), 3)  # one class only in the test set is fine


@pytest.mark.parametrize("how", ["a file for a folder", "a folder for a file"])
def test_features_that_cannot_be_kept_are_there_all_the_same(how, tmp_path, caplog):
    path = tmp_path / "features" / "a.safetensors"
    if how == "a file for a folder":
        path.parent.write_text("")
    else:
        path.mkdir(parents=True)
    made = Features(torch.ones(2, 3), torch.arange(2))
    found = cached(path, {"a": "b"}, lambda: made)
    assert torch.equal(found.features, made.features) and "cannot be written" in caplog.text
