"""What a sweep is, and what its runs are made of: lists of overrides, each a run's, and how lists are combined.

>>> product(grid({"method.rank": [4, 8]}), seeds(2))[1]
{'method.rank': 4, 'train.seed': 1}
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.errors import UserError

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Where a value is drawn from; made by `uniform`, `log_uniform` and `choice`."""

    low: float = 0.0
    high: float = 0.0
    logarithmic: bool = False
    values: tuple[Any, ...] = ()  # of a choice; then the others have no meaning

    def sample(self, random: np.random.Generator) -> Any:
        """Returns a value."""
        if self.values:
            return self.values[int(random.integers(len(self.values)))]
        if not self.logarithmic:
            return float(random.uniform(self.low, self.high))
        return math.exp(random.uniform(math.log(self.low), math.log(self.high)))


@dataclasses.dataclass(frozen=True)
class Search:
    """Runs that Optuna proposes one after the other, by what came of those before, in the place of a fixed list."""

    space: Mapping[str, Draw]  # by path: {"optimizer.learning_rate": log_uniform(1e-5, 1e-2), "method": choice(LoRA(), IA3())}
    trials: int = 20  # runs
    sampler: str = "tpe"  # tpe (Bergstra et al. 2011), random
    pruner: str = "none"  # stops runs early: none, median, asha (Li et al. 2020, arXiv:1810.05934); both need train.eval_every
    seed: int = 0  # of the proposals


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What an experiment's `sweep()` returns. Paths are those of the configuration, without "config."."""

    runs: Iterable[Mapping[str, Any]] = ()  # each a run's overrides: {"method": LoRA(rank=8), "optimizer.learning_rate": 1e-3}
    metric: str = "loss"  # of the evaluations: settings are chosen by it on validation, figures are of test
    mode: str = "min"  # min or max
    # Paths whose values make a row of the report, as ("method",); others but train.seed are tuned. Left out, all but the optimizer's make
    # rows, of a search none: it tunes all that it draws.
    vary: tuple[str, ...] = ()
    search: Search | None = None  # in the place of `runs`


def grid(values: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """Returns every combination of the values.

    >>> grid({"method.rank": [4, 8], "train.seed": [0]})
    [{'method.rank': 4, 'train.seed': 0}, {'method.rank': 8, 'train.seed': 0}]
    """
    for path, found in values.items():
        if isinstance(found, str) or not isinstance(found, Iterable):
            raise UserError(f"grid() takes a list of values of {path}, not {found!r}. Write [{found!r}].")
    return [dict(zip(values, found, strict=True)) for found in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Returns the first values of all paths, the second ones, and so on; raises `UserError` where one has more of them than another.

    >>> zipped({"method.rank": [4, 8], "method.alpha": [8.0, 16.0]})
    [{'method.rank': 4, 'method.alpha': 8.0}, {'method.rank': 8, 'method.alpha': 16.0}]
    """
    counts = {path: len(found) for path, found in values.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"zipped() takes as many values of each path, not {', '.join(f'{n} of {path}' for path, n in counts.items())}.")
    return [dict(zip(values, found, strict=True)) for found in zip(*values.values(), strict=True)]


def product(*parts: Iterable[Mapping[str, Any]]) -> list[Overrides]:
    """Returns every combination of one run's overrides of each list; raises `UserError` where two lists give one path.

    >>> product([{"train.seed": 0}, {"train.seed": 1}], [{"data.limit": 10}])
    [{'train.seed': 0, 'data.limit': 10}, {'train.seed': 1, 'data.limit': 10}]
    """
    found = []
    for combination in itertools.product(*map(list, parts)):
        whole: Overrides = {}
        for one in combination:
            if twice := sorted(whole.keys() & one.keys()):
                raise UserError(f"product() combines lists of different paths, but two of them give {twice[0]}.")
            whole |= one
        found.append(whole)
    return found


def draws(space: Mapping[str, Draw], count: int, seed: int = 0) -> list[Overrides]:
    """Returns `count` runs with a value of each path, drawn at random.

    >>> [run["method"] for run in draws({"method": choice("a", "b")}, 5)]
    ['a', 'b', 'b', 'b', 'b']
    """
    random = np.random.default_rng((seed, *b"draws"))
    return [{path: draw.sample(random) for path, draw in space.items()} for _ in range(count)]


def seeds(count: int) -> list[Overrides]:
    """Returns a run for each of the seeds 0 to `count` - 1.

    >>> seeds(2)
    [{'train.seed': 0}, {'train.seed': 1}]
    """
    return [{"train.seed": seed} for seed in range(count)]


def uniform(low: float, high: float) -> Draw:
    """Returns where numbers from `low` to `high` are equally likely."""
    return _between(low, high, logarithmic=False)


def log_uniform(low: float, high: float) -> Draw:
    """Returns where numbers from `low` to `high` are as likely as their multiples: for rates.

    >>> 1e-5 <= draws({"optimizer.learning_rate": log_uniform(1e-5, 1e-2)}, 1)[0]["optimizer.learning_rate"] <= 1e-2
    True
    """
    if low <= 0:
        raise UserError(f"log_uniform({low:g}, {high:g}): the lower end is above 0.")
    return _between(low, high, logarithmic=True)


def choice(*values: Any) -> Draw:
    """Returns where each of the values, methods among them, is equally likely."""
    if not values:
        raise UserError("choice() takes at least one value.")
    return Draw(values=values)


def _between(low: float, high: float, logarithmic: bool) -> Draw:
    if not low < high < math.inf:
        raise UserError(f"A draw from {low:g} to {high:g}: the lower end comes first, and both are numbers.")
    return Draw(float(low), float(high), logarithmic)
