"""A job whose ranks may only use little more memory than they have at its start: `limited.py CONFIG RANKS MIB`."""

import os
import resource
import sys

from dlrscale.launcher.guard import Guard

if __name__ == "__main__":
    guard = Guard().start()

    from dlrscale import config, jobs
    from dlrscale.launcher.ranks import status_bytes

    if os.environ["RANK"] in sys.argv[2].split(","):
        resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + int(sys.argv[3]) * 2**20,) * 2)
    sys.exit(jobs.run(config.from_json(sys.argv[1]), None, guard))
