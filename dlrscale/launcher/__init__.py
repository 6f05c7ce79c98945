"""Start DeepSpeed's launcher for a job, run it in a session of its own, and see that it ended.

A job is proved by the record that its ranks wrote, not by the launcher's exit code: DeepSpeed's runner, which a
hostfile needs, returns 0 when the process that watches the ranks is killed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dlrscale import config as configuration
from dlrscale.config import RunConfig
from dlrscale.errors import ConfigError, JobError
from dlrscale.launcher import imports as imports
from dlrscale.launcher.guard import SIGNALS, command_variable

# Exit codes of ranks: each ends its siblings at once; DeepSpeed's launcher passes it on.
EXIT_OOM = 11
EXIT_DIVERGED = 12
EXIT_CONFIG = 2
EXIT_FAILED = 1
GRACE_S = 35.0
JOB = Path(__file__).resolve().parents[1] / "jobs" / "__main__.py"


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slots_by_host(path: str) -> dict[str, int]:
    """Ranks that each host of a DeepSpeed hostfile (`host slots=8` per line) offers.

    Args:
        path: The hostfile.

    Returns:
        The slots by host.

    Raises:
        ConfigError: If the file is missing or a line is of another form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ConfigError(f"--hostfile {path}: no such file.") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, _, count = words[-1].partition("=")
        if len(words) != 2 or name != "slots" or not count.isdecimal():
            raise ConfigError(f"{path}:{number}: {line!r} is not of the form `host slots=8`.")
        found[words[0]] = found.get(words[0], 0) + int(count)
    return found


def hostfile_slots(path: str) -> int:
    """Ranks that all hosts of a hostfile offer together; see `slots_by_host`."""
    return sum(slots_by_host(path).values())


def deepspeed() -> str:
    """DeepSpeed's program: the one beside this interpreter, else the one on PATH."""
    own = Path(sys.executable).with_name("deepspeed")
    return str(own) if own.exists() else "deepspeed"


def command(config: RunConfig, port: int | None = None) -> list[str]:
    """The launch line of a job as one would type it: `deepspeed ... dlrscale/jobs/__main__.py '<configuration>'`.

    Args:
        config: The resolved configuration.
        port: The port at which ranks on this host meet; any free one by default.

    Returns:
        The words of the line.
    """
    line = [deepspeed(), "--no_local_rank"]
    if config.hostfile:
        line += ["--hostfile", config.hostfile]
    else:
        line += ["--num_gpus", str(config.num_ranks), "--master_addr", "127.0.0.1"]
        line += ["--master_port", str(port or free_port())]
    return [*line, str(JOB), configuration.to_json(config)]


def on_this_host(num_ranks: int, script: str | Path, *arguments: str) -> list[str]:
    """What starts a script on some ranks of this host: the launcher to which `deepspeed` comes after seconds.

    Args:
        num_ranks: The ranks.
        script: What each of them runs.
        *arguments: Its arguments.

    Returns:
        The words of the line.
    """
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(num_ranks))}).encode()).decode()
    return [
        sys.executable, "-u", str(Path(__file__).with_name("node.py")), f"--world_info={hosts}",
        "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--no_local_rank", str(script), *arguments,
    ]  # fmt: skip


def start_line(config: RunConfig) -> list[str]:
    """What this process starts for a job: DeepSpeed's runner where there is a hostfile, else its launcher itself."""
    if config.hostfile:
        return command(config)
    return on_this_host(config.num_ranks, JOB, configuration.to_json(config))


def show(line: list[str]) -> str:
    """A command as one can paste it into a shell."""
    return shlex.join(line)


def environment(num_ranks: int) -> dict[str, str]:
    """The environment of ranks: the CPU is shared out among them, and their own file locks stay quiet."""
    import torch

    env = dict(os.environ)
    env.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("TRANSFORMERS_VERBOSITY", "error")
    env.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # The venv's own scripts must be found (ninja), and a source checkout must be importable from any folder.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    return env


