"""Seconds and peaks of memory per phase of a run."""

from __future__ import annotations

import contextlib
import time
import warnings
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


CLEAN_BYTES = 1 << 30  # the device context of this process is among what is in use


def device_in_use(device: torch.device) -> int | None:
    """Bytes of an accelerator's memory in use that this process's allocator does not hold; None on a CPU.

    Another process's memory is among them, and this process's own device context of a few hundred MiB.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def check_clean(device: torch.device) -> dict[str, int]:
    """Look, before a run takes memory, whether the accelerator is free; warns where it is not.

    Args:
        device: The device.

    Returns:
        `device_in_use_bytes` for the record; nothing on a CPU.
    """
    used = device_in_use(device)
    if used is None:
        return {}
    if used > CLEAN_BYTES:
        warnings.warn(
            f"{used / 2**30:.1f} GiB of {device} are in use before this run starts, so its peaks and times are not "
            "its own. End the other process (nvidia-smi names it), or choose another device.",
            stacklevel=2,
        )
    return {"device_in_use_bytes": used}


def _allocator_events(device: torch.device) -> dict[str, int]:
    """How often the allocator has freed its cache and tried again, and has failed; empty on a CPU."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(device)
    return {"alloc_retries": stats.get("num_alloc_retries", 0), "alloc_ooms": stats.get("num_ooms", 0)}


class Phases:
    """Seconds and peaks of named phases: `load`, `forward`, `backward`, `optimizer`, `evaluate`, `save`.

    A phase that occurs many times adds its seconds and keeps its highest peaks. `broken` is the phase that an
    exception has left, None before. Phases do not nest, but for those of `inside`.

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
        self._around: tuple[Phases, str] | None = None

    def inside(self, name: str) -> Phases:
        """Phases of their own that run inside a phase of these, which keeps its peaks though they begin new ones."""
        found = Phases(self.device)
        found._around = (self, name)
        return found

    def _take_peaks(self, name: str) -> dict[str, float]:
        """Raise a phase's peaks, and those of the phase around it, to what was seen since the last reset."""
        if self._around is not None:
            self._around[0]._take_peaks(self._around[1])
        entry = self.phases.setdefault(name, {"seconds": 0.0, "host_peak_rss_bytes": 0})
        entry["host_peak_rss_bytes"] = max(entry["host_peak_rss_bytes"], host_peak_bytes())
        if self.device.type == "cuda":
            for key, value in (
                ("accelerator_peak_allocated_bytes", torch.cuda.max_memory_allocated(self.device)),
                ("accelerator_peak_reserved_bytes", torch.cuda.max_memory_reserved(self.device)),
            ):
                entry[key] = max(entry.get(key, 0), value)
        return entry

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside as part of a phase."""
        synchronise(self.device)
        if self._around is not None:
            self._around[0]._take_peaks(self._around[1])
        _reset_host_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        events = _allocator_events(self.device)
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
            entry = self._take_peaks(name)
            entry["seconds"] += seconds
            for key, value in _allocator_events(self.device).items():
                entry[key] = entry.get(key, 0) + value - events[key]
            self.step[name] = self.step.get(name, 0.0) + seconds

    def take_step(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        taken, self.step = self.step, {}
        return taken

    def peaks(self) -> dict[str, float]:
        """The highest peaks, and all retries of the allocator, over the phases of training and the one that broke.

        Under the record's metric names.
        """
        training = [p for name, p in list(self.phases.items()) if name in TRAINING_PHASES or name == self.broken]
        keys = ("accelerator_peak_allocated_bytes", "accelerator_peak_reserved_bytes", "host_peak_rss_bytes")
        found = {key: [p[key] for p in training if key in p] for key in keys}
        events = {key: [p[key] for p in training if key in p] for key in ("alloc_retries", "alloc_ooms")}
        return {f"memory/{key}": max(values) for key, values in found.items() if values} | {
            f"memory/accelerator_{key}": sum(values) for key, values in events.items() if values
        }
