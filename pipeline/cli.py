"""The command line: verbs to functions, nothing else. Everything heavy is imported by the verb that needs it."""

import errno
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.bench.cli import bench
from pipeline.evaluate.cli import RunDir, Weights, WhichWeights, evaluate
from slurm.cli import cancel, chain, logs, scale, status, submit, sweep

if TYPE_CHECKING:
    from pipeline.config import Config

app = typer.Typer(
    help="Pretrain vision transformers with RandSAC, PCAE and MAE: sealed FFCV data, exact restarts, tracked runs.\n\n"
    "Example:  patchmill train cifar10/randsac data.train=train.beton run.dir=runs/randsac",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
prep = typer.Typer(help="Turn images into a sealed beton file: scan, write, verify.", no_args_is_help=True,
                   rich_markup_mode=None)  # fmt: skip
app.add_typer(prep, name="prep")
importing = typer.Typer(help="Make a run of another program's weights, for evaluation and export.", no_args_is_help=True,
                        rich_markup_mode=None)  # fmt: skip
app.add_typer(evaluate, name="eval")
app.add_typer(importing, name="import")
app.add_typer(bench, name="bench")
for verb in (submit, sweep, chain, scale, status, cancel, logs):
    app.command()(verb)


class Mode(StrEnum):
    """How `prep write` stores an image."""

    jpg = "jpg"
    raw = "raw"
    smart = "smart"
    proportion = "proportion"


class Kind(StrEnum):
    """What `visualize` can draw."""

    method = "method"
    attention = "attention"
    generation = "generation"
    free = "free"
    ranks = "ranks"
    kept = "kept"


Settings = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG... [key=value ...]", help="YAML files or shipped names, then settings to change."),
]
Nproc = Annotated[int, typer.Option(min=1, help="Processes to start on this host, such as one a GPU.")]
InJob = Annotated[bool, typer.Option("--in-job", help="As every rank of a job: network, shared folder, clocks.")]


def _config(settings: list[str], defaults: dict[str, Any] | None = None) -> "Config":
    """Files and overrides, told apart by the equals sign."""
    from pipeline.config import load_config

    return load_config([s for s in settings if "=" not in s], [s for s in settings if "=" in s], defaults)


def _say(report: Any) -> None:
    typer.echo(str(report))


@app.command()
def train(settings: Settings, nproc: Nproc = 1) -> None:
    """Pretrain; continues a run whose folder exists. Under torchrun or srun this is one process of the run.

    Example: patchmill train cifar10/mae data.train=train.beton run.dir=runs/mae train.epochs=5
    """
    from pipeline.start import start

    raise typer.Exit(start(_config(settings), ["train", *settings], nproc))


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


@app.command()
def estimate(
    settings: Settings,
    gpu: Annotated[str, typer.Option(help="H200, H100, A100, V100, L40S, or one of --gpu-table.")] = "H100",
    gpus: Annotated[int, typer.Option(min=1, help="Processes, one a GPU.")] = 8,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a host.")] = 8,
    network: Annotated[
        float, typer.Option(min=1e-3, help="GB/s that a host sends to others; 8 x 400 Gb/s are 400.")
    ] = 400,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="The share of the datasheet's FLOP/s that you expect.")
    ] = 0.4,
    gpu_table: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="More GPUs, in the form of configs/gpus.yaml.")
    ] = None,
) -> None:
    """Predict what a run takes: FLOPs, memory, the engine to use, hours, input. Needs neither the GPUs nor the data.

    Example: patchmill estimate imagenet/pcae_vit_l --gpu H100 --gpus 64
    """
    from pipeline.check import dataset_size
    from pipeline.forecast import forecast
    from pipeline.planner import Machine, find_gpu

    cfg = _config(settings, {"run": {"dir": "."}, "data": {"train": "not given"}})
    machine = Machine(find_gpu(gpu, gpu_table), gpus, gpus_per_node, network, mfu)
    _say(forecast(cfg, machine, gpu, dataset_size(cfg)))


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
    _say(report)
    _say(describe(book))
    _say(f"drawn in {draw(book)}")


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


