"""The command line of the benchmarks: verbs to functions. Everything heavy is imported by the verb that needs it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

bench = typer.Typer(help="Measure against a peer in the same run.", no_args_is_help=True, rich_markup_mode=None)

Batch = Annotated[int, typer.Option(min=1, help="Images a batch.")]
Rounds = Annotated[int, typer.Option(help="Interleaved rounds, at least 8; more calm the figures.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Also write the rows there, with hardware and versions.")
]
FASTEST = "fastest of the rounds"


def _measure(
    name: str, unit: str, out: Path | None, work: Callable[[Callable[[int, int], None]], Sequence[Any]], **facts: str
) -> Sequence[Any]:
    """Rows of ``work``, which is given where to say how far it is; printed, and written with ``facts`` where ``out`` names."""
    from pipeline.asked import require_writable
    from pipeline.bench.report import write_report
    from pipeline.metrics import Progress

    require_writable(out, "--out")
    with Progress(f"bench {name}", None, unit) as progress:
        rows = work(progress.update)
    for row in rows:
        typer.echo(str(row))
    if out is not None:
        write_report(out, rows, **facts)
    return rows


@bench.command()
def data(
    beton: Annotated[Path, typer.Argument(help="A sealed beton.")],
    manifest: Annotated[Path, typer.Argument(help="The manifest it was written from.")],
    size: Annotated[int, typer.Option(min=1, help="Crop side, pixels.")] = 224,
    threads: Annotated[
        int | None,
        typer.Option(min=2, help="Instead: how much faster our loader is with so many threads, on an idle machine."),
    ] = None,
    rounds: Rounds = 8,
    out: Out = None,
) -> None:
    """Images per CPU second of our loaders, FFCV's stock pipeline and torchvision's DataLoader, one thread, interleaved.

    Example: patchmill bench data train.beton train.jsonl --out data.json
    """
    from pipeline.bench import data

    def work(progress: Callable[[int, int], None]) -> Sequence[Any]:
        options: dict[str, Any] = {"image_size": size, "rounds": rounds, "progress": progress}
        if threads:
            return data.run_threads(beton, threads, **options)
        return [*data.run(beton, manifest, **options), *data.run_resume()]

    _measure("data", "run", out, work, statistic=FASTEST)


@bench.command()
def methods(
    model: Annotated[str, typer.Option(help="The encoder, such as vit_s.")] = "vit_b",
    batch: Batch = 4,
    peer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A checkout of github.com/facebookresearch/mae to compare with."),
    ] = None,
    rounds: Rounds = 8,
    out: Out = None,
) -> None:
    """CPU time of a forward and backward pass of MAE, PCAE and RandSAC beside their FLOPs, one thread, interleaved.

    Example: patchmill bench methods --model vit_b --peer mae --out methods.json
    """
    from pipeline.bench.methods import run

    _measure(
        "methods",
        "run",
        out,
        lambda progress: run(model, batch=batch, peer=peer, rounds=rounds, progress=progress),
        statistic=FASTEST,
    )


@bench.command()
def attention(batch: Batch = 4, rounds: Rounds = 8, out: Out = None) -> None:
    """What RandSAC's attention mask costs: ViT-B's blocks at 196 tokens with and without, one thread, interleaved.

    Example: patchmill bench attention --batch 2 --out attention.json
    """
    from pipeline.bench.attention import run

    _measure(
        "attention", "run", out, lambda progress: run(batch=batch, rounds=rounds, progress=progress), statistic=FASTEST
    )


@bench.command()
def parity(
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each case.")] = 20,
    engines: Annotated[str, typer.Option(help="Which, with commas: such as ddp2,fsdp2-4.")] = "all",
    out: Out = None,
) -> None:
    """Whether every engine computes what a single process does: loss, gradient norm, average, figure; on 1, 2 and 4 processes.

    Example: patchmill bench parity --out parity.json
    """
    from pipeline.bench.parity import choose_engines, run

    rows = _measure("parity", "case", out, lambda progress: run(steps, choose_engines(engines), progress))
    raise typer.Exit(0 if all(row.passed for row in rows) else 1)


@bench.command()
def engines(
    method: Annotated[str, typer.Option(help="The method: mae, pcae or randsac.")] = "pcae",
    model: Annotated[str, typer.Option(help="The encoder, such as vit_l; on a CPU take vit_p.")] = "vit_l",
    batch: Batch = 32,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the matrix products.")] = "bf16",
    rounds: Rounds = 8,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also the ten dearest kernels of the single engine's step.")
    ] = False,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="The stages of ZeRO beside single.")] = False,
    out: Out = None,
) -> None:
    """Time and peak memory of a training step of each engine in one process beside a bare PyTorch loop, interleaved.

    On a CUDA device where there is one: all engines stay there together. On a CPU it is CPU time on one thread.

    Example: patchmill bench engines --model vit_p --batch 8 --precision fp32 --out engines.json
    """
    from pipeline.bench.engines import device_name, run

    _measure(
        "engines",
        "run",
        out,
        lambda progress: run(
            method,
            model,
            batch=batch,
            precision=precision,
            rounds=rounds,
            kernels=kernels,
            deepspeed=deepspeed,
            progress=progress,
        ),
        statistic=FASTEST,
        device=device_name(),
    )


@bench.command()
def loop(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run.")] = 2000,
    rounds: Rounds = 8,
    out: Out = None,
) -> None:
    """CPU time that the trainer's loop adds to a bare PyTorch loop: microseconds a step, one thread, interleaved.

    Example: patchmill bench loop --out loop.json
    """
    from pipeline.bench.loop import run

    _measure("loop", "run", out, lambda progress: run(steps, rounds=rounds, progress=progress), statistic=FASTEST)


@bench.command()
def tracking(
    steps: Annotated[int, typer.Option(min=1, help="Logged steps of a run.")] = 400,
    rounds: Rounds = 8,
    out: Out = None,
) -> None:
    """What a logged step costs with MLflow on sqlite, ours and one call a step: CPU time and how long training waits.

    Example: patchmill bench tracking --out tracking.json
    """
    from importlib.metadata import version

    from pipeline.bench.tracking import run

    _measure(
        "tracking",
        "run",
        out,
        lambda progress: run(steps, rounds=rounds, progress=progress),
        statistic=FASTEST,
        mlflow=version("mlflow"),
    )


@bench.command()
def save(
    gib: Annotated[float, typer.Option(min=0.001, help="Size of the state; host memory holds about five of it.")] = 1.0,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A folder on the disk to measure; by default the system's temporary one."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; more calm the figures.")] = 8,
    out: Out = None,
) -> None:
    """How long training waits for an asynchronous checkpoint beside a synchronous one and a plain copy, by the clock.

    Example: patchmill bench save --gib 4 --folder /scratch --out save.json
    """
    from pipeline.bench.save import facts, run

    _measure(
        "save",
        "save",
        out,
        lambda progress: run(gib, folder, rounds=rounds, progress=progress),
        statistic="median of the rounds",
        **facts(folder),
    )


@bench.command()
def evidence(
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings to change in every row.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the packed images and the runs go.")] = Path("runs/evidence"),
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            envvar="PATCHMILL_DATA",
            help="Holds cifar-10-python.tar.gz, or its images as JPEGs in cifar10_jpeg_q75.npz.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time, one thread each (OMP_NUM_THREADS).")] = 2,
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0,1",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this row, or another configuration as a row; may be given again."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Save and stop after so long; the same command goes on.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and what they should cost.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Only show what is there already.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Also write the table there, and draw it in FILE.png."),
    ] = None,
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="FILE.json",
            help="Leave out, but show, what another queue has found: its --out. May be given again.",
        ),
    ] = None,
) -> None:
    """Pretrain and probe every row of configs/evidence on CIFAR-10: the methods, their controls, untrained, raw pixels.

    Hours of CPU. Ctrl-C saves and stops; the same command goes on, after a kill too. In the background: nohup ... &

    Example: patchmill bench evidence --data data --jobs 2 --out evidence.json
    """
    from pipeline.bench.evidence_run import Options, run

    options = Options(tuple(changes or ()), folder, data, jobs, seeds, tuple(only or ()), minutes, dry_run, report, out,
                      tuple(others or ()))  # fmt: skip
    raise typer.Exit(run(options))
