"""MLflow: one run per logical run, made and ended by the driver, through retries and restarts.

Workers know nothing of MLflow. Rank 0 appends metrics to the run folder; the driver follows those files and logs what a
checkpoint has committed (or the end of the run has made final), so steps that are redone after a crash appear once, as
redone. Since the files are the record and MLflow a copy, a lost tracking server delays the copy and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diptych.config import ConfigError, RunConfig, dotted_keys
from diptych.pipelines.environment import changed, code_digest, commit, environment
from diptych.redaction import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

TAG_RUN_DIR = "diptych.run_dir"
TAG_TASK = "diptych.task"
TAG_DRIVER = "diptych.driver"
TAG_DIGEST = "diptych.data_digest"
TAG_MARK = "diptych.run_mark"
_BATCH = 900
"""Metrics per request; the server's limit is 1,000."""


def tracking_uri(configured: str = "") -> str:
    """The configured store, `MLFLOW_TRACKING_URI`, or SQLite in the working folder; `file:` stores are refused."""
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    if uri.startswith("file:") or "://" not in uri:
        raise ConfigError("tracking.uri", uri, "sqlite:///PATH or a server's URL", "MLflow 3 refuses file stores; use sqlite:///mlflow.db")
    return uri


def client(uri: str) -> MlflowClient:
    """A client that gives up on a lost server quickly: the caller tries again later."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # The migrations of a new SQLite store are logged line by line; they are no news to the user.
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.client"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def explain(error: Exception, uri: str) -> str:
    """The error's text without the credentials of `uri`, which MLflow's own messages repeat."""
    user = urlsplit(uri).netloc.rpartition("@")[0]
    return str(error).replace(f"{user}@", "") if user else str(error)


def driver_identity() -> str:
    """host:pid:start time of this process; a recycled pid has another start time."""
    import psutil

    return f"{socket.gethostname()}:{os.getpid()}:{int(psutil.Process().create_time())}"


def driver_is_gone(identity: str) -> bool:
    """Whether the process behind `identity` ran on this host and is dead."""
    import psutil

    host, _, rest = identity.rpartition(":")[0].rpartition(":")[0], None, identity.rsplit(":", 2)[1:]
    if host != socket.gethostname() or len(rest) != 2:
        return False
    try:
        process = psutil.Process(int(rest[0]))
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - int(rest[1])) > 2
    except (psutil.NoSuchProcess, ValueError):
        return True


def get_experiment(store: MlflowClient, name: str, uri: str) -> str:
    """Id of the experiment `name`, made if missing; beside a SQLite store its artifacts stand in `mlartifacts`."""
    found = store.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent.resolve() / "mlartifacts" / name).as_uri()
    return str(store.create_experiment(name, artifact_location=location))


class Tracker:
    """The MLflow run of one logical run. Use as a context manager around the training."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        run_id: str | None,
        facts: dict[str, Any],
        parent: str | None = None,
        mark: str = "",
    ) -> None:
        """Make the run, or reopen `run_id`. `facts` holds `digest`, `samples` and what else describes the data.

        `mark` is the run's own, by which a run is found whose driver was killed before it could note the id.
        """
        self.uri = tracking_uri(config.tracking.uri)
        self.store = client(self.uri)
        self.run_dir = run_dir
        self._logged: set[int] = set()
        self._waiting: list[Callable[[], None]] = []
        self._committed = (0, 0)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._monitor: Any = None
        self._system_metrics = config.tracking.system_metrics
        tags = {TAG_DRIVER: driver_identity(), TAG_RUN_DIR: str(run_dir)}
        if run_id:
            self.run_id = run_id
            self._later(lambda: self._reopen(tags))
            return
        try:
            experiment = get_experiment(self.store, config.tracking.experiment or f"diptych-{config.task.name}", self.uri)
            tags |= {
                TAG_MARK: mark,
                TAG_TASK: config.task.name,
                TAG_DIGEST: facts["digest"],
                "mlflow.source.name": f"diptych train {config.task.name}",
            }
            tags |= {"mlflow.parentRunId": parent} if parent else {}
            tags |= _code_tags()
            begun = self.store.search_runs([experiment], filter_string=f"tags.`{TAG_MARK}` = '{mark}'") if mark else []
            run = begun[0] if begun else self.store.create_run(experiment, tags=tags, run_name=run_dir.name)
            self.run_id = run.info.run_id
            if begun:
                self._reopen(tags)
            self._log_parameters(config)
            self._log_input(config, facts)
            self.store.log_text(self.run_id, config.to_json(public=True), "config.json")
        except Exception as error:
            where, why = without_credentials(self.uri), explain(error, self.uri)
            remedy = "Start the server, or train without it: tracking.enabled=false."
            raise ConfigError("tracking.uri", where, f"a store that answers when a run begins ({why})", remedy) from None

    def _reopen(self, tags: dict[str, str]) -> None:
        self.store.update_run(self.run_id, status="RUNNING")
        for key, value in tags.items():
            self.store.set_tag(self.run_id, key, value)

    def _later(self, action: Callable[[], None]) -> None:
        """Do it now, or once the server answers again."""
        self._waiting.append(action)
        try:
            self._catch_up()
        except Exception as error:
            logger.warning("MLflow does not answer (%s); the run is logged later", explain(error, self.uri))

    def _catch_up(self) -> None:
        while self._waiting:
            self._waiting[0]()
            self._waiting.pop(0)

    def log_environment(self, cluster: dict[str, Any]) -> None:
        """Keep packages, code version, machine and the cluster's resources as `environment/<start>.json`, one per start of the driver."""
        facts = environment() | {"cluster": cluster, "started": time.time()}
        name = f"environment/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        self._later(lambda: self.store.log_dict(self.run_id, facts, name))

    def _log_parameters(self, config: RunConfig) -> None:
        from mlflow.entities import Param

        # What lies in the run's own folder has one name in every run, so that a comparison shows only what was chosen differently.
        own = f"{self.run_dir}/"
        values = {key: without_credentials(str(value).replace(own, "")) for key, value in dotted_keys(config).items()}
        parameters = [Param(key, value[:6000]) for key, value in values.items()]
        for start in range(0, len(parameters), 100):
            self.store.log_batch(self.run_id, params=parameters[start : start + 100])

    def _log_input(self, config: RunConfig, facts: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=Path(urlsplit(config.data.shards).path).name or "shards",
            digest=facts["digest"][:36],  # MLflow's limit; the whole digest is in the profile
            source_type="webdataset",
            source=without_credentials(config.data.shards),
            profile=json.dumps(facts, default=str),
        )
        self.store.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def __enter__(self) -> Tracker:
        self._thread = threading.Thread(target=self._follow, name="mlflow-follow", daemon=True)
        self._thread.start()
        if self._system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.ERROR)
            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            self._monitor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._monitor:
            self._monitor.finish()
        if self._thread:
            self._thread.join()

    def _follow(self) -> None:
        from diptych.pipelines.runs_folder import records

        # Looking at an object store costs money.
        pause = 15.0 if "://" in records(self.run_dir) else 2.0
        while not self._stop.wait(pause):
            try:
                self.sync()
            except Exception as error:  # A lost server must not stop training; the files keep what is missing.
                logger.warning("MLflow does not answer (%s); metrics are kept in the run folder and sent later", explain(error, self.uri))
                self._stop.wait(5.0)

    def sync(self, final: bool = False) -> None:
        """Log every line that a checkpoint has committed and MLflow does not have yet; with `final`, the rest too."""
        self._catch_up()
        committed = _committed(self.run_dir)
        if committed == self._committed and not final:
            return
        limit = float("inf") if final else committed[0]
        self._logged |= _send_metrics(self.store, self.run_id, self.run_dir, limit, self._logged)
        self._committed = committed

    def log_artifacts(self, folder: Path, target: str) -> None:
        """Copy the files of `folder` to the run's artifacts under `target`, if there are any."""
        if folder.is_dir() and any(folder.iterdir()):
            self.store.log_artifacts(self.run_id, str(folder), target)

    def end(self, status: str, patience_seconds: float = 120.0) -> None:
        """Catch up and end the run as FINISHED, FAILED or KILLED, waiting a while for a server that is away."""
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                self.sync(final=status == "FINISHED")
                self.store.set_terminated(self.run_id, status)
                return
            except Exception as error:
                if time.monotonic() > deadline:
                    logger.warning(
                        "MLflow is still away (%s); `diptych runs` sends the rest of %s later", explain(error, self.uri), self.run_dir
                    )
                    return
                time.sleep(3.0)


