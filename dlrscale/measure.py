"""Measuring: bytes saved for backward, peaks and seconds per phase.

Measuring never runs inside a timed step: saved bytes are counted in the first step, which is a warm-up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dlrscale.launcher.ranks import RankNote, status_bytes

TRAINING_PHASES = ("distil", "forward", "backward", "optimizer")


class SavedBytes:
    """Count the bytes that autograd saves for backward, once per storage, without parameters and buffers.

    Each storage is held while counted, since a freed address would be used again. Weights that ZeRO-3
    gathers for a moment are known through the modules that are running. Bytes are attributed to every running
    module that `parts` names.

    Args:
        model: The model whose parameters and buffers do not count.
        parts: Modules by label, whose share is counted in `by_part`.
    """

    def __init__(self, model: nn.Module, parts: dict[str, nn.Module] | None = None):
        self.model = model
        self.labels = {id(module): label for label, module in (parts or {}).items()}
        self.total = 0
        self.by_part: dict[str, int] = dict.fromkeys(parts or {}, 0)
        self._held: dict[int, torch.UntypedStorage] = {}
        self._running: list[tuple[set[int], str | None]] = []
        tensors = [*model.parameters(), *model.buffers()]
        # ZeRO-3 gives its parameters a `ds_id` and an empty or passing storage: these are found while running.
        self._static = {_key(t) for t in tensors if t.numel() and not hasattr(t, "ds_id")}

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        own = {_key(p) for p in module.parameters(recurse=False)}
        self._running.append((own, self.labels.get(id(module))))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        base = tensor._base if tensor._base is not None else tensor
        static = key in self._static or isinstance(base, nn.Parameter) or any(key in own for own, _ in self._running)
        if not static and key not in self._held:
            self._held[key] = tensor.untyped_storage()
            size = tensor.untyped_storage().nbytes()
            self.total += size
            for label in {label for _, label in self._running if label is not None}:
                self.by_part[label] += size
        return tensor

    def __enter__(self) -> SavedBytes:
        self._handles = []
        for module in self.model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter_module))
            self._handles.append(module.register_forward_hook(self._leave_module, always_call=True))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._held.clear()


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


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
