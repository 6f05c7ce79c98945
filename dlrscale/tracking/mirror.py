"""The calls to MLflow that mirror one run: its experiment, parent, parameters, points and end."""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
import re
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dlrscale import record as records
from dlrscale.tracking.store import sqlite_path

TAG = "dlrscale."
VALUE_LENGTH, KEY_LENGTH, PARAMS_PER_CALL, METRICS_PER_CALL = 6000, 250, 100, 1000
CUT_MARK = " ...[cut; whole in config.json]"


def legal(name: str) -> str:
    """A metric or parameter name as MLflow takes it on every system: other characters become `_`."""
    name = re.sub(r"[^0-9A-Za-z_\-. /]", "_", str(name))
    name = posixpath.normpath(name).lstrip("/") if name else "_"
    if name.startswith(".."):
        name = "_" + name[2:]
    return (name if name not in ("", ".") else "_")[:KEY_LENGTH]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as flat parameters, `a.b` for b in a; values that are too long for MLflow are cut."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
            continue
        text = value if isinstance(value, str) else records.dumps(value, default=str)
        if len(text) > VALUE_LENGTH:
            text = text[: VALUE_LENGTH - len(CUT_MARK)] + CUT_MARK
        flat[legal(name)] = text
    return flat


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row under legal names; all else is left out."""
    return {
        legal(key): float(value)
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


class Mirror:
    """The calls to MLflow for one run; used by one thread. Every method may raise and may be called again."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        config: dict[str, Any],
        tags: dict[str, str],
        parent_lock_id: str | None,
        system_metrics: bool,
    ):
        self.uri, self.experiment, self.run_name, self.config = uri, experiment, run_name, config
        self.parent_lock_id, self.system_metrics = parent_lock_id, system_metrics
        self.tags = {key: value[:5000] for key, value in tags.items()}
        if config.get("out"):
            folder = os.path.abspath(str(config["out"]))
            self.tags[TAG + "out"] = hashlib.sha256(folder.encode()).hexdigest()[:16]
        if self.tags.get(TAG + "kind") == "lock":
            self.tags.setdefault(TAG + "lock_id", self.tags.get(TAG + "id", ""))
        elif parent_lock_id:
            self.tags.setdefault(TAG + "lock_id", parent_lock_id)
        self.client: Any = None
        self.run_id: str | None = None
        self.monitor: Any = None
        self.resumed = False
        self.last: dict[str, tuple[int, float]] = {}  # metric -> step and value last sent
        self.known: dict[str, set[int]] = {}  # metric -> steps that a resumed run had before

    def send(self, rows: deque) -> None:
        """Start the run if need be and send all rows, taking those sent out of the deque."""
        from mlflow.entities import Metric

        if self.run_id is None:
            self._start()
        while rows:
            batch, points = [], []
            for values, step, stamp in list(rows):
                found = numbers({k: v for k, v in values.items() if k != "step"})
                if points and len(points) + len(found) > METRICS_PER_CALL:
                    break
                batch.append(found)
                points += [Metric(k, v, stamp, step) for k, v in found.items() if step not in self._known(k)]
                for name, value in found.items():
                    self.last[name] = (step, value)
            for first in range(0, len(points), METRICS_PER_CALL):
                self.client.log_batch(self.run_id, metrics=points[first : first + METRICS_PER_CALL])
            for _ in batch:
                rows.popleft()

    def end(self, record: dict[str, Any], artifacts: list[Path], warn: Any) -> None:
        """Send the record and the artifacts, and set the run's status from the outcome."""
        from mlflow.entities import Metric, RunTag

        if self.monitor is not None:
            self.monitor.finish()
            self.monitor = None
        stamp = time.time_ns() // 1_000_000
        step = max((step for step, _ in self.last.values()), default=0)
        points = [
            Metric(key, value, stamp, step)
            for key, value in numbers(record.get("metrics") or {}).items()
            if self.last.get(key) != (step, value)
        ]
        for first in range(0, len(points), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=points[first : first + METRICS_PER_CALL])
        outcome = str(record.get("outcome") or records.Outcome.FAILED.value)
        tags = [RunTag(TAG + "outcome", outcome)]
        if record.get("error"):
            tags.append(RunTag(TAG + "error", str(record["error"])[:5000]))
        self.client.log_batch(self.run_id, tags=tags)
        try:
            self._attach(record, artifacts)
        except Exception as error:  # the numbers are there: the run still gets its status
            warn(error)
        failed = outcome == records.Outcome.FAILED.value
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")

    def calm(self) -> None:
        """After a failure: let no other thread go on writing to a store that does not answer."""
        if self.monitor is not None:
            self.monitor._shutdown_event.set()
            self.monitor = None

    def _attach(self, record: dict[str, Any], artifacts: list[Path]) -> None:
        self.client.log_text(self.run_id, records.dumps(record, indent=1), "record.json")
        if record.get("deepspeed_config"):
            text = records.dumps(record["deepspeed_config"], indent=1)
            self.client.log_text(self.run_id, text, "deepspeed_config.json")
        for path in artifacts:
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), path.name)
            elif path.is_file():
                self.client.log_artifact(self.run_id, str(path))

    def _known(self, name: str) -> set[int]:
        """Steps of a metric that a resumed run holds already: steps done twice are not drawn twice."""
        if not self.resumed:
            return set()
        if name not in self.known:
            history = self.client.get_metric_history(self.run_id, name)
            self.known[name] = {point.step for point in history}
        return self.known[name]

    def _start(self) -> None:
        from mlflow import MlflowClient

        self.client = self.client or MlflowClient(self.uri)
        experiment_id = self._experiment_id()
        run = self._find_own(experiment_id)
        tags = dict(self.tags)
        if self.parent_lock_id and tags.get(TAG + "kind") != "lock":
            tags["mlflow.parentRunId"] = self._parent(experiment_id)
        if run is None:
            with suppress(Exception):
                import getpass

                tags.setdefault("mlflow.user", getpass.getuser())
            run = self.client.create_run(experiment_id, tags=tags, run_name=self.run_name)
        else:
            self.resumed = True
            self.client.update_run(run.info.run_id, status="RUNNING", name=self.run_name)
            for key, value in tags.items():
                self.client.set_tag(run.info.run_id, key, value)
        self._describe(run)
        self.run_id = run.info.run_id
        if self.system_metrics:
            self._watch()

    def _describe(self, run: Any) -> None:
        """Write the parameters; those of a resumed run stay, and what has changed is told by a tag."""
        from mlflow.entities import Param

        run_id, before = run.info.run_id, dict(run.data.params)
        flat = flatten(self.config)
        new = [Param(key, value) for key, value in flat.items() if key not in before]
        for first in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=new[first : first + PARAMS_PER_CALL])
        for key, value in flat.items():
            if before.get(key, value) != value:
                self.client.set_tag(run_id, legal(f"{TAG}resumed_with.{key}"), value[:5000])
        self.client.log_text(run_id, records.dumps(self.config, indent=1), "config.json")

    def _watch(self) -> None:
        """Start MLflow's own monitor of the machine; without it the run is mirrored all the same."""
        with suppress(Exception):
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self.monitor = SystemMetricsMonitor(
                self.run_id, sampling_interval=5, resume_logging=self.resumed, tracking_uri=self.uri
            )
            self.monitor.start()

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            return found.experiment_id
        path = sqlite_path(self.uri)
        place = (path.parent / "mlartifacts").as_uri() if path else None
        try:
            return self.client.create_experiment(self.experiment, artifact_location=place)
        except MlflowException:
            found = self.client.get_experiment_by_name(self.experiment)  # another run was faster
            if found is None:
                raise
            return found.experiment_id

    def _search(self, experiment_ids: list[str], order: str = "ASC", **tags: str) -> Any:
        """The first run that carries all the tags, or null."""
        terms = " and ".join(f"tags.`{TAG}{key}` = '{value}'" for key, value in tags.items() if "'" not in value)
        found = self.client.search_runs(
            experiment_ids, filter_string=terms, max_results=1, order_by=[f"attributes.start_time {order}"]
        )
        return found[0] if found else None

    def _find_own(self, experiment_id: str) -> Any:
        """The MLflow run of this run if it was started before, or the stand-in of this lock."""
        own = {key: self.tags[TAG + key] for key in ("resume_id", "out") if self.tags.get(TAG + key)}
        run = self._search([experiment_id], "DESC", **own) if "resume_id" in own else None
        if run is None and self.tags.get(TAG + "kind") == "lock" and self.tags.get(TAG + "lock_id"):
            stand_in = {"lock_id": self.tags[TAG + "lock_id"], "kind": "lock", "stand_in": "true"}
            run = self._search([experiment_id], **stand_in)
            if run is not None:
                self.client.delete_tag(run.info.run_id, TAG + "stand_in")
        return run

    def _parent(self, experiment_id: str) -> str:
        """Id of the run of this attack's lock: here, else in another experiment, else a stand-in made now."""
        assert self.parent_lock_id
        wanted = {"lock_id": self.parent_lock_id, "kind": "lock"}
        run = self._search([experiment_id], **wanted)
        if run is None:
            others = [e.experiment_id for e in self.client.search_experiments()]
            run = self._search(others, **wanted) if others else None
        if run is None:
            tags = {TAG + key: value for key, value in wanted.items()} | {TAG + "stand_in": "true"}
            name = f"lock-{self.parent_lock_id[:8]}"
            run = self.client.create_run(experiment_id, tags=tags, run_name=name)
            self.client.set_terminated(run.info.run_id, "FINISHED")
        return run.info.run_id
