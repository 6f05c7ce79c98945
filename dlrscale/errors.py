"""The errors that dlrscale shows to people; each knows the exit code that it ends the command with."""

from __future__ import annotations

import errno
import os
import re
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


NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}
# torch and safetensors do not raise an OSError where a write fails; torch's own words tell no errno at all.
NO_SPACE_WORDS = re.compile(
    r"No space left|os error (28|122|27)\b|PytorchStreamWriter failed writing|iostream error"
    r"|unexpected pos \d+ vs \d+|database or disk is full"
)


def describe(error: BaseException, place: str | os.PathLike | None = None) -> str | None:
    """The one message for a fault of the file system: no space left, or a place that may not be written.

    Args:
        error: What was raised; what it was raised from counts too.
        place: The run's folder, named where the error names no file.

    Returns:
        The message, or None if the error is no such fault.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in chain:
        number = cause.errno if isinstance(cause, OSError) else None
        file = getattr(cause, "filename", None) or place
        if number in NO_SPACE or (number is None and NO_SPACE_WORDS.search(str(cause))):
            reason = os.strerror(number) if number else " ".join(str(cause).split())[:200]
            return (
                f"No space left{f' for {file}' if file else ''} ({reason}). What was whole before is whole; free some "
                "space and run the same command again."
            )
        if number in NO_ACCESS and file:
            return (
                f"{file} cannot be read or written ({os.strerror(number)}). Choose another folder, or change its "
                "permissions."
            )
    return None
