"""The command line: verbs to functions, nothing else. Everything heavy is imported by the verb that needs it."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.bench import more_cli

if TYPE_CHECKING:
    from pipeline.config import Config

app = typer.Typer(
    help="Pretrain vision transformers with RandSAC, PCAE and MAE: sealed FFCV data, exact restarts, tracked runs.\n\n"
    "Example:  patchmill train cifar10/randsac data.train=train.beton run.dir=runs/randsac",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
prep = typer.Typer(help="Turn images into a sealed beton file: scan, write, verify.", no_args_is_help=True,
                   rich_markup_mode=None)  # fmt: skip
evaluate = typer.Typer(help="Probe a run's encoder with labels it has never seen.", no_args_is_help=True,
                       rich_markup_mode=None)  # fmt: skip
bench = typer.Typer(help="Measure against a peer in the same run.", no_args_is_help=True, rich_markup_mode=None)
more_cli.register(bench)
app.add_typer(prep, name="prep")
app.add_typer(evaluate, name="eval")
app.add_typer(bench, name="bench")


class Mode(StrEnum):
    """How `prep write` stores an image."""

    jpg = "jpg"
    raw = "raw"
    smart = "smart"
    proportion = "proportion"


class Weights(StrEnum):
    """Which of a run's weights."""

    model = "model"
    ema = "ema"
    untrained = "untrained"


Settings = Annotated[list[str], typer.Argument(metavar="CONFIG... [key=value ...]",
                                               help="YAML files or shipped names, then settings to change.")]  # fmt: skip
