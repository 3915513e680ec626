"""What looks at a run while it trains: each has a name, says after which steps it is due, and observes."""

from pipeline.config import Config
from pipeline.eval_settings import FinetuneConfig
from pipeline.evaluate.accuracy import Accuracy
from pipeline.heldout import HeldOut
from pipeline.online import Online
from pipeline.order import Plan

Watch = HeldOut | Online | Accuracy


def open_watches(cfg: Config, plan: Plan) -> list[Watch]:
    """What is looked at while a run trains: the accuracy of a classifier, else the held-out loss; the features where asked.

    Raises UserError where its images cannot be had.
    """
    watches: list[Watch] = []
    if isinstance(cfg.method, FinetuneConfig):
        watches.append(Accuracy(cfg, plan))
    elif cfg.eval.loss_every:
        watches.append(HeldOut(cfg))
    return [*watches, Online(cfg, plan)] if cfg.eval.online_every else watches
