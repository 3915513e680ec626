"""A benchmark's rows as JSON that says where they were measured."""

import contextlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from pipeline.asked import write_asked

PACKAGES: Final = ("torch", "deepspeed", "torchvision", "timm", "ffcv", "opencv-python", "pillow")


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Of what is installed: not every benchmark needs every package."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_report(path: Path, rows: Sequence[Any], **facts: Any) -> None:
    """Write dataclass ``rows`` with hardware, versions, load average (1, 5, 15 minutes), date, command line and ``facts``."""
    report = {
        "command": shlex.join(["patchmill", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": _cpu_model(), "cpus": os.cpu_count()},
        "load_average": os.getloadavg(),
        **facts,
        "versions": {"python": platform.python_version(), **_versions()},
        "rows": [asdict(row) for row in rows],
    }
    write_asked(path, (json.dumps(report, indent=2) + "\n").encode(), "--out")
