"""``python -m pipeline`` is ``patchmill``."""

from pipeline.cli import main

main()
