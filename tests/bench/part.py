"""One rank of one part of the benchmark: `part.py MODULE.FUNCTION SETTINGS RESULT`, the settings as JSON."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from common import Sizes

from dlrscale import engine


def main() -> None:
    """Run the part; rank 0 writes what it returns."""
    name, settings, result = sys.argv[1:]
    module, function = name.split(".")
    keywords = json.loads(settings)
    rank, ranks = engine.start_distributed()
    found = getattr(importlib.import_module(module), function)(Sizes(**keywords.pop("sizes")), rank, ranks, **keywords)
    if rank == 0:
        Path(result).write_text(json.dumps(found), encoding="utf-8")
    engine.stop_distributed()


if __name__ == "__main__":
    main()
