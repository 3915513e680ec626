"""Engines of 1, 2 and 4 processes compute the same, and the table that says so shows each fault that is put in."""

from dataclasses import replace

import pytest
import torch

from pipeline.bench import parity
from pipeline.bench.parity import (
    EXACT,
    ROUNDED,
    STEADY,
    Case,
    Trace,
    bars_of,
    choose_engines,
    compare,
    differences,
    reference,
    require_telling,
    shaken,
    trace_cases,
)
from pipeline.config import UserError

pytestmark = pytest.mark.timeout(900)  # starting processes on a busy machine takes minutes

SHARDED = [name for name in choose_engines("all") if name != "single"]
SAME = [Case("pcae", engine) for engine in SHARDED] + [Case("mae", engine) for engine in ("fsdp2-2", "zero1-2")]
SAME += [Case("randsac", engine) for engine in ("ddp4", "fsdp2-2", "hsdp2x2", "zero2-2", "zero3-2")]
SAME += [Case("finetune", engine) for engine in ("ddp2", "fsdp2-2", "zero1-2", "zero2-2", "zero3-2")]
CLOSE = [Case("pcae", engine, "bf16") for engine in ("ddp2", "fsdp2-2", "zero1-2", "zero2-2", "zero3-2")]
BROKEN = [Case("pcae", "fsdp2-2", mutation=fault) for fault in ("no_ema", "divided_twice", "local_norm")]
BROKEN += [
    Case("pcae", engine, mutation=fault)
    for engine in ("ddp2", "zero2-2", "zero3-2")
    for fault in ("no_ema", "divided_twice")
]
BROKEN_BF16 = [
    Case("pcae", engine, "bf16", fault)
    for engine in ("fsdp2-2", "zero2-2", "zero3-2")
    for fault in ("no_ema", "divided_twice")
]
STEPS = 8


@pytest.fixture(scope="module")
def traces() -> dict[Case, Trace]:
    cases = [*SAME, *CLOSE, *BROKEN, *BROKEN_BF16]
    needed = [*map(reference, cases), *(Case(case.method, "single", case.precision) for case in cases)]
    copies = [copy for case in cases for copy in shaken(case)]
    return trace_cases(list(dict.fromkeys([*needed, *copies, *cases])), STEPS)


@pytest.mark.parametrize("case", SAME + CLOSE, ids=lambda case: case.name)
def test_a_case_computes_what_its_reference_does(traces, case):
    require_telling(case, traces[reference(case)])
    row = compare(case, traces)
    assert row.passed, str(row)
    assert row.same_start


@pytest.mark.parametrize("case", BROKEN + BROKEN_BF16, ids=lambda case: case.name)
def test_a_fault_turns_the_table_red(traces, case):
    row = compare(case, traces)
    assert not row.passed, str(row)


@pytest.mark.parametrize("case", BROKEN_BF16, ids=lambda case: case.name)
def test_a_fault_in_bf16_is_farther_off_than_the_reference_moves_by_itself(traces, case):
    row = compare(case, traces)
    figures = row.loss, row.norm, row.ema, row.pred
    assert any(value > bar for value, bar in zip(figures, row.bars, strict=True)), f"{row} {row.bars}"


def test_a_shaken_copy_starts_elsewhere_by_the_least_and_the_bars_follow_it(traces):
    case = Case("pcae", "zero3-2", "bf16")
    expected, copies = traces[reference(case)], [traces[copy] for copy in shaken(case)]
    assert len({trace.initial for trace in (expected, *copies)}) == 1 + len(copies)
    for copy in copies:
        assert copy.losses[0] == pytest.approx(expected.losses[0], rel=STEADY.loss)
        for name, value in copy.first_ema.items():
            first = expected.first_ema[name]
            assert bool(((value - first).abs() <= first.abs() * 2**-23 + 1e-44).all())
    bars = bars_of(case, expected, copies)
    assert all(bar >= least for bar, least in zip(bars, ROUNDED, strict=True))
    assert bars_of(case, expected, [expected]) == ROUNDED
    worst = replace(copies[0], losses=[2 * loss for loss in expected.losses])
    assert bars_of(case, expected, [*copies, worst]).loss == pytest.approx(2 * differences(worst, expected).loss)
    assert bars_of(Case("pcae", "zero3-2"), expected, [worst]) == EXACT
    name = shaken(case)[0]
    assert compare(name, traces).passed
    assert not compare(name, {**traces, name: worst}).passed, "a reference that moves so much is none"
    assert not compare(name, {**traces, name: expected}).passed, "a copy that was not shaken tells nothing"


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
def test_the_figure_is_the_single_processs(traces, case):
    found, expected = (traces[which].seen["figure"].int() for which in (case, reference(case)))
    assert found.shape == expected.shape
    assert float((found - expected).abs().float().mean()) < 0.5
    assert int(found.max()) > int(found.min())


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
def test_the_features_are_the_single_processs(traces, case):
    found, expected = (traces[which].seen["features"] for which in (case, reference(case)))
    assert found.shape == (2, 96) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-2


def test_a_run_that_tells_nothing_is_refused(traces):
    trace = traces[Case("pcae", "single")]
    flat = Trace([trace.losses[0]] * STEPS, trace.norms, trace.initial, trace.ema, trace.first_ema, trace.seen)
    with pytest.raises(UserError, match="the loss moved by 0.0%"):
        require_telling(Case("pcae", "single"), flat)
    calm = Trace(trace.losses, [0.0] * STEPS, trace.initial, trace.ema, trace.first_ema, trace.seen)
    with pytest.raises(UserError, match="0 of 8 steps were clipped"):
        require_telling(Case("pcae", "single"), calm)


@pytest.mark.parametrize("engines", [["zero1-2", "zero3-2"], ["fsdp2-4"], ["single"]])
def test_all_that_a_choice_of_engines_is_held_against_runs_too(engines, monkeypatch):
    asked = []
    monkeypatch.setattr(parity, "trace_cases", lambda cases, *_: asked.extend(cases) or {})
    parity.run(STEPS, engines, lambda done, total: None)
    compared = [case for case in asked if case != reference(case)]
    missing = [need for case in compared for need in (reference(case), *shaken(case)) if need not in asked]
    assert missing == [] and {case.engine for case in asked} >= set(engines)


def test_engines_are_chosen_by_name():
    assert choose_engines("all")[0] == "single" and "zero3-4" in choose_engines("all")
    assert choose_engines("ddp2,fsdp2-4") == ["ddp2", "fsdp2-4"]
    with pytest.raises(UserError, match="--engines ddp3,single: there is no ddp3; known are single, ddp2"):
        choose_engines("ddp3,single")
