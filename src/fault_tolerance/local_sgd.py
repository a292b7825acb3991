"""fault_tolerance=local_sgd and diloco: groups train on their own and exchange weights every so many steps."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from src.config.base import Names
from src.config.bounds import Layers, LearningRate, Steps, StepsOrNever
from src.fault_tolerance.config import Asked, TorchFT
from src.fault_tolerance.fragments import Modules, Rounds, cut, problems

if TYPE_CHECKING:
    from src.distributed.process.rank_context import RankContext
    from src.fault_tolerance.outer import Rule
    from src.fault_tolerance.replica_groups import ReplicaGroups


class Periodic(TorchFT):
    """Base of both; implements `LocalSGDOptions` of src/fault_tolerance/local_sgd_groups.py."""

    sync_steps: Steps
    """Optimizer steps in which every weight is exchanged once."""
    copy_on: Literal["cpu", "device"]
    """Where the weights of the last exchange are kept, for one that fails; cpu: host memory; device: their GPU."""

    velocity_bytes: ClassVar[int]  # of each weight

    @property
    def rounds(self) -> Rounds:
        return Rounds(self.sync_steps, 1, 0)

    def outer_bytes(self, weight_bytes: int) -> int:
        return weight_bytes + self.velocity_bytes if self.copy_on == "device" else 0

    def join(self, ranks: "RankContext") -> "ReplicaGroups":
        from src.fault_tolerance.local_sgd_groups import LocalSGDGroups

        assert isinstance(self, LocalSGD | DiLoCo), "one of the two methods"
        return LocalSGDGroups(self, ranks)

    def problems(self, asked: Asked) -> list[str]:
        found = super().problems(asked) + self.rounds.problems()
        interval = self.rounds.interval
        if not self.rounds.problems() and asked.steps % interval:
            found.append(
                f"task.steps={asked.steps} ends between two exchanges, which are every {interval} steps "
                f"(fault_tolerance.sync_steps), and what groups learned since the last one would be lost "
                f"({_nearest(asked.steps, interval)} would do)"
            )
        return found


class LocalSGD(Periodic):
    """Every `sync_steps` steps the weights of all groups become their mean."""

    velocity_bytes: ClassVar[int] = 0

    @property
    def exchange(self) -> Literal["float32"]:
        return "float32"

    @property
    def own_share(self) -> float:
        return 0.0

    def rule(self) -> "Rule":
        from src.fault_tolerance.outer import Averaging

        return Averaging()

    def modules(self, n_layers: int) -> Modules:
        """Module names of each fragment."""
        return cut(n_layers, 1, None)


class DiLoCo(Periodic):
    """The mean over groups of (outer weights - their weights) is the gradient of an outer optimizer, one fragment at
    a time.
    """

    velocity_bytes: ClassVar[int] = 4  # float32

    outer_lr: LearningRate
    """Learning rate of the outer SGD; 1: without momentum, the mean of the groups' weights."""
    outer_momentum: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Momentum of the outer SGD, in Nesterov's form; 0: none."""
    fragments: Layers
    """Parts of the model, exchanged one at a time; divides sync_steps."""
    fragment_modules: Annotated[tuple[Names, ...], Field(strict=False)] | None
    """Modules of each fragment, like [[tok_embeddings,layers.0],[layers.1,norm,output]]; null: even."""
    delay_steps: StepsOrNever
    """Steps from sending a fragment to merging the result; less than sync_steps / fragments."""
    own_share: Annotated[float, Field(ge=0.0, le=1.0)]
    """Share (alpha) of a group's own weights in what it goes on with after a merge; 0: the outer weights alone."""
    exchange: Literal["float32", "bfloat16", "int8"]
    """Dtype on the wire; int8: with a scale for each 256 values."""

    @property
    def rounds(self) -> Rounds:
        return Rounds(self.sync_steps, self.fragments, self.delay_steps)

    def rule(self) -> "Rule":
        from src.fault_tolerance.outer import Nesterov

        return Nesterov(self.outer_lr, self.outer_momentum)

    def modules(self, n_layers: int) -> Modules:
        return cut(n_layers, self.fragments, self.fragment_modules)

    def problems(self, asked: Asked) -> list[str]:
        found = super().problems(asked) + self._fragment_problems(asked.n_layers)
        every, interval = asked.save_every, self.rounds.interval
        if every is not None and self.delay_steps and not found and every % interval:
            found.append(
                f"checkpoint.every={every}: with fault_tolerance.delay_steps={self.delay_steps} a fragment may be on "
                f"its way then; a multiple of the {interval} steps between two exchanges, {_nearest(every, interval)}"
            )
        return found

    def _fragment_problems(self, n_layers: int) -> list[str]:
        named = self.fragment_modules
        if named is None:
            most = n_layers + 2
            if self.fragments > most:
                return [
                    f"fault_tolerance.fragments={self.fragments} of {n_layers} layers, an embedding and a head; at "
                    f"most {most}"
                ]
            return []
        if len(named) != self.fragments:
            return [
                f"fault_tolerance.fragment_modules names {len(named)} fragments and fault_tolerance.fragments="
                f"{self.fragments}; pass fragments={len(named)}"
            ]
        rule = f"each module of the model once, tok_embeddings, layers.0 to layers.{n_layers - 1}, norm and output"
        return [f"fault_tolerance.fragment_modules: {fault}; it holds {rule}" for fault in problems(named, n_layers)]


def _nearest(value: int, of: int) -> str:
    lower = value // of * of
    return f"{lower} or {lower + of}" if lower else f"{of}"
