"""What lets a rank end when it should: DeepSpeed's launcher leaves ranks behind when it is killed itself.

A rank waits in native code most of the time, where Python runs no signal handler; so a thread of its own looks
after signals and after the processes that started the rank, and ends it at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from dlrscale.record import process_started

COMMAND = "DLRSCALE_COMMAND"  # "<pid> <start>" of the dlrscale command on this host, which writes the record then
POLL_S = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def command_variable() -> dict[str, str]:
    """The environment variable by which a rank knows the command that started it."""
    return {COMMAND: f"{os.getpid()} {process_started(os.getpid())}"}


class Guard:
    """Ends this process when it is told to, or when its launcher or its command has gone.

    `last_words` is called before, with the reason, where no command is left to write the run's record.
    """

    def __init__(self) -> None:
        self.last_words: Callable[[str], None] | None = None
        self.busy = threading.Lock()  # held while the record is written
        self._elders = _elders()
        self._command = _command()

    def start(self) -> Guard:
        """Watch from now on; call it from the main thread, before anything slow is imported."""
        self._wakeup, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, lambda *_: None)  # the thread reads the number from the pipe
        threading.Thread(target=self._watch, name="dlrscale-guard", daemon=True).start()
        return self

    def _watch(self) -> None:
        while True:
            if select.select([self._wakeup], [], [], POLL_S)[0]:
                for number in os.read(self._wakeup, 16):
                    if number in SIGNALS:
                        self._end(f"ended by {signal.Signals(number).name}", 128 + number)
            for what, (pid, started) in self._elders.items():
                if process_started(pid) != started:
                    self._end(f"the {what} that started this rank has gone", 1)

    def _end(self, reason: str, code: int) -> None:
        command_lives = self._command is not None and process_started(self._command[0]) == self._command[1]
        with contextlib.suppress(Exception):
            self.busy.acquire(timeout=10.0)
            if self.last_words is not None and not command_lives:
                self.last_words(reason)
        os._exit(code)


def _command() -> tuple[int, int] | None:
    words = os.environ.get(COMMAND, "").split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else None


def _elders() -> dict[str, tuple[int, int | None]]:
    """The processes without which this rank is an orphan: launcher, DeepSpeed's runner, dlrscale command."""
    found: dict[str, tuple[int, int | None]] = {}
    parent = os.getppid()
    if parent > 1:
        found["launcher"] = (parent, process_started(parent))
        runner = _parent_of(parent)
        # What starts the launcher by other means (a shell, a scheduler) may leave it alone on purpose.
        if runner > 1 and _script(runner) == "deepspeed":
            found["deepspeed runner"] = (runner, process_started(runner))
    command = _command()
    if command is not None:
        found["dlrscale command"] = command
    return found


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _script(pid: int) -> str:
    """The name of the script that a Python process runs."""
    try:
        return Path(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1])).name
    except (OSError, IndexError):
        return ""