def usable_home() -> dict[str, str]:
    """Variables that give libraries a home and caches which can be written, where this user has none.

    A user without a home (a container's bare user id) gets a temporary one. Where there is a home that cannot be
    written, it stays, for what is read there (a cache of the Hugging Face hub), and only caches move.

    Returns:
        What to add to the environment; empty where all is well.
    """
    home = os.path.expanduser("~")
    if home == "~":  # neither HOME nor an entry of the user
        return {"HOME": _spare_folder()}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"))
    there = next(folder for folder in (cache, *cache.absolute().parents) if os.path.exists(folder))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return {}
    spare = _spare_folder()
    found = {"XDG_CACHE_HOME": spare, "TRITON_HOME": spare, "MPLCONFIGDIR": os.path.join(spare, "matplotlib")}
    if (cache / "huggingface").is_dir():
        found["HF_HOME"] = str(cache / "huggingface")
    os.makedirs(found["MPLCONFIGDIR"], exist_ok=True)
    return {key: value for key, value in found.items() if key == "XDG_CACHE_HOME" or key not in os.environ}


def _spare_folder() -> str:
    """A folder of this user alone below the temporary one: compiled code goes into caches."""
    folder = Path(tempfile.gettempdir(), f"dlrscale-{os.getuid()}")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022:
        return str(folder)
    return tempfile.mkdtemp(prefix="dlrscale-")


PORT_TAKEN = (b"EADDRINUSE", b"Address already in use", b"address already in use")


def port_was_taken(log: Path, start: int) -> bool:
    """Whether a log says, from byte `start` on, that the ranks' meeting port had been taken in the meantime."""
    with open(log, "rb") as file:
        file.seek(start)
        text = file.read()
    return any(words in text for words in PORT_TAKEN)


class Interrupted(KeyboardInterrupt):
    """A signal told this command to end; every rank has gone. `str` of it names the signal."""


def run(config: RunConfig, watch: Callable[[], None] = lambda: None) -> int:
    """Run a job to its end and return the launcher's exit code; its output goes to `<out>/ranks.log`.

    However it ends, no process of it is left. A port that another process took between our choice and the ranks' use
    is chosen once more.

    Args:
        config: The resolved configuration.
        watch: Called twice a second meanwhile, to show progress.

    Returns:
        The launcher's exit code.

    Raises:
        JobError: If the launcher cannot be started.
        Interrupted: If this process got SIGINT, SIGTERM or SIGHUP.
    """
    log = Path(config.out) / "ranks.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = log.stat().st_size if log.exists() else 0
    code = _run_once(config, log, watch)
    if code and not config.hostfile and port_was_taken(log, start):
        code = _run_once(config, log, watch)
    return code


def _run_once(config: RunConfig, log_file: Path, watch: Callable[[], None]) -> int:
    line = start_line(config)
    env = environment(config.num_ranks) | ({} if config.hostfile else command_variable())
    with _interrupted_by_signals(), open(log_file, "ab") as log:
        try:
            process = subprocess.Popen(
                line, env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            raise JobError(f"The launcher did not start ({error}). Install the project in this environment.") from None
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
                watch()
        finally:
            end_group(process)  # also where the leader alone was killed: its children stay in the group
    return process.returncode


def end_group(process: subprocess.Popen) -> None:
    """End a process group, whose leader may have gone: SIGTERM, and SIGKILL for what is left after a while.

    Args:
        process: The group's leader.
    """
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                process.poll()  # a leader that was not waited for would stay in the group
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Raise `Interrupted` in the main thread at the first signal; further ones wait for the end of the ranks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        if len(came) == 1:
            raise Interrupted(signal.Signals(number).name)

    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_of(code: int) -> str | None:
    """The signal that ended a rank, from the launcher's exit code: 256 - n as the launcher passes it, or 128 + n."""
    if code == 255:  # SIGHUP, but also what ssh says of a host that it cannot reach
        return None
    for number in (256 - code, code - 128, -code):
        if 1 <= number <= 31:
            return signal.Signals(number).name
    return None


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a log, for an error message."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
