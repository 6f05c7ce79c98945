"""`deepspeed launch/lock.py --model ... --data ...`: a lock on ranks that the DeepSpeed launcher started."""

import sys

from dlrscale.cli import main

if __name__ == "__main__":
    main(["lock", *sys.argv[1:]])
