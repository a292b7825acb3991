"""The replica groups of a run, as its train step and its loop see them: `ReplicaGroups` is the interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from src.distributed.model_stages import ModelStages

Tree = dict[str, Any]


@dataclass(frozen=True)
class StateCallbacks:
    """This group's state, which one that comes back must get, and its voice."""

    give: Callable[[], Tree]  # nested dicts of live tensors and plain values
    take: Callable[[Tree], None]  # the plain values, after the tensors were filled in place
    tell: Callable[[str], None]  # a line for a person
    stopped: Callable[[], bool]  # whether this rank was told to stop


class ReplicaGroups(ABC):
    """This group among the groups of a run.

    A step is `start_quorum`, sums over groups by `allreduce`, and `should_commit`, which says whether it counts. A step
    that does not count has changed nothing and is tried again with the next quorum.
    """

    group: int  # this group's number
    leads: bool  # whether this group writes for all: metrics, checkpoints
    committed: bool  # what the last `should_commit` said
    gave_up: bool  # the last quorum was not waited for, since this group was told to stop

    @abstractmethod
    def register(self, callbacks: StateCallbacks) -> None:
        """Before the first quorum."""

    @abstractmethod
    def start_quorum(self, step: int, micro_batches: int) -> range | None:
        """Collective. Which of the step's micro-batches are this group's; None: there is no quorum, ask again.

        The state may be another one afterwards: that of a group that was ahead.
        """

    @abstractmethod
    def allreduce(self, tensors: Sequence[Tensor]) -> None:
        """Collective. Each tensor becomes its sum over groups, in place."""

    @abstractmethod
    def should_commit(self, finite: Tensor) -> bool:
        """Collective. Whether the step counts; `finite` is this step's verdict (0-dim, bool) on the device."""

    @abstractmethod
    def may_stop(self, asked: bool) -> bool:
        """After a step that counted: whether the loop may end. `asked`: a signal wants it to."""

    @property
    @abstractmethod
    def saves(self) -> bool:
        """Whether this group writes a checkpoint now."""

    @abstractmethod
    def metrics(self) -> Mapping[str, float]:
        """Of the whole and of each group."""

    @abstractmethod
    def leave(self) -> None:
        """Not on the way out of an error: then the others are to see it as dead."""

    def outer_step(self, step: int, tokens: int) -> int:
        """Collective. After a step that counted, the run's number `step`, over `tokens` of this group.

        Returns the tokens of other groups that are new to this one. The state may be another one afterwards.
        """
        return 0

    def watch(  # noqa: B027  groups whose steps are one run's have nothing to exchange
        self, network: "ModelStages", refresh: Sequence[Callable[[], None]]
    ) -> None:
        """Whose weights groups exchange; `refresh`: what follows from new ones, in order; collective."""

    def tree(self) -> Tree:
        """What a checkpoint and a group that heals need of groups that train apart; the tensors are the live ones."""
        return {}

    def adopt(self, tree: Tree) -> None:  # noqa: B027
        """Take over the small values of a loaded tree; its tensors were filled in place."""
