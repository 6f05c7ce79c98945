"""The errors that dlrscale shows to people; each knows the exit code that it ends the command with."""

from __future__ import annotations

from collections.abc import Iterable


class DlrscaleError(Exception):
    """Base of all errors whose message is written for the user."""

    exit_code = 4


class ConfigError(DlrscaleError):
    """The input is wrong: options, files, data or model folders. Holds every fault that was found.

    Each fault is one sentence or two that name the fault, the place and the mend.
    """

    exit_code = 2

    def __init__(self, faults: str | Iterable[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class SurgeryError(ConfigError):
    """The model's MLPs cannot be found, replaced or flattened."""


class PlanError(DlrscaleError):
    """The plan says that the run cannot fit."""

    exit_code = 3


class JobError(DlrscaleError):
    """A launched job failed, or ended without an outcome."""

    exit_code = 4
