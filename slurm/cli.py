"""The verbs for Slurm, to functions, nothing else."""

import sys
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Settings = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG... [key=value ...]", help="YAML files or shipped names, then settings to change."),
]


class Scaling(StrEnum):
    """What `scale` keeps."""

    per_process = "per-process"
    fixed = "fixed"


def submit(
    settings: Settings,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script and the plan; queue nothing.")
    ] = False,
) -> None:
    """Check everything that can be known, then queue the run as one job that comes back until it is done.

    With slurm.executor=local the job runs on this host, in the background, without Slurm.

    Example: patchmill submit imagenet/pcae_vit_l engine/fsdp2 slurm.nodes=2 slurm.gpus_per_node=8 data.train=train.beton
    run.dir=runs/pcae
    """
    from pipeline.config import load_config
    from slurm.submit import plan
    from slurm.submit import submit as queue

    cfg = load_config([s for s in settings if "=" not in s], [s for s in settings if "=" in s])
    typer.echo(str(plan(cfg, queue=False)) if dry_run else queue(cfg))


def sweep(
    space: Annotated[
        str,
        typer.Argument(metavar="SPACE", help="A YAML file or a shipped name: grid, list or random draws of settings."),
    ],
    settings: Settings,
    parallel: Annotated[int | None, typer.Option(min=1, help="So many jobs at a time, whatever SPACE says.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script, the points and the plan; queue nothing.")
    ] = False,
) -> None:
    """Queue a run for each point of a space as one job array; a second call runs those that have failed.

    With slurm.executor=local they run on this host, as many at a time as it has GPUs for.

    Example: patchmill sweep sweep/lr imagenet/mae_vit_b engine/ddp slurm/one_node data.train=train.beton run.dir=runs/lr
    """
    from slurm.sweep import sweep as queue

    files, words = [s for s in settings if "=" not in s], [s for s in settings if "=" in s]
    typer.echo(queue(space, files, words, parallel=parallel, queue=not dry_run))


def chain(
    settings: Settings,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch scripts and the plan; queue nothing.")
    ] = False,
) -> None:
    """Pack images (chain.train_images, chain.val_images), train and probe (chain.evals): jobs that wait for each other.

    The same command again queues what is not done. Where a stage fails, those after it are cancelled. With
    slurm.executor=local all stages are one job on this host. What the jobs beside the training ask for is in chain.prep and
    chain.eval: partition, cpus_per_task, mem, time, directives.

    Example: patchmill chain cifar10/mae data.train=train.beton data.val=val.beton run.dir=runs/mae
    chain.train_images=photos/train chain.val_images=photos/val
    """
    from pipeline.config import load_config
    from slurm.chain import chain as queue

    cfg = load_config([s for s in settings if "=" not in s], [s for s in settings if "=" in s])
    typer.echo(queue(cfg, dry_run=dry_run))


Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of runs.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a submitted run.")]


def status(runs: Runs) -> None:
    """Where submitted runs are, in Slurm and in training, and why one stopped; sends what they logged to MLflow.

    Example: patchmill status runs
    """
    from rich.console import Console

    from slurm.chain import stages
    from slurm.space import name_of
    from slurm.status import find_runs, look, replay, table

    with ThreadPoolExecutor(16) as pool:  # a controller that does not answer is waited for
        found = list(pool.map(look, find_runs(runs)))
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False, markup=False)
    console.print(table(found))
    for run in found:
        for line in stages(run):
            console.print(f"{run.run.name}: {line}")
        if run.why not in ("", "done"):
            console.print(f"{name_of(run.run)} stopped last: {run.why}")
        for line in run.tail:
            console.print(f"  {line}")
    for run in found:
        if problem := replay(run):
            console.print(problem)


def cancel(
    run: Run, patience: Annotated[float, typer.Option(min=1, help="Seconds that it may take to save.")] = 300
) -> None:
    """Save submitted runs, end their jobs, and of a chain all jobs, and do not let them come back.

    The same `submit`, `sweep` or `chain` goes on from there.

    Example: patchmill cancel runs/pcae
    """
    from slurm.chain import cancel_all
    from slurm.status import find_runs

    for line in cancel_all(find_runs([run]), patience):
        typer.echo(line)


def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Also what comes, until the job has ended.")] = False,
) -> None:
    """The log of a process of a submitted run.

    Example: patchmill logs --follow runs/pcae
    """
    from pipeline.config import UserError
    from slurm.status import find_runs
    from slurm.status import follow as lines

    found = find_runs([run])
    if len(found) > 1:
        raise UserError(f"{run}: holds {len(found)} runs; name one, such as {found[0]}")
    for line in lines(found[0], rank, forever=follow):
        typer.echo(line)


def scale(
    settings: Settings,
    steps: Annotated[int, typer.Option(min=1, help="Length of each point's run.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Steps at its start that do not count.")] = 10,
    batch: Annotated[
        Scaling,
        typer.Option(help="per-process: it grows with the processes (weak scaling); fixed: they share one (strong)."),
    ] = Scaling.per_process,
    wait: Annotated[bool, typer.Option("--wait", help="Until all points have ended.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the table as JSON.")] = None,
    network: Annotated[float, typer.Option(min=1e-3, help="GB/s that a host sends to others, for the estimate.")] = 400,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="The share of the GPUs' FLOP/s, for the estimate.")] = 0.4,
) -> None:
    """Measure short runs at each point of a product of settings; values with commas span it. Call again for the table.

    Example: patchmill scale imagenet/mae_vit_b engine/fsdp2 slurm/one_node nodes=1,2,4 model.name=vit_b,vit_l
    slurm.gpu=H100 data.train=train.beton run.dir=runs/scale
    """
    from slurm.scale_run import Choice, scale

    scale(settings, Choice(steps, warmup, batch.value, {"network": network, "mfu": mfu}), out, wait=wait)
