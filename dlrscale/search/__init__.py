"""The search of an attack's settings: what is tuned, in which order, what a run cost, and what came out.

Nothing here runs a job: `cli/search.py` does that. `sampler.py` is the only door to Optuna.
"""

from dlrscale.search.result import Wanted, base_result, gates, search_id
from dlrscale.search.space import Range, Space
from dlrscale.search.target import HELDOUT, Cost, Target, bill, cost_of, flops_per_token, spent, transform_cost

__all__ = [
    "HELDOUT",
    "Cost",
    "Range",
    "Space",
    "Target",
    "Wanted",
    "base_result",
    "bill",
    "cost_of",
    "flops_per_token",
    "gates",
    "search_id",
    "spent",
    "transform_cost",
]
