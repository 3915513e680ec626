"""The gallery of a run: a file a kind in its figures and in its store, and one clear line for what is not there."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline import checkpoint, pictures, tracking
from pipeline.cli import Kind, app
from pipeline.config import Config, UserError
from pipeline.methods import METHODS, build_method
from pipeline.mlflow_run import STATE, load_state, prepare_mlflow, save_state
from pipeline.tracking import send_figures
from pipeline.visualize import DRAWN, EVERY, MAX_STEPS, OWN, choose, visualize


def write_run(folder: Path, cfg: Config) -> Path:
    """Its first weights as a checkpoint of step 7."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(cfg.to_yaml())
    method = build_method(cfg)
    tensors = {f"model.{name}": value.detach() for name, value in method.named_parameters()}
    if cfg.method.name == "pcae":
        tensors |= {f"ema.{n}": p.detach().clone() for n, p in method.named_parameters()
                    if n.startswith("encoder.") and p.requires_grad}  # fmt: skip
    checkpoint.save(folder / "checkpoints", 7, tensors, {"step": 7})
    return folder


@pytest.fixture(scope="module")
def runs(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: write_run(folder / name, tiny_config(name, data__num_samples=20)) for name in ("mae", "pcae", "randsac")
    }


KINDS = {
    "mae": ["method", "attention"],
    "pcae": ["method", "attention", "kept"],
    "randsac": ["method", "attention", "generation", "free", "ranks"],
}


@pytest.mark.parametrize("name", KINDS)
def test_a_run_has_a_picture_of_each_kind_with_a_name_that_stays(
    runs: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = list[object]()
    monkeypatch.setattr("pipeline.visualize.send_figures", lambda *asked: sent.append(asked))
    expected = [kind if kind != "attention" else "attention_block04" for kind in KINDS[name]]
    paths = visualize(runs[name], 1)
    assert paths == [runs[name] / "figures" / f"{name}_step00000007_{kind}.png" for kind in expected]
    assert sent == [(runs[name], paths)]
    for path in paths:
        pixels = np.asarray(Image.open(path))
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 20


def test_some_kinds_a_block_and_a_folder_can_be_chosen(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = list[int](), pictures.attention_maps
    monkeypatch.setattr("pipeline.visualize.send_figures", lambda *_: pytest.fail("they are not in the run's figures"))
    monkeypatch.setattr(pictures, "attention_maps", lambda *asked: seen.append(asked[2]) or real(*asked))
    asked = ["visualize", str(runs["mae"]), "--kind", "attention", "--images", "1", "--out", str(tmp_path / "a" / "b")]
    result = CliRunner().invoke(app, [*asked, "--block", "2"])
    assert result.exit_code == 0
    first = tmp_path / "a" / "b" / "mae_step00000007_attention_block02.png"
    assert result.output.split() == [str(first)] and list(first.parent.iterdir()) == [first]
    (second,) = visualize(runs["mae"], 1, ["attention"], None, tmp_path)
    assert first.read_bytes() != second.read_bytes() and seen == [1, 3]


def test_many_steps_are_thinned_out_evenly(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = DRAWN["generation"].__globals__["panels"]
    monkeypatch.setitem(DRAWN["generation"].__globals__, "panels",
                        lambda columns, title: seen.append([name for name, _ in columns]) or real(columns, title))  # fmt: skip
    cfg = tiny_config("randsac", method__segment_size=1, data__num_samples=20)
    visualize(write_run(tmp_path / "run", cfg), 1, ["generation"])
    (names,) = seen
    assert names[:2] == ["image", "given"] and names[-1] == "segment 63" and len(names) == MAX_STEPS + 1
    assert np.ptp(np.diff([int(name.split()[1]) for name in names[2:]])) <= 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kinds": ["kept"]}, "--kind kept: mae has no such picture; it has method, attention"),
        ({"block": 5}, "--block 5: the encoder has blocks 1 to 4"),
        ({"out": "config.yaml"}, "config.yaml: is a file; name a folder"),
    ],
)
def test_what_is_not_there_is_one_clear_line(runs: dict[str, Path], settings: dict[str, object], says: str) -> None:
    if "out" in settings:
        settings = {"out": runs["mae"] / str(settings["out"])}
    with pytest.raises(UserError) as error:
        visualize(runs["mae"], 1, **settings)  # type: ignore[arg-type]
    assert says in str(error.value) and "\n" not in str(error.value)


def test_every_kind_can_be_asked_for_and_drawn() -> None:
    assert {kind.value for kind in Kind} == set(DRAWN) == {*EVERY, *(kind for kinds in OWN.values() for kind in kinds)}
    assert OWN.keys() <= METHODS.keys() and list(choose("randsac", [])) == KINDS["randsac"]
    assert list(choose("pcae", ["kept", "method", "kept"])) == ["kept", "method"]


def test_pictures_take_the_place_of_those_of_their_name_in_the_runs_store(run_dir: Path, uri: str) -> None:
    from mlflow import MlflowClient

    picture = run_dir / "one.png"
    picture.write_bytes(b"first")
    assert send_figures(run_dir, [picture]) is None, "it was never sent"
    prepare_mlflow()
    client = MlflowClient(uri)
    experiment = client.create_experiment("test", artifact_location=(run_dir / "store").as_uri())
    run_id = client.create_run(experiment).info.run_id
    save_state(run_dir, load_state(run_dir) | {"run_id": run_id, "uri": uri})
    for content in (b"first", b"second"):
        picture.write_bytes(content)
        assert send_figures(run_dir, [picture]) == uri
        (file,) = (run_dir / "store").rglob("figures/one.png")
        assert file.read_bytes() == content


def test_a_store_that_is_away_is_a_warning(run_dir: Path, closed_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(tracking.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    picture = run_dir / "one.png"
    picture.write_bytes(b"png")
    (run_dir / STATE).write_text(json.dumps(load_state(run_dir) | {"run_id": "a", "uri": closed_port}))
    assert send_figures(run_dir, [picture]) is None
    assert len(said) == 1 and "patchmill sync sends the pictures later" in said[0]
