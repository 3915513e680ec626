"""The command line of the evaluation: verbs to functions. Everything heavy is imported by the verb that needs it."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.evaluate import Name

evaluate = typer.Typer(
    help="What a run's encoder has learned, by labels that it never saw.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Weights(StrEnum):
    """Which of a run's weights."""

    model = "model"
    ema = "ema"
    untrained = "untrained"


class StartWeights(StrEnum):
    """Which of the weights that training has made."""

    model = "model"
    ema = "ema"


class Probed(StrEnum):
    """What a probe sees: an encoder with some of its weights, or the images themselves."""

    model = "model"
    ema = "ema"
    untrained = "untrained"
    pixels = "pixels"


RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
WhichWeights = Annotated[
    Weights, typer.Option(help="Which encoder; ema is the teacher's, untrained the same one at step 0.")
]
WhatIsProbed = Annotated[
    Probed,
    typer.Option("--weights", help="Which encoder, untrained being the one at step 0; or raw pixels, averaged to 32."),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Of eval.*, data.* and engine.*, for this evaluation; files too."),
]
Nproc = Annotated[int, typer.Option(min=1, help="Processes to start on this host, such as one a GPU.")]


def _run(name: "Name", run: Path, weights: str, changes: list[str] | None, nproc: int, arguments: Sequence[str],
         ks: Sequence[int] = ()) -> None:  # fmt: skip
    """One process of a probe, or with ``nproc`` all of them; ``arguments`` are those that start one."""
    from pipeline.evaluate import evaluate as probe
    from pipeline.evaluate.session import evaluation_config, open_session

    settings = changes or []
    if nproc > 1:
        from pipeline.launch import start_local

        words = ["eval", *arguments, str(run), *settings, "--weights", weights]
        raise typer.Exit(start_local(evaluation_config(run, settings), words, nproc, trains=False))
    from pipeline.evaluate.trained import Stopped
    from pipeline.metrics import setup_logging

    try:
        with open_session(run, settings, weights) as session:
            setup_logging(None, session.world.rank)
            report = probe(session, name, ks)
    except Stopped as stopped:
        if str(stopped):
            sys.stderr.write(f"patchmill: {stopped}\n")
        raise typer.Exit(75) from None
    if report is not None:
        typer.echo(str(report))


@evaluate.command()
def finetune(
    run: RunDir,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG...] [key=value ...]",
            help="Another recipe than the preset of the model's size; changes to it.",
        ),
    ] = None,
    weights: Annotated[
        StartWeights, typer.Option(help="Which encoder to start from; ema is the teacher's.")
    ] = StartWeights.model,
    nproc: Nproc = 1,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration instead, as `train` and `submit` take it.")
    ] = False,
) -> None:
    """Train all of a run's encoder with labels, and say how often it is right about data.val. Goes on where it was stopped.

    It is a run like any other: with any engine, under torchrun or srun, for `submit`, `compare` and `export`.

    Example: patchmill eval finetune runs/pcae method.drop_ratio=0.2 train.epochs=50
    """
    from pipeline.evaluate.recipe import finetune_config
    from pipeline.runs import read_config
    from pipeline.start import start

    cfg = finetune_config(read_config(run), run.resolve(), settings or [], weights.value)
    if print_config:
        typer.echo(cfg.to_yaml(), nl=False)
        return
    words = ["eval", "finetune", str(run), *(settings or []), "--weights", weights.value]
    raise typer.Exit(start(cfg, words, nproc))


@evaluate.command()
def compression(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder of a fine-tuned classifier.")],
    ratio: Annotated[
        list[float] | None,
        typer.Option(min=0, max=0.99, help="A share of tokens to drop, again for each; default 0, 0.1 ... 0.4."),
    ] = None,
    weights: Annotated[
        StartWeights, typer.Option(help="The classifier's weights, or their average.")
    ] = StartWeights.model,
    out: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw accuracy against multiply-adds.")] = None,
) -> None:
    """How accurate and how fast a fine-tuned classifier is when it drops more or fewer tokens than it was trained with.

    Example: patchmill eval compression runs/pcae/finetune --ratio 0 --ratio 0.2 --ratio 0.4
    """
    from pipeline.asked import FIGURES, require_writable
    from pipeline.evaluate.compression import compression, draw

    require_writable(out, "--out", FIGURES)
    report = compression(run, ratio or [0, 0.1, 0.2, 0.3, 0.4], weights.value)
    typer.echo(str(report))
    if out is not None:
        draw(report, out)


@evaluate.command()
def knn(
    run: RunDir,
    changes: Changes = None,
    weights: WhatIsProbed = Probed.model,
    k: Annotated[list[int] | None, typer.Option(min=1, help="Also with so many neighbours; may be repeated.")] = None,
    nproc: Nproc = 1,
) -> None:
    """Nearest-neighbour accuracy on data.val with data.train as the memory.

    Example: patchmill eval knn runs/mae --weights untrained --k 1 --k 5
    """
    words = ["knn", *(word for each in k or [] for word in ("--k", str(each)))]
    _run("knn", run, weights.value, changes, nproc, words, k or [])


@evaluate.command()
def linear(
    run: RunDir,
    changes: Changes = None,
    weights: WhatIsProbed = Probed.model,
    exact: Annotated[
        bool, typer.Option("--exact", help="Solve one softmax regression on the mean of patch tokens instead.")
    ] = False,
    mae: Annotated[
        bool, typer.Option("--mae", help="MAE's recipe instead: LARS on random crops and flips, eval.mae.*; resumable.")
    ] = False,
    nproc: Nproc = 1,
) -> None:
    """Accuracy on data.val of the best of many linear heads (poolings x learning rates), chosen on a tenth of data.train.

    Example: patchmill eval linear runs/mae --weights untrained
    """
    if exact and mae:
        from pipeline.config import UserError

        raise UserError("--exact, --mae: are two ways to fit a linear probe; give one")
    name: Name = "linear" if exact else "linear_mae" if mae else "linear_heads"
    words = ["linear", *(["--exact"] if exact else []), *(["--mae"] if mae else [])]
    _run(name, run, weights.value, changes, nproc, words)


@evaluate.command()
def attentive(run: RunDir, changes: Changes = None, weights: WhichWeights = Weights.model, nproc: Nproc = 1) -> None:
    """Accuracy on data.val of the best attentive head (blocks x learning rates), chosen on a tenth of data.train; resumable.

    Example: patchmill eval attentive runs/mae eval.attentive.epochs=30 --nproc 8
    """
    _run("attentive", run, weights.value, changes, nproc, ["attentive"])
