"""What a command sees of its ranks on this host while they run, and what the kernel says when one was killed.

Each rank keeps a small file in `<out>/.ranks` with its pid and what it is doing; the file outlives the rank.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

FOLDER, LOG = ".ranks", "ranks.log"
# What libraries say when they get no memory; native ones abort after it.
OUT_OF_MEMORY = (
    "not enough memory", "can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc",
    "memory allocation of", "_STATUS_ALLOC_FAILED",
)  # fmt: skip
_WIDTH = 64


class RankNote:
    """The file in which one rank says what it is doing.

    Args:
        out: The run's folder.
        rank: The rank.
    """

    def __init__(self, out: Path, rank: int):
        folder = out / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def say(self, phase: str) -> None:
        """Write the phase that begins now; a few microseconds."""
        os.pwrite(self._handle, f"{os.getpid()} {phase}".ljust(_WIDTH).encode(), 0)


class Ranks:
    """The ranks of a run on this host, seen from outside.

    `peak_rss_bytes` is the highest resident memory of one rank that was seen.

    Args:
        out: The run's folder; notes of an earlier start are removed.
    """

    def __init__(self, out: Path):
        self.folder = out / FOLDER
        shutil.rmtree(self.folder, ignore_errors=True)
        self.peak_rss_bytes = 0
        self._oom_kills = oom_kills()
        self._log = out / LOG
        self._log_start = self._log.stat().st_size if self._log.exists() else 0

    def notes(self) -> dict[int, tuple[int, str]]:
        """The pid and the phase of each rank."""
        found = {}
        for file in self.folder.glob("*"):
            if not file.name.isdecimal():
                continue
            pid, _, phase = file.read_text(encoding="utf-8").strip().partition(" ")
            if pid:
                found[int(file.name)] = (int(pid), phase)
        return found

    def sample(self) -> None:
        """Look at each rank's peak of resident memory."""
        for pid, _ in self.notes().values():
            self.peak_rss_bytes = max(self.peak_rss_bytes, status_bytes("VmHWM", pid) or 0)

    def killed_for_memory(self) -> bool:
        """Whether the kernel killed a process of this host for want of memory since this object was made."""
        return oom_kills() > self._oom_kills

    def last_words(self) -> str:
        """The end of what the ranks wrote into their log since this object was made."""
        try:
            return self._log.read_bytes()[self._log_start :][-10_000:].decode(errors="replace")
        except OSError:
            return ""

    def aborted_for_memory(self) -> bool:
        """Whether the ranks' last words say that memory ran out."""
        said = self.last_words()
        return any(words in said for words in OUT_OF_MEMORY)


def status_bytes(field: str, pid: int | str = "self") -> int | None:
    """A field of /proc/<pid>/status in bytes, or None where there is no such file or field."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def oom_kills() -> int:
    """Processes that the kernel of this host has killed for want of memory since it started; 0 if it does not say."""
    try:
        match = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(match.group(1)) if match else 0
