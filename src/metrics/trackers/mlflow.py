"""MLflow: one run for a run folder for ever, at a tracking server or in a database beside the run folders."""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from src.config.base import Config, Line
from src.config.tree import leaves_of
from src.metrics.trackers.addresses import note_address
from src.runs.records import jobs
from src.storage.atomic_write import atomic_write

logger = logging.getLogger(__name__)

ID_FILE = "mlflow_id.txt"
EXPERIMENT = "pretraining"
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
# What a server takes with one request: mlflow/utils/validation.py.
MOST_METRICS, MOST_PARAMS, LONGEST_VALUE = 1000, 100, 6000
Item = TypeVar("Item")


class MLflow(Config):
    uri: Line | None
    """Server or database; null: MLFLOW_TRACKING_URI, else mlflow.db beside the run folder."""
    experiment: Line | None
    """Experiment of the run; null: MLFLOW_EXPERIMENT_NAME, else pretraining."""
    group: Line | None
    """Tag `group` of the run; null: the name of its sweep."""

    @field_validator("uri")
    @classmethod
    def _is_an_address(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        parts = urlsplit(uri)
        if parts.scheme.partition("+")[0] not in SCHEMES:
            raise ValueError(
                f"{uri!r} is no address of MLflow; write http://<host>:5000 or sqlite:////<folder>/mlflow.db"
            )
        if parts.scheme.startswith("http") and "@" in parts.netloc:  # config.yaml is read by everybody
            raise ValueError("a name or password is in the address; set MLFLOW_TRACKING_USERNAME and _PASSWORD instead")
        if parts.scheme == "sqlite" and not parts.path.startswith("//"):
            raise ValueError(
                f"{uri!r} depends on where a rank starts; write a whole path, sqlite:////<folder>/mlflow.db"
            )
        return uri

    @model_validator(mode="after")
    def _is_installed(self) -> "MLflow":
        if find_spec("mlflow") is None:
            raise ValueError("the package mlflow is not installed; pip install mlflow-skinny, or choose tracker=jsonl")
        return self

    def sink(self, folder: Path, facts: Mapping[str, Any]) -> "MLflowSink":
        return MLflowSink(self, folder, facts)


class MLflowSink:
    """Parameters are those that the run began with, since MLflow changes none; what a later attempt has otherwise is a
    tag of the same name. A replayed step is recorded again, under its attempt.
    """

    name = "mlflow"

    def __init__(self, options: MLflow, folder: Path, facts: Mapping[str, Any]) -> None:
        self._options = options
        self._folder = folder
        self._facts = {name: _text(value) for name, value in leaves_of(facts).items()}
        self._client: Any = None
        self._id = ""

    def open(self) -> None:
        from mlflow import MlflowClient

        uri = self._uri()
        self._client = MlflowClient(tracking_uri=uri)
        run = self._resumed() or self._begun(uri)
        self._id = run.info.run_id
        self._log_facts(run.data.params)
        if uri.startswith("http"):
            page = f"{uri.rstrip('/')}/#/experiments/{run.info.experiment_id}/runs/{self._id}"
            note_address(self._folder, self.name, page)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(_name(name), value, now, step) for name, value in values.items()]
        for part in _parts(points, MOST_METRICS):
            self._client.log_batch(self._id, metrics=part, synchronous=True)

    def image(self, step: int, name: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as picture:
            self._client.log_image(self._id, picture, key=name, step=step, synchronous=True)

    def finish(self, succeeded: bool, /) -> None:
        self._client.set_terminated(self._id, "FINISHED" if succeeded else "FAILED")

    def _uri(self) -> str:
        from mlflow.tracking import get_tracking_uri, is_tracking_uri_set

        if self._options.uri is not None:
            return self._options.uri
        return get_tracking_uri() if is_tracking_uri_set() else f"sqlite:///{self._folder.parent.resolve()}/mlflow.db"

    def _resumed(self) -> Any:
        """The folder's run; None where there is none, or where this server does not know it any more."""
        from mlflow.exceptions import MlflowException

        path = self._folder / ID_FILE
        if not path.exists():
            return None
        try:
            run = self._client.get_run(path.read_text().strip())
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("mlflow: run %s is not there: a new one is begun", path.read_text().strip())
            return None
        if run.info.lifecycle_stage == "deleted":
            logger.warning("mlflow: run %s was deleted: a new one is begun", run.info.run_id)
            return None
        self._client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _begun(self, uri: str) -> Any:
        run = self._client.create_run(self._experiment(uri), run_name=self._folder.name)
        atomic_write(self._folder / ID_FILE, run.info.run_id)
        return run

    def _experiment(self, uri: str) -> str:
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME
        from mlflow.exceptions import MlflowException

        name = self._options.experiment or MLFLOW_EXPERIMENT_NAME.get() or EXPERIMENT
        # A server knows where its pictures go; without one it would be mlruns/ wherever a rank was started.
        pictures = None if uri.startswith("http") else (self._folder.parent.resolve() / "mlartifacts").as_uri()
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=pictures))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run has just made it
                    raise
                found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def _log_facts(self, known: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        new = [Param(name, value) for name, value in self._facts.items() if name not in known]
        tags = {name: value for name, value in self._facts.items() if known.get(name, value) != value}
        tags |= {"run_folder": str(self._folder.resolve()), "jobs": ", ".join(map(str, jobs(self._folder)))}
        if self._options.group is not None:
            tags["group"] = self._options.group
        for params in _parts(new, MOST_PARAMS):
            self._client.log_batch(self._id, params=params, synchronous=True)
        for part in _parts([RunTag(name, value) for name, value in tags.items()], MOST_PARAMS):
            self._client.log_batch(self._id, tags=part, synchronous=True)


def _name(name: str) -> str:
    """With those letters alone that MLflow takes in a metric's name."""
    return re.sub(r"[^\w./: -]", "_", name)


def _text(value: Any) -> str:
    """null and true as in YAML."""
    return ("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))[:LONGEST_VALUE]


def _parts(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), most):
        yield items[first : first + most]
