"""The file that the launch line names: `deepspeed ... dlrscale/jobs/__main__.py '<configuration as JSON>'`."""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # the script's own folder, whose modules must not hide others of the same name

from dlrscale.launcher.guard import Guard

if __name__ == "__main__":
    guard = Guard().start()  # before the slow imports

    from dlrscale import config, jobs

    sys.exit(jobs.run(config.from_json(sys.argv[1]), jobs.make_tracker, guard))
