"""One run's frozen sections, with their types: what every room above the config receives instead of a dict."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_type_hints, runtime_checkable

from src.checkpoint.config import Checkpoint
from src.data.config import Data
from src.data.corpus import Corpus
from src.data.tokenizer import TokenizerConfig
from src.distributed.compile import Compile
from src.distributed.parallel_dims import ParallelDims
from src.distributed.precision.config import Precision
from src.distributed.recompute import Recompute
from src.errors import ConfigError
from src.evaluation.config import Evaluation
from src.fault_tolerance.config import FaultTolerance
from src.metrics.alerts.config import Alerts
from src.metrics.trackers.config import Tracker
from src.models.base import ModelConfig
from src.models.parametrization.config import Parametrization
from src.optim.base import Optimizer
from src.optim.schedule import Schedule, StagedSchedule, in_stages
from src.runs.cluster import Cluster


@runtime_checkable
class Task(Protocol):
    """Interface of the section `task`: what the ranks do. The classes are in src/tasks."""

    @property
    def steps(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def micro_batch(self) -> int | None: ...
    @property
    def needs_corpus(self) -> bool: ...

    def run(self, run: "Run", folder: Path) -> bool:
        """A rank's whole life: false when it stopped early, after saving, because a signal asked; raises on failure."""


@runtime_checkable
class Validates(Protocol):
    """A task that looks at held-out data."""

    @property
    def validate_every(self) -> int: ...
    @property
    def validate_samples(self) -> int: ...


@runtime_checkable
class Compares(Protocol):
    """A task that also trains the whole model on one device."""

    @property
    def trains_on_one_device(self) -> bool: ...


@runtime_checkable
class Rehearses(Protocol):
    """A task whose layout can be built on one machine, one rank at a time; see src/launch/rehearse.py."""

    @property
    def rehearse(self) -> bool: ...
    @property
    def rehearse_ranks(self) -> tuple[int, ...] | None: ...


@runtime_checkable
class Staged(Protocol):
    """A task that may go through stages."""

    @property
    def schedule_begins(self) -> tuple[bool, ...]:
        """Of each stage, whether its schedule begins with it; empty without stages."""


@runtime_checkable
class Averages(Protocol):
    """A task that keeps a moving average of the weights."""

    @property
    def ema_decay(self) -> float | None: ...
    @property
    def ema_dtype(self) -> Literal["float32", "bfloat16"]: ...
    @property
    def ema_offload(self) -> bool: ...


@runtime_checkable
class Merges(Protocol):
    """A task that holds a mean of weights beside those that it reads."""

    @property
    def average_bytes(self) -> int: ...


@runtime_checkable
class ClipsLogits(Protocol):
    """A task that bounds attention logits."""

    @property
    def qk_clip(self) -> float | None: ...


@runtime_checkable
class WatchesSpikes(Protocol):
    """A task that looks for steps that stand out."""

    @property
    def spike_score(self) -> float | None: ...
    @property
    def spike_window(self) -> int: ...
    @property
    def on_spike(self) -> Literal["note", "skip_batch", "rewind"]: ...


@runtime_checkable
class MeasuresLayers(Protocol):
    """A task that looks at each layer before and after an update."""

    @property
    def layer_norms(self) -> bool: ...


@runtime_checkable
class Penalises(Protocol):
    """A task whose gradients have more in them than the cross entropy."""

    @property
    def z_loss(self) -> float: ...
    @property
    def router_z_loss(self) -> float: ...


@runtime_checkable
class Infers(Protocol):
    """A task that only goes forward: nothing has a gradient or a moment, and a batch need not fill the layout."""

    @property
    def forward_only(self) -> bool: ...

    def computed(self, run: "Run") -> "Run":
        """The run as its ranks build it: in the dtypes and with the options that this task needs of the sections."""


@runtime_checkable
class Remembers(Protocol):
    """A task that goes on from texts, and keeps the keys and values of what it has read."""

    def remembered(self, run: "Run") -> tuple[int, int]:
        """Texts at once on a data rank, and the columns of each: what src/models/cache.py makes room for."""