@app.command()
def visualize(
    run: RunDir,
    kind: Annotated[list[Kind] | None, typer.Option(help="Only this picture; may be given again.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images.")] = 6,
    block: Annotated[
        int | None, typer.Option(min=1, help="Whose attention: a block, from 1; default: the last.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to; default: the run's figures, and MLflow.")
    ] = None,
) -> None:
    """Draw what a run's encoder and method do with images of data.val, a file a picture.

    method: MAE's reconstruction, RandSAC's segments, order and predictions, PCAE's masks and targets. attention: the encoder's
    attention maps. Of RandSAC generation: each segment predicted from the true ones before it; free: from its own predictions;
    ranks: the loss by rank. Of PCAE kept: the patches of the whole image that its teacher keeps at each stage.

    Example: patchmill visualize runs/randsac --kind generation --kind free --images 4
    """
    from pipeline.visualize import visualize

    for path in visualize(run, images, [one.value for one in kind or []], block, out):
        _say(path)


@app.command()
def export(
    run: RunDir,
    out: Annotated[
        Path,
        typer.Argument(
            help="The .safetensors file to write, or a new folder: weights, timm's config.json, model card."
        ),
    ],
    weights: WhichWeights = Weights.model,
) -> None:
    """Write the encoder as a file or a folder that timm loads, and print the call that loads it.

    Example: patchmill export runs/mae exports/mae
    """
    from pipeline.export import export

    _say(export(run, out, weights.value))


@importing.command()
def mae(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.pth", help="The checkpoint; with or without the decoder. No code in it is run."),
    ],
    settings: Settings,
) -> None:
    """Make a run of a pretraining checkpoint of facebookresearch/mae; eval, visualize and export take it as any other.

    Example: patchmill import mae mae_pretrain_vit_base.pth imagenet/mae_vit_b data.train=train.beton data.val=val.beton
    run.dir=runs/public
    """
    from pipeline.importing import import_mae

    _say(import_mae(file, _config(settings)))


@app.command()
def sync(
    run: RunDir,
    uri: Annotated[str | None, typer.Option(help="Another MLflow store; it is the run's from then on.")] = None,
    encoder: Annotated[
        Weights | None,
        typer.Option(help="Also send the newest checkpoint's encoder with these weights as a model (ViT-L: 1.2 GB)."),
    ] = None,
) -> None:
    """Send to MLflow what is in the run's log and not there yet.

    Example: patchmill sync runs/mae --uri http://127.0.0.1:5000 --encoder model
    """
    from pipeline.tracking import sync

    _say(sync(run, uri, weights=encoder.value if encoder else None))


@app.command()
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN RUN ...", help="Run folders, a folder of runs, or the ids of runs in MLflow."),
    ] = None,
    uri: Annotated[
        str | None,
        typer.Option(help="The MLflow store of the ids; default: MLFLOW_TRACKING_URI, else beside the runs."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw losses and probes against steps, images, FLOPs and process-hours."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write tables and curves as a page that needs nothing else."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write what the tables say, as numbers.")
    ] = None,
) -> None:
    """Show runs side by side: the settings that differ, what each has done and cost, its losses and probes.

    Example: patchmill compare runs/mae runs/pcae --out compare.png --html compare.html
    """
    from pipeline.compare import compare

    compare(runs or [], uri, out, json, html)


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where data and runs go.")] = Path("runs/quickstart"),
) -> None:
    """The whole chain on drawn images: pack, pretrain the three methods, probe, draw, track. About five minutes.

    Example: patchmill quickstart --folder runs/quickstart
    """
    from pipeline.quickstart import quickstart

    raise typer.Exit(quickstart(folder))


def main() -> None:
    """Entry point: a user's mistake is one clear message and exit code 2."""
    try:
        _run()
    except SystemExit as leaving:
        launch = sys.modules.get("pipeline.launch")
        if launch is not None and launch.joined:
            launch.leave(leaving.code)
        raise


def _run() -> None:
    try:
        app()
    except Exception as error:
        from pipeline.config import RunFailed, UserError  # pydantic is not needed for --help

        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            error = UserError(f"{error.filename}: the name is too long")
        if not isinstance(error, UserError | RunFailed):
            raise
        sys.stderr.write(f"patchmill: {error}\n")
        sys.exit(1 if isinstance(error, RunFailed) else 2)
