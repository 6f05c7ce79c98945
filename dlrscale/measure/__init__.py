"""Measuring: bytes saved for backward, live bytes, peaks and seconds per phase, FLOPs, inference.

Measuring never runs inside a timed step: what needs hooks is counted in steps of its own, which are not timed.
"""

from dlrscale.measure.flops import ATTENTION_COUNTED, Flops
from dlrscale.measure.inference import speeds, spread
from dlrscale.measure.live import LiveBytes
from dlrscale.measure.phases import TRAINING_PHASES, Phases, check_clean, host_peak_bytes, synchronise
from dlrscale.measure.saved import SavedBytes

__all__ = [
    "ATTENTION_COUNTED",
    "TRAINING_PHASES",
    "Flops",
    "LiveBytes",
    "Phases",
    "SavedBytes",
    "check_clean",
    "host_peak_bytes",
    "speeds",
    "spread",
    "synchronise",
]
