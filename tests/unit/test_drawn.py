"""The drawn images: their layout, balance, determinism and looks."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import drawn as module
from pipeline.config import UserError
from pipeline.drawn import CLASSES, MARKER, draw_image, draw_images


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "images"
    draw_images(folder, num_train=60, num_test=30, seed=3)
    return folder


def test_layout_and_balance(drawn: Path) -> None:
    for split, each in (("train", 6), ("test", 3)):
        assert sorted(path.name for path in (drawn / split).iterdir()) == sorted(CLASSES)
        assert {len(list((drawn / split / name).iterdir())) for name in CLASSES} == {each}
    assert (drawn / "train" / "vertical_stripes" / "00011.jpg").is_file()


def test_files_are_rgb_jpegs_close_to_the_drawing_and_vary_in_size(drawn: Path) -> None:
    sides, differences = set(), []
    for path in drawn.glob("*/*/*.jpg"):
        split = ("train", "test").index(path.parts[-3])
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.mode == "RGB" and image.width == image.height
            decoded = np.asarray(image, np.int16)
        sides.add(decoded.shape[0])
        differences.append(np.abs(decoded - draw_image(3, split, int(path.stem))).mean())
    assert len(sides) > 8 and min(sides) >= 32 and max(sides) <= 48
    # Of 255: 2.9 at quality 95 and full colour resolution, 4.2 at quality 90, 5.6 at half colour resolution.
    assert np.mean(differences) < 3.5


def test_another_run_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    np.random.seed(99)  # nothing may be drawn from the global generator
    draw_images(tmp_path / "again", num_train=60, num_test=30, seed=3)
    assert contents(tmp_path / "again") == contents(drawn)


def test_an_image_depends_on_seed_split_and_index_alone(drawn: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "fewer", num_train=20, num_test=10, seed=3)
    whole = contents(drawn)
    assert all(whole[name] == digest for name, digest in contents(tmp_path / "fewer").items() if name != MARKER)
    images = [draw_image(*key).tobytes() for key in ((3, 0, 5), (4, 0, 5), (3, 1, 5), (3, 0, 15))]
    assert len(set(images)) == 4


def test_second_call_does_nothing(drawn: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    calls: list[int] = []
    draw_images(drawn, num_train=60, num_test=30, seed=3, progress=lambda done, total: calls.append(done))
    assert not calls and before == {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}


def test_progress_counts_every_image(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    draw_images(tmp_path / "x", num_train=12, num_test=5, seed=0, progress=lambda *call: calls.append(call))
    assert calls == [(done, 17) for done in range(1, 18)]


@pytest.mark.parametrize("settings", [{"num_train": 61}, {"num_test": 31}, {"seed": 4}])
def test_other_settings_in_the_same_folder_are_refused(drawn: Path, settings: dict[str, int]) -> None:
    before = contents(drawn)
    with pytest.raises(UserError, match="remove it"):
        draw_images(drawn, **{"num_train": 60, "num_test": 30, "seed": 3, **settings})
    assert contents(drawn) == before


def test_a_users_folder_is_left_alone_and_an_empty_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="mine"):
        draw_images(tmp_path / "mine", num_train=10, num_test=0, seed=0)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    (tmp_path / "empty").mkdir()
    draw_images(tmp_path / "empty", num_train=10, num_test=0, seed=0)
    assert json.loads((tmp_path / "empty" / MARKER).read_text())["num_train"] == 10


def test_an_interrupted_call_leaves_no_folder_and_the_next_starts_clean(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_images(tmp_path / "x", num_train=20, num_test=0, seed=0, progress=stop)
    assert not (tmp_path / "x").exists()
    draw_images(tmp_path / "x", num_train=10, num_test=0, seed=1)
    assert len(contents(tmp_path / "x")) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def _energy(index_class: int, axis: int) -> float:
    """Mean absolute difference between neighbours along an axis (0: down, 1: right), over 40 images of a class."""
    images = [draw_image(0, 0, index_class + 10 * turn).astype(float).mean(2) for turn in range(40)]
    return float(np.mean([np.abs(np.diff(image, axis=axis)).mean() for image in images]))


def test_stripes_run_as_their_names_say() -> None:
    assert _energy(CLASSES.index("horizontal_stripes"), 0) > 2 * _energy(CLASSES.index("horizontal_stripes"), 1)
    assert _energy(CLASSES.index("vertical_stripes"), 1) > 2 * _energy(CLASSES.index("vertical_stripes"), 0)
    for name in ("checks", "diagonal_stripes", "dots"):
        assert 0.7 < _energy(CLASSES.index(name), 0) / _energy(CLASSES.index(name), 1) < 1.4


def test_patterns_fill_the_image_and_shapes_do_not() -> None:
    patterns = [_energy(label, 0) + _energy(label, 1) for label in range(5)]
    shapes = [_energy(label, 0) + _energy(label, 1) for label in range(5, 10)]
    assert min(patterns) > 1.2 * max(shapes)


def test_colour_says_nothing_about_the_class() -> None:
    means = np.array([[draw_image(0, 0, label + 10 * turn).mean((0, 1)) for turn in range(60)] for label in range(10)])
    # Class means of a channel scatter as 60 independent draws do: by the spread within a class over sqrt(60).
    spread = means.std(1).mean() / np.sqrt(60)
    assert np.abs(means.mean(1) - means.mean((0, 1))).max() < 4 * spread


def test_the_two_colours_differ_in_lightness() -> None:
    rng = np.random.default_rng(0)
    pairs = [module._colour_pair(rng) for _ in range(300)]
    gaps = np.array([(first - second) @ module.LUMA for first, second in pairs])
    assert np.abs(gaps).min() > 0.25
    assert 0.3 < (gaps > 0).mean() < 0.7
    assert all(colour.min() >= 0 and colour.max() <= 1 for pair in pairs for colour in pair)


def test_bars_cover_a_small_part_of_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    cover, shares = module._cover, []

    def measured(rng: np.random.Generator, image: module.Plane, x: module.Plane, y: module.Plane) -> None:
        before = image.copy()
        cover(rng, image, x, y)
        shares.append((image != before).any(-1).mean())

    monkeypatch.setattr(module, "_cover", measured)
    for index in range(60):
        draw_image(0, 0, index)
    assert len(shares) == 60 and min(shares) > 0 and max(shares) < 0.2 and 0.02 < np.mean(shares) < 0.1
