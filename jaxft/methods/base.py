"""What a fine-tuning method is: two pure functions, and how methods add up."""

import abc
import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.models import segments
from jaxft.models.node import Around, innermost, is_node

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Material:
    """What a run has beside the parameters, for methods that start from it; each is made when it is called."""

    # (params, chosen, kind, batches): how much each weight of the kernels whose names are chosen matters, by gradients of training
    # batches; jaxft.train.scores says more
    scores: Callable[[Params, Callable[[str], bool], str, int], Params]
    kernel: Callable[[str], Any]  # (name): the dense kernel (in, out) as the model's files hold it, whatever it is stored as in params


class Method(abc.ABC):
    """A fine-tuning method: a frozen dataclass of its settings, with pure functions on parameters.

    `init` and `mask` are the method. What most methods don't need has a default.
    """

    def __post_init__(self) -> None:
        """Raises `UserError` for a number that isn't finite, or not whole where it has to be."""
        own: Any = self
        for field in dataclasses.fields(own):
            value = getattr(self, field.name)
            if field.type is float and not (isinstance(value, numbers.Real) and math.isfinite(value)):
                raise UserError(f"method.{field.name} is a finite number, not {value!r}.")
            if field.type is int and not isinstance(value, numbers.Integral):
                raise UserError(f"method.{field.name} is a whole number, not {value!r}.")

    @abc.abstractmethod
    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with the method's leaves added, or with some leaves stored in another form.

        A run checks by `jax.eval_shape` first whether the method fits the model, so this may look at shapes, not at numbers.
        """

    def begin(self, rng: jax.Array, model: nn.Module, params: Params, material: Material) -> Params:
        """Returns what `init` does, for methods that look at more than the parameters first: a run begins with this."""
        return self.init(rng, model, params)

    @abc.abstractmethod
    def mask(self, params: Params) -> Any:
        """Returns which leaves train: a pytree of bool with the structure of `params` (an optax mask)."""

    @abc.abstractmethod
    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns `params` with the method folded into the base; raises `UserError` where that isn't possible."""

    def tokenized(self, tokenizer: Any) -> "Method":
        """Returns the method with the tokens of what it has as text; a run does this before `init`."""
        return self

    def optimizer(self, inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """Returns the run's optimizer with what the method adds to it: rates of its own, a schedule of what trains, a budget.

        Args:
          inner: clipping, update and schedule, over the trainable leaves of `mask`.
          steps: of the whole run.
        """
        return inner

    @property
    def title(self) -> str:
        """What reports call the method."""
        return type(self).__name__

    def penalty(self, params: Params) -> jax.Array:
        """Returns what the method adds to the mean loss of a step, () float32."""
        return jnp.zeros((), jnp.float32)

    def __add__(self, other: "Method") -> "Compose":
        """Returns both methods at once.

        >>> from jaxft.methods import LoRA
        >>> len((LoRA(targets=("q_proj",)) + LoRA(targets=("v_proj",))).methods)
        2
        """
        if not isinstance(other, Method):
            return NotImplemented
        return Compose((*_parts(self), *_parts(other)))


@dataclasses.dataclass(frozen=True)
class Compose(Method):
    """Several methods at once: their leaves are added in order, and all of them train."""

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise UserError("A sum of no methods trains nothing. Write one as LoRA(rank=8) + BitFit().")

    def init(self, rng: jax.Array, model: nn.Module, params: Params) -> Params:
        """Returns `params` with every method's leaves.

        Raises `UserError` where two methods train the same leaf, or one trains a kernel that another one trains something around.
        """
        for number, method in enumerate(self.methods):
            params = method.init(jax.random.fold_in(rng, number), model, params)
        self._check_disjoint(params)
        return params

    def begin(self, rng: jax.Array, model: nn.Module, params: Params, material: Material) -> Params:
        """Returns what `init` does, each method after a look at the run's material where it takes one."""
        for number, method in enumerate(self.methods):
            params = method.begin(jax.random.fold_in(rng, number), model, params, material)
        self._check_disjoint(params)
        return params

    @property
    def title(self) -> str:
        """The names of the methods."""
        return " + ".join(method.title for method in self.methods)

    def mask(self, params: Params) -> Any:
        """Returns True where any of the methods trains."""
        masks = [method.mask(params) for method in self.methods]
        return jax.tree.map(lambda *trains: any(trains), *masks)

    def merge(self, model: nn.Module, params: Params) -> Params:
        """Returns `params` with every method folded in, the last one first."""
        for method in reversed(self.methods):
            params = method.merge(model, params)
        return params

    def tokenized(self, tokenizer: Any) -> "Compose":
        """Returns the methods with the tokens of what they have as text."""
        return Compose(tuple(method.tokenized(tokenizer) for method in self.methods))

    def optimizer(self, inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """Returns the run's optimizer with what every method adds."""
        for method in self.methods:
            inner = method.optimizer(inner, steps)
        return inner

    def penalty(self, params: Params) -> jax.Array:
        """Returns the sum of what the methods add to the loss."""
        return sum((method.penalty(params) for method in self.methods), start=jnp.zeros((), jnp.float32))

    def _check_disjoint(self, params: Params) -> None:
        owner: dict[tuple[str, ...], str] = {}
        for method in self.methods:
            for leaf in segments.leaves(method.mask(params)):
                if not leaf.value:
                    continue
                name = type(method).__name__
                if leaf.path in owner:
                    raise UserError(
                        f"{owner[leaf.path]} and {name} both train {leaf.title}. Leave one of them out, or give them other targets."
                    )
                owner[leaf.path] = name
        self._check_kernels(params)

    def _check_kernels(self, params: Params) -> None:
        whole: dict[tuple[str, ...], str] = {}
        around: dict[tuple[str, ...], str] = {}
        for method in self.methods:
            for leaf in segments.leaves(method.mask(params), is_leaf=is_node):
                if not isinstance(leaf.value, Around):
                    continue
                base = sum(jax.tree.leaves(innermost(leaf.value)))
                if base:
                    whole[leaf.path] = type(method).__name__
                if sum(jax.tree.leaves(leaf.value)) > base:
                    around[leaf.path] = type(method).__name__
                if leaf.path in whole and leaf.path in around:
                    raise UserError(
                        f"{whole[leaf.path]} trains {leaf.title}, and {around[leaf.path]} what stands around it. Leave one of them out, or "
                        "give them other targets."
                    )


def _parts(method: Method) -> tuple[Method, ...]:
    return method.methods if isinstance(method, Compose) else (method,)