def _code_tags() -> dict[str, str]:
    tags = {"diptych.code_digest": code_digest()}
    if found := commit():
        tags |= {"mlflow.source.git.commit": found, "diptych.code_changed": str(changed()).lower()}
    return tags


def mlflow_status(status: str) -> str:
    """MLflow's word for the status of a run folder; a run that a dead driver left `running` was killed."""
    words = {"finished": "FINISHED", "early_stopped": "FINISHED", "pruned": "FINISHED", "paused": "SCHEDULED"}
    return (words | dict.fromkeys(("stopped", "killed", "running"), "KILLED")).get(status, "FAILED")


def _committed(run_dir: Path) -> tuple[int, int]:
    """(step, attempt) of the newest checkpoint; (0, 0) before the first."""
    from diptych.pipelines.runs_folder import records
    from diptych.trainers.attempts import candidates, parse_checkpoint_name
    from diptych.trainers.runfolder import RunFolder

    return next((found for name in candidates(RunFolder(records(run_dir))) if (found := parse_checkpoint_name(name))), (0, 0))


def _send_metrics(store: MlflowClient, run_id: str, run_dir: Path, limit: float, logged: set[int]) -> set[int]:
    """Log the lines up to step `limit` whose steps are not in `logged`; returns their steps.

    A line that is sent twice does no harm: MLflow keeps one of equal (key, step, time, value).
    """
    from diptych.pipelines.runs_folder import records
    from diptych.trainers.journal import read_metrics

    new = [line for line in read_metrics(records(run_dir)) if line["step"] <= limit and line["step"] not in logged]
    for batch in _batches(_metrics(new)):
        store.log_batch(run_id, metrics=batch)
    return {line["step"] for line in new}


