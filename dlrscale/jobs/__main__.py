"""What each rank of a job runs: `deepspeed ... dlrscale/jobs/__main__.py '<configuration as JSON>'`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Not the script's own folder, whose modules would hide others of the same name, but that of the package.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dlrscale import launcher
from dlrscale.launcher import imports
from dlrscale.launcher.guard import Guard

if __name__ == "__main__":
    guard = Guard().start()  # before the slow imports
    os.environ.update(launcher.usable_home())

    with imports.many():
        from dlrscale import config, jobs

    sys.exit(jobs.run(config.from_json(sys.argv[1]), jobs.make_tracker, guard))
