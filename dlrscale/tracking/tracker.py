"""The background thread that mirrors one run, and what the training calls of it."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dlrscale import record as records
from dlrscale.tracking import folder
from dlrscale.tracking.ended import sweep_soon
from dlrscale.tracking.mirror import Mirror
from dlrscale.tracking.store import first_line, quiet, resolve, warn_once

START_S = 7.0  # the longest that a Tracker delays the start of training (the import of mlflow)
FINISH_S = 15.0  # the longest that `finish` waits for the store
FLUSH_S = 1.0  # rows are sent together at this interval
RETRY_S = (5.0, 60.0)  # first and longest pause after a failure
WAITING_ROWS = 100_000  # rows kept while the store is away; the steps file has them all


class Tracker:
    """Copies one run to MLflow, on rank 0 only; never raises, and never makes the run wait for the store.

    Building it waits for the import of mlflow, `START_S` at the most; all calls are made by a thread of its
    own. Rows that could not be sent are sent again later. The first failure is told on stderr, no other is; a
    note in the run's folder stays until MLflow has everything.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_name: str,
        *,
        config: dict[str, Any],
        tags: dict[str, Any],
        parent_lock_id: str | None = None,
        system_metrics: bool = True,
    ):
        """Start to mirror a run.

        Args:
            uri: URI of the store; null for the default one.
            experiment: Name of the MLflow experiment: one per study.
            run_name: Name of the run in MLflow.
            config: Settings of the run, nested or flat. With `out` among them, a run counts as started again
                only in the same folder (`folder.naming` makes this and the tags of a record).
            tags: `id`, `resume_id`, `kind`, `side`, `strategy`, `lock_id`, with or without the `dlrscale.`
                before them; null values are left out.
            parent_lock_id: `lock_id` of the lock that an attack belongs to.
            system_metrics: Whether to log use of CPU, memory, network and GPU.
        """
        self._uri, self._out = uri or "(default)", Path(config["out"]) if config.get("out") else None
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self._uri = resolve(uri)
            # Taken as text now, so that nothing that the caller changes later is seen from the thread.
            config = json.loads(records.dumps(config, default=str))
            tags = tags | folder.process()
            self._mirror = Mirror(
                self._uri, experiment, run_name, config, tags, parent_lock_id, system_metrics=system_metrics
            )
            self._thread = threading.Thread(target=self._work, name="dlrscale-mlflow", daemon=True)
            self._thread.start()
            self._ready.wait(START_S)
        except Exception as error:
            self._thread = None
            self._warn(error)

    def log_step(self, row: Mapping[str, Any], step: int) -> None:
        """Queue one step's row of metrics.

        Args:
            row: Names and values; what is no finite number is left out.
            step: The step that the values belong to.
        """
        if self._thread is None:
            return
        with suppress(Exception):
            self._items.put((dict(row), int(step), time.time_ns() // 1_000_000))

    def finish(self, record: Mapping[str, Any], artifacts: list[Path] | None = None) -> None:
        """Send what is left, the record's metrics and the artifacts, and end the run in MLflow.

        Waits at most `FINISH_S` seconds.

        Args:
            record: The run's record.
            artifacts: Files and folders to attach.
        """
        if self._thread is None:
            return
        try:
            copy = json.loads(records.dumps(record, default=str))
            self._items.put((copy, [Path(p) for p in artifacts or []]))
            self._thread.join(FINISH_S)
            if self._thread.is_alive():
                self._warn(f"not done after {FINISH_S:.0f} s")
        except Exception as error:
            self._warn(error)

    def _warn(self, error: BaseException | str) -> None:
        warn_once(self._uri, error, self._out)
        if self._out is not None:
            folder.set_behind(self._out, self._uri, error if isinstance(error, str) else first_line(error))

    def _work(self) -> None:
        """The thread: gather rows, send them together, try again later what failed."""
        try:
            quiet()
            import mlflow  # noqa: F401

            quiet()  # the import turns MLflow's own messages on again
        except BaseException as error:
            self._warn(error)
            return
        finally:
            self._ready.set()
        rows: deque = deque(maxlen=WAITING_ROWS)
        pause, next_try, last = RETRY_S[0], 0.0, None
        while last is None:
            last = self._gather(rows)
            if last is None and time.monotonic() < next_try:
                continue
            try:
                if not self._mirror.is_started:
                    self._mirror.start()
                    sweep_soon(self._uri)
                self._mirror.send(rows)
                if last is not None:
                    self._mirror.end(*last, warn=self._warn)
                    if self._mirror.whole and self._out is not None:
                        folder.clear_behind(self._out, self._uri)
                pause = RETRY_S[0]
            except BaseException as error:
                self._warn(error)
                next_try, pause = time.monotonic() + pause, min(2 * pause, RETRY_S[1])
                self._mirror.calm()

    def _gather(self, rows: deque) -> tuple | None:
        """Add what comes within `FLUSH_S` to the rows; returns the last item when it has come."""
        until = time.monotonic() + FLUSH_S
        while (left := until - time.monotonic()) > 0:
            try:
                item = self._items.get(timeout=left)
            except queue.Empty:
                break
            if len(item) == 2:
                return item
            self._mirror.whole &= len(rows) < WAITING_ROWS
            rows.append(item)
        return None