@runtime_checkable
class WithoutModel(Protocol):
    """A task that builds no model, so that no machine is too small for one."""

    @property
    def without_model(self) -> bool: ...


@runtime_checkable
class Evaluates(Protocol):
    """A task that reads data and trains nothing on them."""

    def corpus_problems(self, corpus: Corpus) -> list[str]: ...


@runtime_checkable
class Checks(Protocol):
    """A task with inputs of its own, which it looks at on the launcher."""

    def problems(self, run: "Run") -> list[str]: ...


@dataclass(frozen=True)
class Run:
    """The whole question that a command line asks; nothing below launch.py sees more of it."""

    task: Task
    model: ModelConfig
    parallel: ParallelDims
    precision: Precision
    recompute: Recompute
    compile: Compile
    data: Data
    tokenizer: TokenizerConfig
    optim: Optimizer
    parametrization: Parametrization
    schedule: Schedule
    checkpoint: Checkpoint
    tracker: Tracker
    alert: Alerts
    evaluate: Evaluation
    fault_tolerance: FaultTolerance
    cluster: Cluster
    name: str
    seed: int
    root: Path
    folder: Path | None
    dry_run: bool | Literal["json", "script"]
    stages: tuple["Run", ...] = ()  # each a run of its own, of the steps of the stage; the first is as this one begins

    @classmethod
    def from_sections(cls, sections: Mapping[str, Any]) -> Self:
        """A run of the objects that `src.config.build.build` returns. ConfigError for a class of another group."""
        stages = tuple(cls.from_sections(each) for each in sections.get("stages", ()))
        kinds = {name: kind for name, kind in get_type_hints(cls).items() if name != "stages"}
        problems = [
            f"{name}: _target_ is a {type(sections[name]).__name__}, which is no {kinds[name].__name__}"
            for name in kinds
            if name not in TOP and not isinstance(sections[name], kinds[name])
        ]
        if problems:
            raise ConfigError(problems)
        found = cls(**{name: sections[name] for name in kinds}, stages=stages)
        return replace(found, checkpoint=found.checkpoint.here(found.cache), data=found.data.here(found.cache))

    def on_one_device(self) -> Self:
        """The same run without a layout, and without anything that is there for speed or memory."""
        whole = dict.fromkeys((*self.parallel.axes, "expert", "expert_tensor"), 1)
        plain = {"stages": None, "layers_per_stage": None, "async_tensor": False, "cpu_offload": False}
        return replace(
            self,
            parallel=self.parallel.model_copy(update=whole | plain),
            recompute=self.recompute.model_copy(update={"mode": "none", "every": None, "budget": None}),
            compile=self.compile.model_copy(update={"blocks": False, "loss": False, "graph": False}),
        )

    def resting_in_compute_dtype(self) -> Self:
        """This run with its weights held once, in the compute dtype: nothing updates them, and passes read no other.

        float8 products round from the storage dtype, which stays with them.
        """
        precision = self.precision
        if precision.float8 is not None:
            return self
        return replace(self, precision=precision.model_copy(update={"storage": precision.compute}))

    def holding_weights(self) -> Self:
        """This run with parallel.reshard=never where every rank holds all of its matrices: they stay gathered."""
        if self.parallel.fsdp > 1 or self.parallel.reshard != "default":
            return self
        return replace(self, parallel=self.parallel.model_copy(update={"reshard": "never"}))

    def stage_schedules(self) -> list[StagedSchedule]:
        """The schedule of each stage, which knows the tokens of all."""
        assert isinstance(self.task, Staged), "only a task with stages makes some"
        tasks = [stage.task for stage in self.stages]
        return in_stages(
            [stage.schedule for stage in self.stages],
            self.task.schedule_begins,
            [task.steps for task in tasks],
            [task.seq_len * task.global_batch for task in tasks],
        )

    @property
    def cache(self) -> Path:
        """Token shards and trained tokenizers, shared by all runs of one root."""
        return self.root / "cache"


TOP = ("name", "seed", "root", "folder", "dry_run")  # plain values, checked where they are read
