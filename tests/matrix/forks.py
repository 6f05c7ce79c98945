"""Many small jobs in little time: each in forked processes of its own, from a parent that has imported all.

A start of ranks costs some ten seconds of imports, more than a job on a tiny model. The children share the parent's
pages, so that host peaks hold the imports as those of a fresh process do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from dlrscale import config as configuration
from dlrscale import jobs, launcher
from dlrscale.config import RunConfig
from dlrscale.engine.devices import free_port, import_deepspeed
from dlrscale.errors import ConfigError, DlrscaleError, describe

CORES = 2
LIMIT_S, PATIENCE_S = 600.0, 30.0  # of ranks: in all, and after one of them has failed


def ready() -> None:
    """Import what ranks need, once."""
    os.environ.update({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    os.environ.update({k: v for k, v in launcher.environment(1).items() if k.startswith(("HF_", "TRANSFORMERS_"))})
    import torch

    torch.set_num_threads(1)
    import_deepspeed()


def fork(num_ranks: int, body: Callable[[], int], log: Path) -> list[int]:
    """Start ranks.

    Args:
        num_ranks: How many.
        body: What each of them runs; its exit code.
        log: Where their output goes, after what is there.

    Returns:
        Their process ids.
    """
    import torch

    port, pids = str(free_port()), []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            # Makes torch's thread pool anew. Left to the threads that load a model, two at once break it (caffe2's
            # pthreadpool() after a fork: "Invalid thread pool").
            torch.set_num_threads(1)
            os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE"), str(num_ranks))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(own, 1)
            os.dup2(own, 2)
            code = body()
        except DlrscaleError as error:
            print(describe(error) or error, flush=True)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pids


def wait(pids: list[int]) -> list[int]:
    """Wait for ranks; they are killed after `LIMIT_S`, or `PATIENCE_S` after the first that failed.

    Args:
        pids: Their process ids.

    Returns:
        Their exit codes, in the order in which they ended.
    """
    running, codes, deadline = list(pids), [], time.monotonic() + LIMIT_S
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
                if codes[-1]:
                    deadline = min(deadline, time.monotonic() + PATIENCE_S)
        if time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def run(config: RunConfig) -> list[int]:
    """Start the ranks of a job; their process ids."""
    return fork(config.num_ranks, lambda: jobs.run(config), Path(config.out) / "ranks.log")


def run_all(configs: Iterable[RunConfig], cores: int = CORES) -> dict[str, str]:
    """Run jobs, as many at once as cores have room for their ranks; one that was done before is not run again.

    Args:
        configs: Their configurations, which are asked for one by one.
        cores: Ranks at once.

    Returns:
        The fault of each job that was refused, by its name.
    """
    refused: dict[str, str] = {}
    running: dict[tuple[int, ...], float] = {}

    def wait(room: int) -> None:
        while running and sum(map(len, running)) > cores - room:
            for pids, started in list(running.items()):
                if all(_ended(pid) for pid in pids):
                    del running[pids]
                elif time.monotonic() - started > LIMIT_S:
                    for pid in pids:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, 9)
            time.sleep(0.02)

    for config in configs:
        try:
            merged = jobs.preflight(config)
            ids = configuration.run_ids(config, merged)
            done = configuration.check_folder(Path(config.out), *ids)
        except ConfigError as error:
            refused[config.name] = str(error)
            continue
        if done is None:
            wait(min(cores, config.num_ranks))
            Path(config.out).mkdir(parents=True, exist_ok=True)
            configuration.claim_folder(Path(config.out), *ids)
            running[tuple(run(config))] = time.monotonic()
    wait(cores)
    return refused


_gone: set[int] = set()


def _ended(pid: int) -> bool:
    if pid not in _gone:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                return False
        _gone.add(pid)
    return True
