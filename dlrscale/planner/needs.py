"""What a job needs on its fullest device and host, phase by phase and term by term, and whether hardware has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dlrscale.planner.hardware import Hardware
from dlrscale.planner.states import Term

# Beside what is counted: blocks that the allocator cannot use again, and what a CUDA context takes outside of it.
# Both are assumptions until a run on an accelerator calibrates them (tests/gpu); a plan names them.
FRAGMENTATION = 0.05
CONTEXT_BYTES = 600 << 20
PROCESS_BYTES = 600 << 20  # resident memory of a rank with its libraries, measured on a CPU
LARGEST_MICRO_BATCH = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The memory of one job.

    Attributes:
        states: Model states and DeepSpeed's buffers on one rank.
        phases: Bytes on the device by phase and term, each phase at its highest moment.
        model_bytes: The weights that every rank loads into host memory before DeepSpeed parts them.
        ranks_per_node: Ranks on the fullest host.
    """

    states: Mapping[str, Term]
    phases: Mapping[str, Mapping[str, int]]
    model_bytes: int
    ranks_per_node: int

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes on the device by phase."""
        return {phase: sum(terms.values()) for phase, terms in self.phases.items()}

    @property
    def peak_phase(self) -> str:
        """The phase of the highest moment."""
        return max(self.peaks, key=self.peaks.get)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that tensors take on the device at once."""
        return max(self.peaks.values())

    @property
    def device_terms(self) -> dict[str, int]:
        """The terms of the highest moment; they add up to the peak."""
        return {name: size for name, size in self.phases[self.peak_phase].items() if size}

    @property
    def host_terms(self) -> dict[str, int]:
        """What the ranks of one host keep in its memory while they train."""
        terms = {name: term.host * self.ranks_per_node for name, term in self.states.items() if term.host}
        return terms | {"processes": PROCESS_BYTES * self.ranks_per_node}

    @property
    def host_load_bytes(self) -> int:
        """A host while every rank of it holds the whole model."""
        return self.ranks_per_node * (PROCESS_BYTES + self.model_bytes)

    @property
    def host_peak_bytes(self) -> int:
        """The most bytes on one host."""
        return max(self.host_load_bytes, sum(self.host_terms.values()))

    def lacking(self, hardware: Hardware) -> list[str]:
        """What does not fit, one sentence each; empty where all fits."""
        found = []
        needed = int(self.peak_bytes * (1 + FRAGMENTATION)) + CONTEXT_BYTES
        if needed > hardware.memory_bytes:
            found.append(
                f"a device needs {gib(needed)} in the phase {self.peak_phase}, and {hardware.name} has "
                f"{gib(hardware.memory_bytes)}"
            )
        if hardware.host_memory_bytes and self.host_peak_bytes > hardware.host_memory_bytes:
            found.append(
                f"a host needs {gib(self.host_peak_bytes)}, and one of {hardware.name} has "
                f"{gib(hardware.host_memory_bytes)}"
            )
        return found


def states_in(states: Mapping[str, Term], phase: str) -> dict[str, int]:
    """The terms on the device that a phase of a step holds."""
    return {name: term.device for name, term in states.items() if phase in term.during}


def largest_micro_batch(needs: Callable[[int], Needs], hardware: Hardware) -> int:
    """The largest micro-batch that fits; 0 where not even one sequence does.

    Args:
        needs: The needs of a job by its micro-batch, which grow with it.
        hardware: The device and its host.

    Returns:
        Sequences per device and forward, at most 2^16.
    """
    low, high = 0, 1
    while high <= LARGEST_MICRO_BATCH and not needs(high).lacking(hardware):
        low, high = high, 2 * high
    high = min(high, LARGEST_MICRO_BATCH + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if needs(middle).lacking(hardware) else (middle, high)
    return low


def gib(size: float) -> str:
    """Bytes in GiB for people, little in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 or not size else f"{size / 2**20:.2f} MiB"
