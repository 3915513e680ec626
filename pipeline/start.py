"""From a verb to training: in this process, or in several on this host. No torch before it is needed."""

import os
import sys
from collections.abc import Sequence

from pipeline.config import Config


def start(cfg: Config, words: Sequence[str], nproc: int) -> int:
    """Train; the exit code. ``words``: what the verb was given, for each of ``nproc`` processes; one is this process itself."""
    if nproc > 1:
        from pipeline.launch import start_local

        return start_local(cfg, words, nproc)
    from pipeline.stop import StopRequest

    with StopRequest(ends=True) as stop:  # a signal while torch is imported is not lost either
        from pipeline.train import train

        try:
            return train(cfg, stop)
        except KeyboardInterrupt:
            sys.stderr.write("patchmill: interrupted before the state was saved; the newest checkpoint stays\n")
            os._exit(130)  # a save that goes on must not be waited for
