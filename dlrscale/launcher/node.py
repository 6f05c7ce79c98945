"""DeepSpeed's launcher of the ranks of one host, as its runner would start it: `node.py OPTIONS SCRIPT ARGUMENTS`.

The runner itself, the program `deepspeed`, takes seconds to come to that.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Not the script's own folder, whose modules would hide others of the same name, but that of the package.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dlrscale.launcher import imports


def main() -> None:
    """Start the ranks and wait for them."""
    with imports.many(), imports.without("mlflow"):  # which DeepSpeed's autotuner would take
        from deepspeed.launcher.launch import main as launch
    launch()


if __name__ == "__main__":
    main()
