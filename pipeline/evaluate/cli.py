"""The command line of the evaluation: verbs to functions. Everything heavy is imported by the verb that needs it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

evaluate = typer.Typer(
    help="Probe a run's encoder with labels it has never seen.", no_args_is_help=True, rich_markup_mode=None
)


class Weights(StrEnum):
    """Which of a run's weights."""

    model = "model"
    ema = "ema"
    untrained = "untrained"


RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
WhichWeights = Annotated[
    Weights, typer.Option(help="Which encoder; ema is the teacher's, untrained the same one at step 0.")
]


@evaluate.command()
def knn(run: RunDir, weights: WhichWeights = Weights.model) -> None:
    """Nearest-neighbour accuracy on data.val with data.train as the memory.

    Example: patchmill eval knn runs/mae --weights untrained
    """
    from pipeline.evaluate import probe

    typer.echo(str(probe(run, "knn", weights.value)))


@evaluate.command()
def linear(
    run: RunDir,
    weights: WhichWeights = Weights.model,
    exact: Annotated[
        bool, typer.Option("--exact", help="Solve one softmax regression on the mean of patch tokens instead.")
    ] = False,
) -> None:
    """Accuracy on data.val of the best of many linear heads (poolings x learning rates), chosen on a tenth of data.train.

    Example: patchmill eval linear runs/mae --weights untrained
    """
    from pipeline.evaluate import probe

    typer.echo(str(probe(run, "linear" if exact else "linear_heads", weights.value)))