def _metrics(lines: Iterable[dict[str, Any]]) -> Iterator[Any]:
    from mlflow.entities import Metric

    for line in lines:
        for key, value in line["metrics"].items():
            if isinstance(value, int | float):
                yield Metric(key, float(value), int(line["time"] * 1000), int(line["step"]))


def _batches(items: Iterable[Any]) -> Iterator[Sequence[Any]]:
    pending: list[Any] = []
    for item in items:
        pending.append(item)
        if len(pending) == _BATCH:
            yield pending
            pending = []
    if pending:
        yield pending


def reconcile(uri: str) -> list[str]:
    """End every run of ours that MLflow calls RUNNING, or SCHEDULED between the generations of a sweep, though its driver on this host is
    dead, with the status that its folder has.

    Its metrics are caught up from the run folder first, where that still exists. Returns the ids of the runs ended.
    """
    from diptych.pipelines.runs_folder import read_driver

    store = client(uri)
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    ended = []
    open_runs = [
        run
        for status in ("RUNNING", "SCHEDULED")
        for run in (store.search_runs(experiments, filter_string=f"attributes.status = '{status}'") if experiments else [])
    ]
    for run in open_runs:
        run_id, driver = run.info.run_id, run.data.tags.get(TAG_DRIVER, "")
        if not driver or not driver_is_gone(driver):
            continue
        run_dir, status = Path(run.data.tags.get(TAG_RUN_DIR, "")), "KILLED"
        recorded = read_driver(run_dir) if run_dir.is_absolute() else {}
        if recorded.get("run_id") == run_id:
            status = mlflow_status(recorded["status"]).replace("SCHEDULED", "KILLED")
            _send_metrics(store, run_id, run_dir, float("inf") if status == "FINISHED" else _committed(run_dir)[0], set())
        store.set_terminated(run_id, status)
        ended.append(run_id)
    return ended
