"""The numbers that runs of one program may differ in: which these are, and their values as arguments of the program."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft import overrides
from jaxft.config import Experiment
from jaxft.models import dropout
from jaxft.train.setup import Described

SEED = "seed"
OPTIMIZER = ("learning_rate", "weight_decay")
METHOD = ("alpha", "dropout", "scaling")  # of a method: leaves of the parameters that don't train, in all methods that have such fields
_ALWAYS_DECAYS = ("adamw", "lion")  # optimizers whose state is the same with a weight decay of 0


def likeness(experiment: Experiment) -> str:
    """Returns what an experiment must have in common with others to train in one program with them: all but its numbers.

    Whether a number is 0 is a part of it where the program without it is another one.

    >>> from jaxft.config import DataConfig, ModelConfig, TrainConfig
    >>> from jaxft.methods import LoRA
    >>> from jaxft.tasks import SFT
    >>> one = Experiment("example", ModelConfig(), DataConfig(), LoRA(alpha=8.0), SFT())
    >>> other = dataclasses.replace(one, method=LoRA(alpha=32.0), train=TrainConfig(seed=1))
    >>> likeness(one) == likeness(other), likeness(one) == likeness(dataclasses.replace(one, method=LoRA(rank=4)))
    (True, False)
    """
    found = overrides.to_dict(experiment)
    del found["train"][SEED]
    del found["optimizer"]["learning_rate"]
    decay = found["optimizer"].pop("weight_decay")
    found["decays"] = bool(decay) or experiment.optimizer.name in _ALWAYS_DECAYS
    for kind in dropout.KINDS:
        del found["model"][kind]
    found["method"] = _without_numbers(found["method"])
    return json.dumps(found, sort_keys=True)


def _without_numbers(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method, or a sum of methods, as JSON, with 0 and 1 in the place of its numbers."""
    return {
        name: bool(value)
        if name in METHOD
        else [_without_numbers(part) for part in value]
        if name == "methods" and overrides.CLASS in method
        else value
        for name, value in method.items()
    }


@dataclasses.dataclass(frozen=True)
class Varying:
    """The fields that are arguments of a program, beside the seed: those in which its runs differ."""

    optimizer: tuple[str, ...]
    dropouts: tuple[str, ...]  # fields of the model's shape

    def values(self, run: Described) -> dict[str, dict[str, np.ndarray] | np.ndarray]:
        """Returns a run's numbers, () each."""
        experiment, shape = run.experiment, run.model.config
        return {
            SEED: np.asarray(experiment.train.seed % 2**32, np.uint32),
            "optimizer": {name: np.asarray(getattr(experiment.optimizer, name), np.float32) for name in self.optimizer},
            "dropouts": {name: np.asarray(dropout.as_array(getattr(shape, name))) for name in self.dropouts},
        }


def varying(experiments: Sequence[Experiment], run: Described) -> Varying:
    """Returns the fields in which experiments of one likeness differ; `run` is one of them."""
    optimizer = [name for name in OPTIMIZER if len({getattr(one.optimizer, name) for one in experiments}) > 1]
    kinds = [kind for kind in dropout.KINDS if len({getattr(one.model, kind) for one in experiments}) > 1]
    fields = [field for kind in kinds for field in run.model.config.dropouts[kind]]
    return Varying(tuple(optimizer), tuple(fields))


def with_values(run: Described, values: Mapping[str, Any]) -> Described:
    """Returns the run with these numbers in the place of its own; in a program, with its arguments."""
    experiment, model = run.experiment, run.model
    train = dataclasses.replace(experiment.train, seed=values[SEED])
    optimizer = dataclasses.replace(experiment.optimizer, **values["optimizer"])
    shape = dataclasses.replace(model.config, **values["dropouts"])
    experiment = dataclasses.replace(experiment, train=train, optimizer=optimizer)
    return dataclasses.replace(run, experiment=experiment, model=model.clone(config=shape))
