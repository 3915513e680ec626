"""The settings of `patchmill chain`."""

from typing import Annotated, Literal

from pydantic import Strict

from pipeline.section import Positive, Section


class StageConfig(Section):
    """What a job of a chain asks Slurm for beside account and qos, which are ``slurm``'s: one process on one host.

    ``partition``: where null, slurm.partition. ``cpus_per_task``: as many processes or threads work. ``directives``: any
    other option of sbatch.
    """

    partition: str | None = None
    cpus_per_task: Positive = 4
    mem: str | None = None
    time: str | Positive = "1-00:00:00"
    directives: dict[str, str | int | bool] = {}


class FinetuneStage(StageConfig):
    """The job of `patchmill eval finetune`: ``processes`` on one host, one a GPU where ``directives`` ask for GPUs.

    ``settings``: recipes and changes, as that verb takes them. What needs several hosts is submitted by itself.
    """

    processes: Positive = 1
    settings: Annotated[tuple[str, ...], Strict(False)] = ()


class ChainConfig(Section):
    """What ``patchmill chain`` does before and after the training.

    ``train_images``, ``val_images``: what `patchmill prep scan` takes without options, such as a folder with a sub-folder a
    class; data.train and data.val are packed from them where these are not there yet. ``evals``: the probes of the
    trained model, and its fine-tuning. ``prep``, ``eval`` (of each probe) and ``finetune``: their jobs.
    """

    train_images: str | None = None
    val_images: str | None = None
    evals: Annotated[tuple[Literal["knn", "linear", "finetune"], ...], Strict(False)] = ("knn", "linear")
    prep: StageConfig = StageConfig()
    eval: StageConfig = StageConfig()
    finetune: FinetuneStage = FinetuneStage()
