"""The predicted peak of each attack below a folder beside the allocator's, as a Markdown table.

Usage: python tests/gpu/plans.py results/gpu-check. Exit code 1 if one is off by more than 3 per cent.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dlrscale import record


def rows(place: Path) -> list[tuple[str, float, float, float]]:
    """Name, planned and measured peak in GiB, and the plan's error in per cent, of each attack that ended well."""
    found = []
    for folder, entry in record.find_records([place]):
        plan = entry["plan"] or {}
        error = plan.get("error_percent", {}).get("accelerator_peak_bytes")
        if error is not None:
            peaks = (plan[kind]["accelerator_peak_bytes"] / 2**30 for kind in ("planned", "measured"))
            found.append((folder.relative_to(place).as_posix(), *peaks, error))
    return found


if __name__ == "__main__":
    table = rows(Path(sys.argv[1]))
    print("| attack | planned, GiB | measured, GiB | error |\n|---|---|---|---|")
    for name, planned, measured, error in table:
        print(f"| {name} | {planned:.2f} | {measured:.2f} | {error:+.1f} % |")
    sys.exit(not table or any(abs(error) > 3 for *_, error in table))
