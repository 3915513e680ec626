"""The shipped configurations: each is valid, says what it is, and lists overrides that are valid too."""

import re
from pathlib import Path

import pytest
import yaml
from test_costs import counted

from pipeline.config import CONFIG_DIR, find_config, load_config
from pipeline.estimate import flops_per_image
from pipeline.methods import build_method
from slurm.space import read_space
from slurm.sweep import configure

NAMES = [str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in sorted(CONFIG_DIR.glob("*/*.yaml"))]
SPACES = [name for name in NAMES if name.startswith("sweep/")]
FRAGMENTS = [name for name in NAMES if "name" not in yaml.safe_load(find_config(name).read_text()).get("method", {})]
RECIPES = [name for name in NAMES if name not in FRAGMENTS]
BASE = ["run.dir=runs/x", "data.train=train.beton"]


def header(name: str) -> str:
    lines = Path(find_config(name)).read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def rows() -> list[str]:
    """Lines of a table and a row, published figures, and overrides."""
    return re.findall(r"^#   (T\d .+)$", header("cifar10/randsac_vit_s"), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SPACES])
def test_a_header_says_what_it_is_on_what_and_the_command(name: str) -> None:
    text = header(name)
    verb = "submit" if name.startswith("slurm/") else "train"
    assert "Hardware:" in text and f"Command: patchmill {verb} {'' if name in RECIPES else 'imagenet/'}" in text
    assert ("Expected" in text or "Nothing is published" in text) == (name in RECIPES)
    command = re.sub(r"--nproc \d+", "", text.split(f"Command: patchmill {verb} ")[1].splitlines()[0]).split()
    cfg = load_config([word for word in command if "=" not in word], [word for word in command if "=" in word])
    assert name in command and flops_per_image(cfg).step > 0


@pytest.mark.parametrize("name", SPACES)
def test_a_space_says_what_it_is_and_each_of_its_points_is_valid(name: str) -> None:
    text = header(name)
    words = text.split(f"Command: patchmill sweep {name} ")[1].splitlines()[0].split()
    space = read_space(name)
    points = configure(space, [word for word in words if "=" not in word], [word for word in words if "=" in word])
    assert "Hardware:" in text and len(points) >= (space.parallel or 0) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_costs_what_torch_counts(name: str) -> None:
    cfg = load_config([name], BASE)
    estimate, (forward, step) = flops_per_image(cfg), counted(cfg)
    assert estimate.forward == pytest.approx(forward, rel=1e-3) and estimate.step == pytest.approx(step, rel=1e-3)
    parameters = sum(p.numel() for p in build_method(cfg, "meta").encoder.parameters())
    published = {"vit_b": 86e6, "vit_l": 304e6, "vit_h": 632e6, "vit_s": 21.5e6}
    if cfg.model.name in published:
        assert parameters == pytest.approx(published[cfg.model.name], rel=0.03)


def test_every_row_of_the_papers_tables_is_there() -> None:
    counts = {table: sum(row.startswith(table) for row in rows()) for table in ("T1", "T2", "T3", "T4", "T5", "T6")}
    assert counts == {"T1": 2, "T2": 2, "T3": 3, "T4": 3, "T5": 10, "T6": 9}


@pytest.mark.parametrize("row", rows())
def test_a_row_of_the_papers_tables_is_valid(row: str) -> None:
    overrides = re.findall(r"\S+=\S+", row)
    cfg = load_config(["cifar10/randsac_vit_s"], [*BASE, "method.skip=none", *overrides])
    assert flops_per_image(cfg).step == pytest.approx(counted(cfg)[1], rel=1e-3)
    squares = re.search(r"T\d square (\d+)(?:->(\d+))?", row)
    method, grid = cfg.method, cfg.grid
    if "T6" in row and squares:
        assert (grid // method.segment_size) ** 2 == int(squares[1])
        assert (method.order == "hierarchical") == bool(squares[2])
    elif "T3" in row:
        assert method.segment_size == int(squares[1])
    blobs = re.search(r"blobs? (\d+)(?:->(\d+))?", row)
    if blobs:
        assert method.segments == "blob" and method.num_segments == int(blobs[1])
        assert (method.order == "hierarchical") == bool(blobs[2])
        assert not blobs[2] or method.num_partitions == int(blobs[2])
    assert method.shuffled == ("shuffled" in row) and (method.order == "raster") == ("raster" in row)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("imagenet")])
def test_ablations_named_in_a_header_are_valid(name: str) -> None:
    text = header(name).split("Ablations:")[1].split("Command:")[0]
    overrides = re.findall(r"(?:method|model)\.\w+=[\w.]+", text)
    fragments = [word for word in re.findall(r"decoder/\w+", text)]
    assert overrides and fragments
    for override in overrides:
        load_config([name], [*BASE, override])
    for fragment in fragments:
        load_config([name, fragment], BASE)
