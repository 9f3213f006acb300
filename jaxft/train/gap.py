"""The gap between the losses on training and on validation rows, and when it says that a model learns its rows by heart."""

import dataclasses

import numpy as np

_SIGN = 2  # evaluations in a row: one may be chance


@dataclasses.dataclass(frozen=True)
class Gap:
    """What a run remembers of its evaluations; plain JSON."""

    lowest: float | None = None  # validation loss so far
    training: float | None = None  # the loss on training rows measured with it
    step: int = 0  # when that was
    worse: int = 0  # evaluations in a row since, validation above and training below those
    warned: bool = False

    def after(self, step: int, validation: float, training: float) -> "Gap":
        """Returns what is remembered after one more evaluation.

        >>> gap = Gap().after(10, validation=1.0, training=0.9).after(20, validation=1.1, training=0.6)
        >>> gap.warned, gap.after(30, validation=1.2, training=0.3).warned
        (False, True)
        """
        if self.lowest is None or self.training is None or validation < self.lowest:
            return Gap(validation, training, step, warned=self.warned)
        worse = self.worse + 1 if training < self.training else 0
        return dataclasses.replace(self, worse=worse, warned=self.warned or worse >= _SIGN)

    def warning(self, validation: float, training: float) -> str:
        """Returns what a user is told of losses that part, once a run."""
        return (
            f"Warning: since step {self.step} the loss on validation rows rises ({self.lowest:.4f} to {validation:.4f}) while that on "
            f"training rows falls ({self.training:.4f} to {training:.4f}), {self.worse} evaluations in a row: the model learns its rows by "
            "heart. train.patience stops there; fewer epochs, dropout (config.model.hidden_dropout) and optimizer.weight_decay hold it "
            "back; docs/generalization.md has more."
        )


def sample(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns the numbers of the training examples of `count` rows, or of all where there are fewer: the same at every evaluation.

    Args:
      rows: (examples,) int, the row of the data that each example is of; what belongs together stays together.
      count: rows.
      seed: of the draw.
    """
    every = np.unique(rows)
    chosen = np.random.default_rng((seed, *b"gap")).choice(every, min(count, len(every)), replace=False)
    return np.flatnonzero(np.isin(rows, chosen))
