"""`deepspeed launch/measure.py --model ... --strategy ...`: one model measured on the launcher's ranks."""

import sys

from dlrscale.cli import main

if __name__ == "__main__":
    main(["measure", *sys.argv[1:]])
