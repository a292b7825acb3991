"""`ReplicaGroups`: what the train step and the loop ask of the other replica groups."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from src.distributed.model_stages import ModelStages

Tree = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """Samples of the run's order that all groups together have taken, and the checksum of this group's among them."""

    samples: range
    checksum: int


@dataclass(frozen=True)
class StateCallbacks:
    """This group's state, to give to a healing group or to be replaced, and how it talks to a person."""

    give: Callable[[], Tree]  # nested dicts of live tensors and plain values
    take: Callable[[Tree], None]  # the plain values, after the tensors were filled in place
    tell: Callable[[str], None]  # a line for a person
    stopped: Callable[[], bool]  # whether this rank was told to stop
    checksum: Callable[[range], int]  # of these samples of the run's order, modulo 2^64


class ReplicaGroups(ABC):
    """The replica groups of a run, seen from one of them.

    A step is `start_quorum`, sums over groups by `allreduce`, and `should_commit`, which says whether it counts. A step
    that does not count has changed nothing and is tried again with the next quorum.
    """

    group: int  # this group's number
    leads: bool  # whether this group writes for all: metrics, checkpoints
    committed: bool  # what the last `should_commit` said
    gave_up: bool  # the last quorum was not waited for, since this group was told to stop

    @abstractmethod
    def register(self, callbacks: StateCallbacks) -> None:
        """Set the callbacks. Before the first quorum."""

    @abstractmethod
    def start_quorum(self, step: int, micro_batches: int) -> range | None:
        """The micro-batches of the step that this group computes; None: no quorum, call again. Collective.

        It may have replaced the state by that of a group that was ahead.
        """

    @abstractmethod
    def allreduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over groups, in place. Collective."""

    @abstractmethod
    def should_commit(self, finite: Tensor) -> bool:
        """Whether the step counts in all groups; `finite` (0-dim bool, on the device): whether this group's numbers
        were. Collective.
        """

    @abstractmethod
    def may_stop(self, asked: bool) -> bool:
        """After a committed step: whether the loop may end. `asked`: a signal asked this group to stop."""

    @property
    @abstractmethod
    def saves(self) -> bool:
        """Whether this group writes a checkpoint now."""

    @abstractmethod
    def metrics(self) -> Mapping[str, float]:
        """Metrics of all groups together and of each."""

    @abstractmethod
    def leave(self) -> None:
        """Say goodbye to the other groups. Not after an error: then they must see this group as dead."""

    def summed(self, micro_batches: int) -> range:
        """After `start_quorum`: the micro-batches of the step that `allreduce` sums over. All of them, unless groups
        take steps of their own.
        """
        return range(micro_batches)

    def outer_step(self, step: int, tokens: int, taken: Taken) -> int:
        """Exchange weights where it is due. After committed step `step`, over `tokens` of this group. Collective.

        Returns the tokens of other groups that are new to this one. It may have replaced the state. `SampleError`
        where groups did not share the samples since their last exchange.
        """
        return 0

    def conclude(self) -> int:
        """After the last step: groups that took steps of their own end with the same weights. Collective.

        Returns the tokens of other groups that are new to this one.
        """
        return 0

    def recall(self, lost: int, failures: int) -> None:  # noqa: B027
        """Steps lost and votes that said no, of all lives before this start of the run. Before the first quorum; the
        groups that live know better, and who heals takes theirs.
        """

    def watch(  # noqa: B027  groups whose steps are one run's have nothing to exchange
        self, network: "ModelStages", refresh: Sequence[Callable[[], None]]
    ) -> None:
        """Set the model whose weights groups exchange; `refresh`: collective calls, in order, after its weights
        changed.
        """

    def tree(self) -> Tree:
        """What groups that train on their own add to the state, for checkpoints and healing; its tensors are the
        live ones.
        """
        return {}

    def adopt(self, tree: Tree) -> None:  # noqa: B027
        """Take over the plain values of a loaded tree, whose tensors were filled in place."""