Nproc = Annotated[int, typer.Option(min=1, help="Processes to start on this host, such as one a GPU.")]
InJob = Annotated[bool, typer.Option("--in-job", help="As every rank of a job: network, shared folder, clocks.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
WhichWeights = Annotated[
    Weights, typer.Option(help="Which encoder; ema is the teacher's, untrained the same one at step 0.")
]


def _config(settings: list[str]) -> "Config":
    """Files and overrides, told apart by the equals sign."""
    from pipeline.config import load_config

    return load_config([s for s in settings if "=" not in s], [s for s in settings if "=" in s])


def _say(report: Any) -> None:
    typer.echo(str(report))


@app.command()
def train(settings: Settings, nproc: Nproc = 1) -> None:
    """Pretrain; continues a run whose folder exists. Under torchrun or srun this is one process of the run.

    Example: patchmill train cifar10/mae data.train=train.beton run.dir=runs/mae train.epochs=5
    """
    cfg = _config(settings)
    if nproc > 1:
        from pipeline.launch import start_local

        raise typer.Exit(start_local(cfg, ["train", *settings], nproc))
    from pipeline.train import train

    raise typer.Exit(train(cfg))


@app.command()
def check(settings: Settings, in_job: InJob = False, nproc: Nproc = 1) -> None:
    """Validate a configuration, the data's seals and the environment; every problem at once.

    With --in-job under torchrun or srun, or with --nproc, also what only the job's processes together can find.

    Example: patchmill check cifar10/pcae data.train=train.beton run.dir=runs/pcae
    """
    if in_job or nproc > 1:
        from pipeline.preflight import run

        raise typer.Exit(run(_config(settings), settings, nproc, _say))
    from pipeline.check import check

    _say(check(_config(settings)))


@prep.command()
def scan(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder with one sub-folder of images a class; a tar of such folders, or of a tar a class (ImageNet's); "
            "ILSVRC2012_img_val.tar; parquet or WebDataset shards (a folder, or a quoted pattern); a CIFAR archive."
        ),
    ],
    manifest: Annotated[Path, typer.Argument(help="The manifest to write, such as train.jsonl.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode.")] = 2,
    against: Annotated[
        Path | None,
        typer.Option(metavar="MANIFEST", help="Take the class index of that one, and look for its images here."),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The class index: a class name a line, in the order of labels.")
    ] = None,
    devkit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For ImageNet's validation tar: ILSVRC2012_devkit_t12.tar.gz."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="For CIFAR: train or test.")] = None,
) -> None:
    """Decode every image; list the good ones in a manifest, the others in a quarantine list. Goes on where it was killed.

    Example: patchmill prep scan ILSVRC2012_img_train.tar train.jsonl --workers 16
    """
    from data_prep.kinds import open_source, read_classes
    from data_prep.manifest import load_manifest
    from data_prep.scan import index_source, scan
    from data_prep.statistics import describe, draw
    from pipeline.metrics import Progress

    found = open_source(source, devkit=devkit, split=split)
    names = read_classes(classes) if classes else None
    with Progress("index", None, found.counted_in) as progress:
        index = index_source(found, names, against, progress.update)
    with Progress("scan", None, "image") as progress:
        report = scan(found, manifest, workers=workers, index=index, against=against, progress=progress.update)
    del index  # of a million names
    book = load_manifest(manifest)
    for said in (report, describe(book), f"drawn in {draw(book)}"):
        _say(said)


@prep.command()
def write(
    manifest: Annotated[Path, typer.Argument(help="The manifest that scan wrote.")],
    beton: Annotated[Path, typer.Argument(help="The file to write, such as train.beton.")],
    mode: Annotated[
        Mode, typer.Option(help="jpg (a JPEG's own bytes where possible), raw, smart or proportion.")
    ] = Mode.jpg,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink larger images to this longer side, pixels.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality where an image is encoded again.")] = 90,
    smart_threshold: Annotated[
        int | None, typer.Option(min=1, help="smart: raw images over this many bytes become JPEG.")
    ] = None,
    proportion: Annotated[float, typer.Option(min=0, max=1, help="proportion: the share that becomes JPEG.")] = 0.5,
    seed: Annotated[int, typer.Option(help="proportion: which images.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that encode.")] = 2,
) -> None:
    """Write a sealed beton; goes on where a killed one stopped, and ends byte-identical.

    Example: patchmill prep write train.jsonl train.beton --mode jpg --max-side 500
    """
    from data_prep.write import write
    from pipeline.metrics import Progress

    with Progress("write", None, "image") as progress:
        report = write(manifest, beton, mode=mode.value, max_side=max_side, quality=quality,  # type: ignore[arg-type]
                       smart_threshold=smart_threshold, proportion=proportion, seed=seed, workers=workers,
                       progress=progress.update, announce=lambda line: typer.echo(line, err=True))  # fmt: skip
    _say(report)


@prep.command()
def verify(
    beton: Annotated[Path, typer.Argument(help="A sealed beton.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes that read and decode.")] = 2,
) -> None:
    """Prove a beton: every hash, every sample decoded, FFCV's own reader.

    Example: patchmill prep verify train.beton
    """
    from data_prep.verify import verify
    from pipeline.metrics import Progress

    with Progress("verify", None, "image") as progress:
        report = verify(beton, workers=workers, progress=progress.update)
    _say(report)


@evaluate.command()
def knn(run: RunDir, weights: WhichWeights = Weights.model) -> None:
    """Nearest-neighbour accuracy on data.val with data.train as the memory.

    Example: patchmill eval knn runs/mae --weights untrained
    """
    from pipeline.evaluate import probe

    _say(probe(run, "knn", weights.value))


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

    _say(probe(run, "linear" if exact else "linear_heads", weights.value))


@app.command()
def visualize(
    run: RunDir,
    images: Annotated[int, typer.Option(min=1, help="How many images.")] = 6,
    out: Annotated[Path | None, typer.Option(help="The picture; default: in the run's figures.")] = None,
) -> None:
    """Draw what a run's method does: RandSAC's segments, order and predictions, PCAE's kept tokens, MAE's reconstruction.

    Example: patchmill visualize runs/randsac --images 8
    """
    from pipeline.visualize import visualize

    _say(visualize(run, images, out))


@app.command()
def export(
    run: RunDir,
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    weights: WhichWeights = Weights.model,
) -> None:
    """Write the encoder as safetensors that timm loads, and print the call that loads it.

    Example: patchmill export runs/mae encoder.safetensors
    """
    from pipeline.export import export

    _say(export(run, out, weights.value))


@app.command()
def sync(
    run: RunDir,
    uri: Annotated[str | None, typer.Option(help="Another MLflow store than the run's own.")] = None,
) -> None:
    """Send to MLflow what is in the run's log and not there yet.

    Example: patchmill sync runs/mae --uri http://127.0.0.1:5000
    """
    from pipeline.tracking import sync

    _say(sync(run, uri))


Batch = Annotated[int, typer.Option(min=1, help="Images a batch.")]
Rounds = Annotated[int, typer.Option(help="Interleaved rounds, at least 8; more calm the figures.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Also write the rows there, with hardware and versions.")
]


def _report(rows: Sequence[Any], out: Path | None, **facts: str) -> None:
    from pipeline.bench.report import write_report

    for row in rows:
        _say(row)
    if out is not None:
        write_report(out, rows, **facts)


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
    from pipeline.bench.report import check_out
    from pipeline.metrics import Progress

    check_out(out)
    with Progress("bench data", None, "run") as progress:
        options: dict[str, Any] = {"image_size": size, "rounds": rounds, "progress": progress.update}
        rows: list[Any] = []
        if threads:
            rows += data.run_threads(beton, threads, **options)
        else:
            rows += [*data.run(beton, manifest, **options), *data.run_resume()]
    _report(rows, out, statistic="fastest of the rounds")


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
    from pipeline.bench.report import check_out
    from pipeline.metrics import Progress

    check_out(out)
    with Progress("bench methods", None, "run") as progress:
        rows = run(model, batch=batch, peer=peer, rounds=rounds, progress=progress.update)
    _report(rows, out, statistic="fastest of the rounds")


@bench.command()
def attention(batch: Batch = 4, rounds: Rounds = 8, out: Out = None) -> None:
    """What RandSAC's attention mask costs: ViT-B's blocks at 196 tokens with and without, one thread, interleaved.

    Example: patchmill bench attention --batch 2 --out attention.json
    """
    from pipeline.bench.attention import run
    from pipeline.bench.report import check_out
    from pipeline.metrics import Progress

    check_out(out)
    with Progress("bench attention", None, "run") as progress:
        rows = run(batch=batch, rounds=rounds, progress=progress.update)
    _report(rows, out, statistic="fastest of the rounds")


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
    from pipeline.bench.report import check_out
    from pipeline.metrics import Progress

    check_out(out)
    with Progress("bench parity", None, "case") as progress:
        rows = run(steps, choose_engines(engines), progress.update)
    _report(rows, out)
    raise typer.Exit(0 if all(row.passed for row in rows) else 1)


@app.command()
def quickstart(folder: Annotated[Path, typer.Option(help="Where data and runs go.")] = Path("runs/quickstart")) -> None:
    """The whole chain on drawn images: pack, pretrain the three methods, probe, draw, track. About five minutes.

    Example: patchmill quickstart --folder runs/quickstart
    """
    from pipeline.quickstart import quickstart

    raise typer.Exit(quickstart(folder))


def main() -> None:
    """Entry point: a user's mistake is one clear message and exit code 2."""
    try:
        app()
    except Exception as error:
        from pipeline.config import RunFailed, UserError  # pydantic is not needed for --help

        if not isinstance(error, UserError | RunFailed):
            raise
        sys.stderr.write(f"patchmill: {error}\n")
        sys.exit(1 if isinstance(error, RunFailed) else 2)
