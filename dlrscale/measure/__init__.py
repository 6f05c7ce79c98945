"""Measuring: bytes saved for backward, live bytes, peaks and seconds per phase, FLOPs, inference.

Measuring never runs inside a timed step: what needs hooks is counted in steps of its own, which are not timed.
"""

from dlrscale.measure.phases import TRAINING_PHASES, Phases, host_peak_bytes, synchronise
from dlrscale.measure.saved import SavedBytes

__all__ = ["TRAINING_PHASES", "Phases", "SavedBytes", "host_peak_bytes", "synchronise"]
