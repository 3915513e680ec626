"""Engines of 1, 2 and 4 processes compute the same, and the table that says so shows each fault that is put in."""

import pytest

from pipeline.bench.parity import Case, Trace, choose_engines, compare, reference, require_telling, trace_cases
from pipeline.config import UserError

pytestmark = pytest.mark.timeout(900)  # starting processes on a busy machine takes minutes

SHARDED = [name for name in choose_engines("all") if name != "single"]
EXACT = [Case("pcae", engine) for engine in SHARDED] + [Case("mae", engine) for engine in ("fsdp2-2", "zero1-2")]
EXACT += [Case("randsac", engine) for engine in ("ddp4", "fsdp2-2", "hsdp2x2", "zero2-2", "zero3-2")]
ROUNDED = [Case("pcae", engine, "bf16") for engine in ("ddp2", "fsdp2-2", "zero1-2", "zero2-2", "zero3-2")]
BROKEN = [Case("pcae", "fsdp2-2", mutation=fault) for fault in ("no_ema", "divided_twice", "local_norm")]
BROKEN += [
    Case("pcae", engine, mutation=fault)
    for engine in ("ddp2", "zero2-2", "zero3-2")
    for fault in ("no_ema", "divided_twice")
]
STEPS = 8


@pytest.fixture(scope="module")
def traces() -> dict[Case, Trace]:
    cases = [*EXACT, *ROUNDED, *BROKEN]
    needed = [*map(reference, cases), *(Case(case.method, "single", case.precision) for case in cases)]
    return trace_cases(list(dict.fromkeys([*needed, *cases])), STEPS)


@pytest.mark.parametrize("case", EXACT + ROUNDED, ids=lambda case: case.name)
def test_a_case_computes_what_its_reference_does(traces, case):
    require_telling(case, traces[reference(case)])
    row = compare(case, traces[case], traces[reference(case)])
    assert row.passed, str(row)
    assert row.same_start


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_a_fault_turns_the_table_red(traces, case):
    row = compare(case, traces[case], traces[reference(case)])
    assert not row.passed, str(row)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_the_figure_is_the_single_processs(traces, case):
    found, expected = (traces[which].seen["figure"].int() for which in (case, reference(case)))
    assert found.shape == expected.shape
    assert float((found - expected).abs().float().mean()) < 0.5
    assert int(found.max()) > int(found.min())


def test_a_run_that_tells_nothing_is_refused(traces):
    trace = traces[Case("pcae", "single")]
    flat = Trace([trace.losses[0]] * STEPS, trace.norms, trace.initial, trace.ema, trace.first_ema, trace.seen)
    with pytest.raises(UserError, match="the loss moved by 0.0%"):
        require_telling(Case("pcae", "single"), flat)
    calm = Trace(trace.losses, [0.0] * STEPS, trace.initial, trace.ema, trace.first_ema, trace.seen)
    with pytest.raises(UserError, match="0 of 8 steps were clipped"):
        require_telling(Case("pcae", "single"), calm)


def test_engines_are_chosen_by_name():
    assert choose_engines("all")[0] == "single" and "zero3-4" in choose_engines("all")
    assert choose_engines("ddp2,fsdp2-4") == ["ddp2", "fsdp2-4"]
    with pytest.raises(UserError, match="--engines ddp3,single: there is no ddp3; known are single, ddp2"):
        choose_engines("ddp3,single")
