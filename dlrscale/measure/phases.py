"""Seconds and peaks of memory per phase of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from dlrscale.launcher.ranks import RankNote, status_bytes

TRAINING_PHASES = ("distil", "forward", "backward", "optimizer")


def _reset_host_peak() -> None:
    """Let the kernel's high-water mark of this process start at its present size, where it can be written."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def host_peak_bytes() -> int:
    """Peak resident memory of this process since the last reset, in bytes.

    VmHWM and not getrusage: Linux carries the latter's maximum over from the parent process.
    """
    peak = status_bytes("VmHWM")
    if peak is None:
        import psutil

        peak = psutil.Process().memory_info().rss
    return peak


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Phases:
    """Seconds and peaks of named phases: `load`, `forward`, `backward`, `optimizer`, `evaluate`, `save`.

    A phase that occurs many times adds its seconds and keeps its highest peaks. `broken` is the phase that an
    exception has left, None before.

    Args:
        device: Where the work is done.
        note: Where each phase is said as it begins, for whoever watches this rank.
    """

    def __init__(self, device: torch.device, note: RankNote | None = None):
        self.device = device
        self.note = note
        self.broken: str | None = None
        self.phases: dict[str, dict[str, float]] = {}
        self.step: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside as part of a phase."""
        synchronise(self.device)
        _reset_host_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.note is not None:
            self.note.say(name)
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self.broken = self.broken or name
            raise
        finally:
            with contextlib.suppress(RuntimeError):  # after an error the device may have nothing more to say
                synchronise(self.device)
            seconds = time.perf_counter() - start
            entry = self.phases.setdefault(name, {"seconds": 0.0, "host_peak_rss_bytes": 0})
            entry["seconds"] += seconds
            entry["host_peak_rss_bytes"] = max(entry["host_peak_rss_bytes"], host_peak_bytes())
            if self.device.type == "cuda":
                for key, value in (
                    ("accelerator_peak_allocated_bytes", torch.cuda.max_memory_allocated(self.device)),
                    ("accelerator_peak_reserved_bytes", torch.cuda.max_memory_reserved(self.device)),
                ):
                    entry[key] = max(entry.get(key, 0), value)
            self.step[name] = self.step.get(name, 0.0) + seconds

    def take_step(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        taken, self.step = self.step, {}
        return taken

    def peaks(self) -> dict[str, float]:
        """The highest peaks over the phases of training and the one that broke, under the record's metric names."""
        training = [p for name, p in list(self.phases.items()) if name in TRAINING_PHASES or name == self.broken]
        keys = ("accelerator_peak_allocated_bytes", "accelerator_peak_reserved_bytes", "host_peak_rss_bytes")
        found = {key: [p[key] for p in training if key in p] for key in keys}
        return {f"memory/{key}": max(values) for key, values in found.items() if values}
