"""`deepspeed launch/attack.py --model ... --strategy ... --data ...`: an attack on one model, base or locked."""

import sys

from dlrscale.cli import main

if __name__ == "__main__":
    main(["attack", *sys.argv[1:]])
