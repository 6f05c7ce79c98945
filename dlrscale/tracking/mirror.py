"""The calls to MLflow that mirror one run: its experiment, parent, parameters, points and end."""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
import re
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dlrscale import record as records
from dlrscale.tracking.store import make_ready, sqlite_path

TAG = "dlrscale."
PARENT = "mlflow.parentRunId"
VALUE_LENGTH, TAG_LENGTH, KEY_LENGTH, PARAMS_PER_CALL, METRICS_PER_CALL = 6000, 5000, 250, 100, 1000
CUT_MARK = " ...[cut; whole in config.json]"


def legal(name: str) -> str:
    """A metric or parameter name as MLflow takes it on every system; one that had to change gets a mark of its own.

    Other characters become `_`, and six digits of the name's hash keep `a@b` and `a=b` apart.
    """
    name = str(name)
    clean = re.sub(r"[^0-9A-Za-z_\-. /]", "_", name)
    clean = posixpath.normpath(clean).lstrip("/") if clean else "_"
    if clean.startswith(".."):
        clean = "_" + clean[2:]
    clean = clean if clean not in ("", ".") else "_"
    if clean == name and len(name) <= KEY_LENGTH:
        return name
    return f"{clean[: KEY_LENGTH - 7]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


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


def place_tag(folder: Any) -> str:
    """A run's folder as a short text that can be searched for."""
    return hashlib.sha256(os.path.realpath(str(folder)).encode()).hexdigest()[:16]


def status_of(record: Mapping[str, Any]) -> str:
    """MLflow's status for a record: memory that ran out and divergence are results too."""
    return "FAILED" if record.get("outcome") in (None, records.Outcome.FAILED.value) else "FINISHED"


def seal(contents: Mapping[str, str], files: list[Path]) -> str:
    """The digest of all that is attached to a run; set last of all, it says that MLflow has everything."""
    digest = hashlib.sha256()
    for name, text in sorted(contents.items()):
        digest.update(f"{name}\n{text}\n".encode())
    for path in sorted(files):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Deleted(Exception):
    """The run was deleted in MLflow by hand."""


