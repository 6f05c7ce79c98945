"""What `dlrscale doctor` lets each rank do: join the others, add up over all, and say so."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dlrscale import engine


def main() -> None:
    """Sum 1 over all ranks; rank 0 prints the sum."""
    import torch
    import torch.distributed as dist

    rank, _ = engine.start_distributed()
    one = torch.ones(1, device=engine.device_type())
    dist.all_reduce(one)
    if rank == 0:
        print(f"ranks that answered: {int(one)}", flush=True)
    engine.stop_distributed()


if __name__ == "__main__":
    main()
