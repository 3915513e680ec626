"""Seeds of `patchmill bench evidence` that ran elsewhere, added to those that ran here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_bench_evidence import SHORT, options, scored

from pipeline.bench.evidence import PROBES, plan, rows
from pipeline.bench.evidence_merge import Report, merged, merged_compression
from pipeline.bench.evidence_report import Compressed, EvidenceRow, Score
from pipeline.bench.evidence_run import run
from pipeline.config import UserError

ROWS = {"mae": [30.0, 34.0], "randsac_square": [36.0, 35.0]}


def only_seed(folder: Path, seed: int) -> Path:
    """A queue's folder with one seed's runs of `ROWS`."""
    scored(folder, ROWS)
    for name in ROWS:
        log = folder / f"{name}-seed{1 - seed}" / "log.jsonl"
        log.unlink()
        log.parent.rmdir()
    return folder


def written(folder: Path, seeds: str, out: Path, **changes: object) -> dict:
    assert run(options(folder, seeds=seeds, report=True, out=out, **changes)) == 0
    return json.loads(out.read_text())


def test_two_queues_with_a_seed_each_report_what_one_with_both_does(tmp_path, capsys):
    whole = scored(tmp_path / "whole", ROWS) and written(tmp_path / "whole", "0,1", tmp_path / "whole.json")
    written(only_seed(tmp_path / "a", 0), "0", tmp_path / "a.json")
    other = only_seed(tmp_path / "b", 1)
    # Raw pixels are probed once a queue, so here a second time.
    with (other / "mae-seed1" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "eval", "time": 1, "step": 0, "knn_pixels": 32.0, "linear_heads_pixels": 38.0,
                              "linear_pixels": 37.0}) + "\n")  # fmt: skip
    capsys.readouterr()
    found = written(other, "1", tmp_path / "b.json", others=(tmp_path / "a.json",))
    assert "32.00 ± 2.00" in capsys.readouterr().out
    assert found["seeds"] == [0, 1] and found["orderings"] == whole["orderings"]
    trained = [row for row in found["rows"] if row["encoder"]]
    for row in (*trained, *whole["rows"]):
        for score in (*row["scores"].values(), *row["gains"].values()):
            score["by_seed"] = dict(sorted(score["by_seed"].items()))
    assert trained == whole["rows"][:-1]
    assert found["rows"][-1]["scores"]["knn"] == {"by_seed": {"0": 32.0, "1": 32.0}, "mean": 32.0, "spread": 0.0}
    [where] = found["elsewhere"]
    assert set(where) == {"command", "date", "hardware", "load_average", "versions", "trained_with"}
    assert whole["elsewhere"] == []


def row(
    name: str,
    scores: dict[int, float],
    *,
    images: int = 64,
    cpu_s: float | None = 10.0,
    encoder: str | None = "mae vit_p/4",
) -> EvidenceRow:
    return EvidenceRow(
        name, encoder, [], images, 1.0, float(images), cpu_s, dict.fromkeys(PROBES, Score.of(scores)), {}
    )


def report(*rows: EvidenceRow, compression: tuple[Compressed, ...] = ()) -> Report:
    return Report(list(rows), list(compression), [1], {})


def test_what_only_one_has_stays_and_the_trained_come_first():
    pixels = row("raw pixels", {1: 9.0}, images=0, encoder=None)
    own = [row("mae", {0: 1.0}), row("untrained mae vit_p/4", {0: 5.0}, images=0), pixels]
    there = report(row("blob", {1: 2.0}), row("untrained blob", {1: 3.0}, images=0), pixels)
    assert [one.name for one in merged(own, there)] == [
        "mae",
        "blob",
        "untrained mae vit_p/4",
        "untrained blob",
        "raw pixels",
    ]


def test_cpu_seconds_are_a_mean_over_all_seeds_and_unknown_where_a_part_is():
    one, two = row("mae", {0: 1.0}, cpu_s=10.0), row("mae", {1: 1.0, 2: 4.0}, cpu_s=40.0)
    assert merged([one], report(two))[0].cpu_s == 30.0
    assert merged([one], report(row("mae", {1: 1.0}, cpu_s=None)))[0].cpu_s is None
    assert merged([one], report(two))[0].scores["knn"] == Score.of({0: 1.0, 1: 1.0, 2: 4.0})


def test_a_seed_that_is_in_both_is_ours_and_gains_are_taken_anew():
    own = [row("mae", {0: 7.0, 1: 9.0}), row("untrained mae vit_p/4", {0: 4.0}, images=0)]
    found = {one.name: one for one in merged(own, report(row("untrained mae vit_p/4", {0: 5.0, 1: 6.0}, images=0)))}
    assert (
        found["untrained mae vit_p/4"].scores["knn"].by_seed == {0: 4.0, 1: 6.0}
        and not found["untrained mae vit_p/4"].gains
    )
    assert found["mae"].gains["exact"].by_seed == {0: 3.0, 1: 3.0}


def lacked(folder: Path, there: Report, seeds: list[int]) -> list[str]:
    return [one.name for one in plan(folder, rows(list(ROWS), SHORT), seeds) if there.lacks(one)]


def test_what_is_there_with_all_its_probes_is_not_run_again(tmp_path):
    written(only_seed(tmp_path / "a", 0), "0", tmp_path / "a.json")
    there = Report.read(tmp_path / "a.json")
    assert lacked(tmp_path, there, [0, 1]) == ["mae-seed1", "randsac_square-seed1"]
    for weights in ("model", "untrained", "pixels"):
        cut = json.loads((tmp_path / "a.json").read_text())
        name = {"model": "mae", "untrained": "untrained mae vit_p/4", "pixels": "raw pixels"}[weights]
        cut["rows"] = [one for one in cut["rows"] if one["name"] != name]
        (tmp_path / "cut.json").write_text(json.dumps(cut))
        assert lacked(tmp_path, Report.read(tmp_path / "cut.json"), [0]) == ["mae-seed0"], weights
    assert run(options(tmp_path / "none", seeds="0", out=tmp_path / "c.json", others=(tmp_path / "a.json",))) == 0
    assert (
        json.loads((tmp_path / "c.json").read_text())["rows"] == json.loads((tmp_path / "a.json").read_text())["rows"]
    )


def test_pcae_is_run_again_until_its_classifier_is_there(tmp_path):
    [one] = plan(tmp_path, rows(["pcae_similarity"], SHORT), [0])
    names = {"pcae_similarity": one.images, "untrained pcae vit_p/4": 0, "raw pixels": 0}
    found = [replace(row(name, {0: 1.0}, images=images), settings=list(one.row.settings) if images else [], flops=one.flops)
             for name, images in names.items()]  # fmt: skip
    assert report(*found).lacks(one)
    assert not report(*found, compression=(Compressed(0.0, 30.0, Score.of({0: 60.0}), 90.0),)).lacks(one)
    assert report(*found, compression=(Compressed(0.0, 30.0, Score.of({1: 60.0}), 90.0),)).lacks(one)


def test_drop_ratios_are_joined_and_sorted():
    own = [Compressed(0.4, 22.0, Score.of({0: 50.0}), 100.0), Compressed(0.0, 30.0, Score.of({0: 60.0}), 90.0)]
    there = [
        Compressed(0.4, 22.0, Score.of({1: 52.0, 2: 54.0}), 130.0),
        Compressed(0.2, 25.0, Score.of({1: 55.0}), 95.0),
    ]
    found = merged_compression(own, report(compression=tuple(there)))
    assert [one.ratio for one in found] == [0.0, 0.2, 0.4]
    assert found[2].top1 == Score.of({1: 52.0, 2: 54.0, 0: 50.0}) and found[2].images_per_s == 120.0


def test_a_row_of_other_settings_is_refused_before_any_work(tmp_path):
    written(only_seed(tmp_path / "a", 0), "0", tmp_path / "a.json")
    changes = (*SHORT, "optim.clip=2.0")
    with pytest.raises(UserError, match="mae was run with other settings there: .*, 1280 images; not .*clip=2.0"):
        run(options(tmp_path / "b", seeds="1", changes=changes, others=(tmp_path / "a.json",)))
    assert not (tmp_path / "b").exists()


def test_a_report_of_other_probes_is_refused(tmp_path):
    written(only_seed(tmp_path / "a", 0), "0", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    for one in found["rows"]:
        del one["scores"]["exact"]
    (tmp_path / "a.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="a.json: is no report"):
        Report.read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("{", "is no report"),
        ("[]", "is no report"),
        ('{"rows": [{"name": "mae"}], "compression": [], "seeds": [0]}', "is no report"),
    ],
)
def test_a_file_that_is_no_report_is_one_clear_line(tmp_path, content, problem):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"--with .*x.json: {problem}"):
        run(options(tmp_path / "b", others=(path,)))