class Mirror:
    """The calls to MLflow for one run; used by one thread. Every method may raise and may be called again.

    A call is made only for what MLflow has not yet; `added` counts what was written.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        config: dict[str, Any],
        tags: Mapping[str, Any],
        parent_lock_id: str | None = None,
        *,
        system_metrics: bool = False,
        status: str | None = None,
        span_ms: tuple[int, int] | None = None,
    ):
        """Prepare to mirror a run; nothing is called yet.

        Args:
            uri: URI of the store.
            experiment: Name of the MLflow experiment.
            run_name: Name of the run in MLflow.
            config: Settings of the run, nested or flat.
            tags: Tags, with or without the `dlrscale.` before them; null values are left out.
            parent_lock_id: `lock_id` of the lock that an attack belongs to.
            system_metrics: Whether to log use of CPU, memory, network and GPU.
            status: MLflow's status of a run that has ended and is mirrored from its folder: it gets this status at
                once, and is left alone where it was deleted in MLflow. Null for the run of this process.
            span_ms: Start and end of a run that has ended, in ms.
        """
        self.uri, self.experiment, self.run_name, self.config = uri, experiment, run_name, config
        self.parent_lock_id, self.system_metrics, self.status = parent_lock_id, system_metrics, status
        self.started_ms, self.ended_ms = span_ms or (None, None)
        self.tags = {k if "." in k else TAG + k: str(v)[:TAG_LENGTH] for k, v in tags.items() if v is not None}
        if config.get("out"):
            self.tags[TAG + "out"] = place_tag(config["out"])
        if self.tags.get(TAG + "kind") == "lock":
            self.tags.setdefault(TAG + "lock_id", self.tags.get(TAG + "id", ""))
        elif parent_lock_id:
            self.tags.setdefault(TAG + "lock_id", parent_lock_id)
        self.client: Any = None
        self.run: Any = None
        self.monitor: Any = None
        self.is_started = self.resumed = False
        self.whole = True  # whether every row came by
        self.last_step = 0
        self.known: dict[str, set[int]] = {}  # metric -> steps that a resumed run had before
        self.added: Counter[str] = Counter()

    def start(self) -> None:
        """Find the run in MLflow or make it, and write what it is.

        Raises:
            Deleted: If the run has ended, and was deleted in MLflow.
        """
        from mlflow import MlflowClient

        if self.client is None:
            make_ready(self.uri)
            self.client = MlflowClient(self.uri)
        experiment_id = self._experiment_id()
        run = self._find_own(experiment_id)
        tags = dict(self.tags)
        is_trial = bool(tags.get(TAG + "search"))
        is_child = (self.parent_lock_id or is_trial) and tags.get(TAG + "kind") != "lock"
        if is_child and not (run and run.data.tags.get(PARENT)):
            tags[PARENT] = self._search_parent(experiment_id) if is_trial else self._parent(experiment_id)
        if run is None:
            with suppress(Exception):
                import getpass

                tags.setdefault("mlflow.user", getpass.getuser())
            run = self.client.create_run(experiment_id, self.started_ms, tags=tags, run_name=self.run_name)
            self.added["runs"] += 1
            if self.status:  # nothing that has ended may look as if it went on, whatever happens next
                self.client.set_terminated(run.info.run_id, self.status, end_time=self.ended_ms)
                run = self.client.get_run(run.info.run_id)
        else:
            self.resumed = True
            if not self.status:
                self.client.update_run(run.info.run_id, status="RUNNING", name=self.run_name)
        self.run = run
        self._put_tags(tags)
        self._put_params(self.config)
        if not self.status:
            self.client.log_text(self.run_id, records.dumps(self.config, indent=1), "config.json")
            if self.system_metrics:
                self._watch()
        self.is_started = True

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self.run.info.run_id

    def send(self, rows: deque) -> None:
        """Send all rows (values, step, time in ms), taking those sent out of the deque."""
        from mlflow.entities import Metric

        while rows:
            batch, points = 0, []
            for values, step, stamp in list(rows):
                found = numbers({k: v for k, v in values.items() if k != "step"})
                if points and len(points) + len(found) > METRICS_PER_CALL:
                    break
                batch += 1
                points += [Metric(k, v, stamp, step) for k, v in found.items() if step not in self._known(k)]
                self.last_step = max(self.last_step, step)
            self._put_points(points)
            for _ in range(batch):
                rows.popleft()

    def is_sealed(self, record: Mapping[str, Any], files: list[Path]) -> bool:
        """Whether all of a run that has ended reached MLflow before."""
        sealed = self.run.data.tags.get(TAG + "seal")
        return self.run.info.status == self.status and sealed == seal(self._contents(record), files)

    def end(self, record: Mapping[str, Any], files: list[Path], warn: Any) -> None:
        """Send the record and the files, and set the run's status.

        Args:
            record: The record, or what is known of a run that left none.
            files: Files and folders to attach.
            warn: Called with the error when something could not be attached; the run ends all the same.
        """
        from mlflow.entities import Metric

        if self.monitor is not None:
            self.monitor.finish()
            self.monitor = None
        self._put_params(dict(record.get("config") or {}) | self.config)
        step = max([self.last_step, *(step for steps in self.known.values() for step in steps)])
        self.run = self.client.get_run(self.run_id)
        stamp = time.time_ns() // 1_000_000
        found = numbers(record.get("metrics") or {})
        latest = self.run.data.metrics
        self._put_points([Metric(key, value, stamp, step) for key, value in found.items() if latest.get(key) != value])
        self._put_tags(
            {TAG + "outcome": record.get("outcome") or records.Outcome.FAILED.value, TAG + "error": record.get("error")}
        )
        contents = self._contents(record)
        try:
            self._attach(contents, files)
        except Exception as error:  # the numbers are there: the run still gets its status
            self.whole = False
            warn(error)
        status = self.status or status_of(record)
        if self.run.info.status != status:
            self.client.set_terminated(self.run_id, status, end_time=self.ended_ms)
            self.added["status"] += 1
        if self.whole:
            self._put_tags({TAG + "seal": seal(contents, files)})

    def calm(self) -> None:
        """After a failure: let no other thread go on writing to a store that does not answer."""
        if self.monitor is not None:
            self.monitor._shutdown_event.set()
            self.monitor = None

    def _contents(self, record: Mapping[str, Any]) -> dict[str, str]:
        """The texts to attach, by name; a run without a record has its settings alone."""
        settings = dict(record.get("config") or {}) | self.config
        found = {"config.json": records.dumps(settings, indent=1)}
        if record.get("deepspeed_config"):
            found["deepspeed_config.json"] = records.dumps(record["deepspeed_config"], indent=1)
        if record.get("outcome"):
            found["record.json"] = records.dumps(record, indent=1)
        return found

    def _attach(self, contents: Mapping[str, str], files: list[Path]) -> None:
        if self.run.data.tags.get(TAG + "seal") == seal(contents, files):
            return
        for name, text in contents.items():
            self.client.log_text(self.run_id, text, name)
        for path in files:
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), path.name)
            elif path.is_file():
                self.client.log_artifact(self.run_id, str(path))
        self.added["files"] += len(contents) + len(files)

    def _known(self, name: str) -> set[int]:
        """Steps of a metric that a resumed run holds already: steps done twice are not drawn twice."""
        if not self.resumed:
            return set()
        if name not in self.known:
            history = self.client.get_metric_history(self.run_id, name)
            self.known[name] = {point.step for point in history}
        return self.known[name]

    def _put_points(self, points: list[Any]) -> None:
        for first in range(0, len(points), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=points[first : first + METRICS_PER_CALL])
        self.added["points"] += len(points)

    def _put_tags(self, tags: Mapping[str, Any]) -> None:
        """Set the tags that are not so yet; null takes one away."""
        from mlflow.entities import RunTag

        there = self.run.data.tags
        wanted = {key: str(value)[:TAG_LENGTH] for key, value in tags.items() if value is not None}
        new = [RunTag(key, value) for key, value in wanted.items() if there.get(key) != value]
        for first in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, tags=new[first : first + PARAMS_PER_CALL])
        for key in (tags.keys() - wanted.keys()) & there.keys():
            self.client.delete_tag(self.run_id, key)
            del there[key]
        there.update({tag.key: tag.value for tag in new})
        self.added["tags"] += len(new)

    def _put_params(self, config: Mapping[str, Any]) -> None:
        """Write the parameters; those of a resumed run stay, and what has changed is told by a tag."""
        from mlflow.entities import Param

        before, flat = self.run.data.params, flatten(config)
        new = [Param(key, value) for key, value in flat.items() if key not in before]
        for first in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=new[first : first + PARAMS_PER_CALL])
        self.added["parameters"] += len(new)
        changed = {k: v for k, v in flat.items() if before.get(k, v) != v}
        before.update({param.key: param.value for param in new})
        self._put_tags({legal(f"{TAG}resumed_with.{key}"): value for key, value in changed.items()})

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
                if self.status:
                    raise Deleted
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

    def _search(self, experiment_ids: list[str], order: str = "ASC", view: Any = None, **tags: str) -> Any:
        """The first run that carries all the tags, or null."""
        from mlflow.entities import ViewType

        terms = " and ".join(f"tags.`{TAG}{key}` = '{value}'" for key, value in tags.items() if "'" not in value)
        found = self.client.search_runs(
            experiment_ids,
            filter_string=terms,
            run_view_type=view or ViewType.ACTIVE_ONLY,
            max_results=1,
            order_by=[f"attributes.start_time {order}"],
        )
        return found[0] if found else None

    def _search_own(self, experiment_id: str, view: Any = None) -> Any:
        own = {key: self.tags[TAG + key] for key in ("resume_id", "out") if self.tags.get(TAG + key)}
        return self._search([experiment_id], "DESC", view, **own) if "resume_id" in own else None

    def _find_own(self, experiment_id: str) -> Any:
        """The MLflow run of this run if it was started before, or the stand-in of this lock."""
        from mlflow.entities import ViewType

        run = self._search_own(experiment_id)
        if run is None and self.status and self._search_own(experiment_id, ViewType.DELETED_ONLY):
            raise Deleted
        if run is None and self.tags.get(TAG + "kind") == "lock" and self.tags.get(TAG + "lock_id"):
            stand_in = {"lock_id": self.tags[TAG + "lock_id"], "kind": "lock", "stand_in": "true"}
            run = self._search([experiment_id], **stand_in)
            if run is not None:
                self.client.update_run(run.info.run_id, name=self.run_name)
                self.client.delete_tag(run.info.run_id, TAG + "stand_in")
        return run

    def _search_parent(self, experiment_id: str) -> str:
        """Id of the run that stands for this trial's search on this side; made by the first trial, below the lock."""
        own = {key: self.tags[TAG + key] for key in ("search", "side", "lock_id") if self.tags.get(TAG + key)}
        wanted = own | {"kind": "search"}
        run = self._search([experiment_id], **wanted)
        if run is None:
            tags = {TAG + key: value for key, value in wanted.items()}
            if self.parent_lock_id:
                tags[PARENT] = self._parent(experiment_id)
            name = f"search-{own['search'][:8]}-{own.get('side', 'base')}"
            run = self.client.create_run(experiment_id, tags=tags, run_name=name)
            self.client.set_terminated(run.info.run_id, "FINISHED")
        return run.info.run_id

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
