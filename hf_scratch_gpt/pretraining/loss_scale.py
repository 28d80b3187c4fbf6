"""Loss scaling for fp16: gradients that would be too small for its range are computed larger, and divided again.

The rule is that of `torch.amp.GradScaler` (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2): a
step whose gradients overflow is left out and halves the scale, and 2,000 steps in a row that do not double it. The
scale stands in the `TrainingState`, so that a checkpoint has it, and follows the gradient's norm over all processes,
so that they agree; the scaler of torch would look at each process's own slice.
"""

import math
from collections.abc import Iterable
from typing import Protocol

import torch

FIRST_SCALE = 2.0**16
STEPS_TO_GROW = 2000
# Where not even the unscaled gradient is finite, the scale is not to blame, and the spike guard decides.
_LEAST_SCALE = 1.0


class ScaledState(Protocol):
    """The counters of a run that the scale reads and keeps; see `TrainingState`."""

    loss_scale: float
    steps_since_overflow: int
    overflows: int


class LossScale:
    """The factor on the loss before its backward pass, always a power of two, so that dividing by it is exact.

    Args:
        state (`TrainingState`): Counters of the run; the scale is among them.
        enabled (`bool`): Whether training is in fp16; else the factor is 1 and nothing overflows.
    """

    def __init__(self, state: ScaledState, enabled: bool):
        self.state, self.enabled = state, enabled

    @property
    def factor(self) -> float:
        """What to multiply the loss by."""
        return self.state.loss_scale if self.enabled else 1.0

    @torch.no_grad()
    def unscale(self, parameters: Iterable[torch.Tensor]) -> None:
        """Divide the gradients by the factor, in place."""
        if self.enabled:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.factor)

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether this step's update must be left out because of the scale, which is then halved; counts it.

        Args:
            loss (`float`): Mean loss of the step over all processes. One that is not finite is not the scale's doing.
            norm (`float`): Norm of its unscaled gradient over all processes.
        """
        state = self.state
        if not self.enabled:
            return False
        if math.isfinite(norm):
            state.steps_since_overflow += 1
            if state.steps_since_overflow == STEPS_TO_GROW:
                state.loss_scale, state.steps_since_overflow = 2 * state.loss_scale, 0
            return False
        if not math.isfinite(loss) or state.loss_scale <= _LEAST_SCALE:
            return False
        state.loss_scale, state.steps_since_overflow = state.loss_scale / 2, 0
        state.overflows += 1
        return True
