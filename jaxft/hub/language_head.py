"""The head of words that a model's files hold beside, or in the place of, the head of another task."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.hub.load import Params, check_whole, describe_for, open_for
from jaxft.hub.task import Task
from jaxft.models import heads

HEAD = "lm_head"  # what the families call it; a tied causal model has no parameters of it


class LanguageHead:
    """The language model's head of some files, for a model of another task; nothing is read before it is asked for.

    A causal model's is in the files, or tied to the embedding. An encoder's is that of masked_lm; where the files have none, its transform
    is drawn, and the product with the embedding, where the family ties the two, is the model's own.
    """

    def __init__(self, source: str, revision: str, dtype: Any, seed: int) -> None:
        """Arguments are those of `load_pretrained`."""
        self._source, self._revision, self._dtype, self._seed = source, revision, dtype, seed

    def shapes(self, model: nn.Module) -> tuple[Params, bool]:
        """Returns the shapes of the parameters that `model`, of another task, lacks of its family's language model, and whether they are
        drawn, from the configuration alone.

        Raises:
          UserError: a causal model's files that have no head of words.
        """
        described, aimed = describe_for(self._source, self._task(model), self._dtype, self._revision)
        shapes = jax.eval_shape(described.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return {name: part for name, part in shapes.items() if name == HEAD}, aimed.new_head

    def read(self, model: nn.Module) -> tuple[Params, bool]:
        """Returns the same with arrays in the shapes' place, in the compute type."""
        if not self.shapes(model)[0]:
            return {}, False
        opened = open_for(self._source, self._dtype, self._revision, self._task(model))
        entries = opened.entries(opened.shapes)
        check_whole([entry for entry in entries if entry.path not in opened.drawn], opened)
        found: Params = {}
        for entry in entries:
            first, *inner, last = entry.path.split("/")
            if first != HEAD:
                continue
            holder = functools.reduce(lambda group, name: group.setdefault(name, {}), inner, found.setdefault(first, {}))
            holder[last] = jnp.asarray(opened.read(entry), opened.model.dtype)
        return found, opened.aimed.new_head

    def _task(self, model: Any) -> Task:
        kind = heads.CAUSAL_LM if heads.is_causal(model) else heads.MASKED_LM
        return Task(kind, seed=self._seed, new_head=kind == heads.MASKED_LM)
