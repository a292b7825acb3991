"""task=verify: compares training in a layout with training on one device."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from src.config.base import Config
from src.config.bounds import Fraction, Sequences, Steps, Tokens

if TYPE_CHECKING:
    from src.run import Run


class Verify(Config):
    """Take the same `steps` in the layout and on a single device, and compare every loss, gradient and norm; written
    to certificate.json.
    """

    needs_corpus: ClassVar[bool] = False
    trains_on_one_device: ClassVar[bool] = True

    steps: Steps
    """Optimizer steps that the layout and the single device take, each at the full learning rate."""
    seq_len: Tokens
    """Tokens per sequence."""
    global_batch: Sequences
    """Sequences per optimizer step, over all ranks; the same in every step."""
    micro_batch: Sequences
    """Sequences per rank and forward."""
    z_loss: Fraction
    """Weight of the squared log normaliser of each label's logits in gradients; the loss shown has none; 0: none."""
    router_z_loss: Fraction
    """The same of each token's router logits in each layer with experts; 0: none."""

    def run(self, run: "Run", folder: Path) -> bool:
        """Run the task on this rank, from joining the process groups to leaving them. Collective. VerdictError when
        the layout differs from the single device.
        """
        from src.tasks.verify.rank import verify

        return verify(self, run, folder)
