"""`deepspeed launch/measure.py --model ... --strategy ...`: a measurement on ranks that the DeepSpeed launcher started."""

import sys

from dlrscale.cli import main

if __name__ == "__main__":
    main(["measure", *sys.argv[1:]])
