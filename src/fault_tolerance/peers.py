"""The other replica groups, as the training loop sees them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from src.distributed.model_stages import ModelStages

Tree = dict[str, Any]


@dataclass(frozen=True)
class Own:
    """This group's state, which one that comes back must get, and its voice."""

    give: Callable[[], Tree]  # nested dicts of live tensors and plain values
    take: Callable[[Tree], None]  # the plain values, after the tensors were filled in place
    tell: Callable[[str], None]  # a line for a person
    stopped: Callable[[], bool]  # whether this rank was told to stop


class Peers:
    """There are none: every question has the answer of a run of one group. The classes beside this one know others.

    A step is `meet`, the sums `total` and `add`, and `agree`, which says whether it counts. A step that does not count
    has changed nothing and is met for again.
    """

    alone = True
    group = 0
    leads = True  # whether this group writes for all: metrics, checkpoints
    counted = True  # what the last `agree` said
    gave_up = False  # a meeting, since this group was told to stop while it waited for the others

    def watch(self, network: "ModelStages", refresh: Sequence[Callable[[], None]]) -> None:
        """Whose weights groups exchange; `refresh`: what follows from new ones, in order; collective."""

    def tree(self) -> Tree:
        """What a checkpoint and a group that heals need of groups that train apart; the tensors are the live ones."""
        return {}

    def adopt(self, tree: Tree) -> None:
        """Take over the small values of a loaded tree; its tensors were filled in place."""

    def introduce(self, own: Own) -> None:
        """Before the first meeting."""

    def meet(self, step: int, micro_batches: int) -> range | None:
        """Collective. Which of the step's micro-batches are this group's; None: the meeting failed, ask again.

        The state may be another one afterwards: that of a group that was ahead.
        """
        return range(micro_batches)

    def total(self, values: Tensor) -> Tensor:
        """Collective. The element-wise sum over groups, in place."""
        return values

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Collective. Each tensor becomes its sum over groups, in place."""

    def agree(self, finite: Tensor) -> bool:
        """Collective. Whether the step counts; `finite` is this step's verdict (0-dim, bool) on the device."""
        return True

    def settle(self, step: int, tokens: int) -> int:
        """Collective. After a step that counted, the run's number `step`, over `tokens` of this group.

        Returns the tokens of other groups that are new to this one. The state may be another one afterwards.
        """
        return 0

    def may_leave(self, asked: bool) -> bool:
        """After a step that counted: whether the loop may end. `asked`: a signal wants it to."""
        return asked

    @property
    def saves(self) -> bool:
        """Whether this group writes a checkpoint now."""
        return self.leads

    def metrics(self) -> Mapping[str, float]:
        """Of the whole and of each group."""
        return {}

    def leave(self) -> None:
        """Not on the way out of an error: then the others are to see it as dead."""
