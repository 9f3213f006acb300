"""Nodes: pytrees that stand where an array could, or at a named site of a layer, and know what to do there.

Models multiply through `linear` and `dot`; they never ask what stands in a parameter's place. A method or a number format brings its own
subclass of `Node`, and nodes nest: a LoRA around a quantized kernel. What isn't a kernel stands at a site: what a sub-layer's output
passes through (`Join`), tokens that come before the text (`Prompt`), keys and values that come before the text's (`Prefix`).
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

_T = TypeVar("_T")
Kernel = Any  # jax.Array of shape (in, out), or a Node that acts like one
BASE = "base"  # the field of a node that holds what it wraps; listings and patterns leave it out of names


class Node(abc.ABC):
    """A kernel of shape (in, out) that isn't one array. Leaves of a stacked node have a leading layer axis."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Returns x (tokens, in) times the kernel, (tokens, out), in x's type; `rng` draws dropout, None is none."""

    def linear(self, x: jax.Array, bias: jax.Array | None, rng: jax.Array | None) -> jax.Array:
        """Returns x (tokens, in) times the kernel plus the bias (out,), where there is one."""
        return _plus(self.dot(x, rng), self.bias(bias))

    def bias(self, bias: jax.Array | None) -> jax.Array | None:
        """Returns what the layer adds to the product, (out,), where its parameter is `bias`; None is nothing."""
        return bias

    def take(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Returns the rows `ids` (...) of a table, (..., out) in `dtype`."""
        return self.dense().astype(dtype)[ids]

    def tied(self) -> Kernel:
        """Returns what an output head that is tied to this table multiplies with, (vocabulary, features)."""
        return self.dense()

    def prepared(self) -> "Node":
        """Returns a kernel that multiplies as this one does, without dropout, what doesn't depend on the tokens computed once."""
        return self

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """Returns the kernel as one float32 array, with the node folded in."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape, with the layer axis where the node is stacked."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The type that the kernel is stored in when it is dense."""

    @abc.abstractmethod
    def placement(self, spec: PartitionSpec) -> "Node":
        """Returns the node with a PartitionSpec for each leaf, for a kernel that is placed by `spec`."""


class Around(Node):
    """A kernel's node around another kernel, which its field `base` holds."""

    base: Kernel

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def bias(self, bias: jax.Array | None) -> jax.Array | None:
        return self.base.bias(bias) if isinstance(self.base, Node) else bias

    def prepared(self) -> Node:
        changed: Any = dataclasses.replace(self, base=prepared(self.base))  # type: ignore[type-var]
        return changed

    def base_placement(self, spec: PartitionSpec) -> Any:
        """Returns where the base lies, for a kernel that is placed by `spec`."""
        return self.base.placement(spec) if isinstance(self.base, Node) else spec


class Quantized(Node):
    """A kernel in a number format of few bits. Its leaves never train: steps of an optimizer are smaller than the gaps between values."""

    @property
    @abc.abstractmethod
    def format_name(self) -> str:
        """What messages call the format."""

    @abc.abstractmethod
    def requantized(self, kernel: jax.Array) -> "Quantized":
        """Returns another dense kernel of the same shape, float32, in this one's format."""


def is_quantized(value: Any) -> bool:
    """Returns whether `value` is a kernel in a number format of few bits."""
    return isinstance(value, Quantized)


class Site:
    """What stands at a named site of a model. Sites within layers are stacked as kernels are."""

    def placement(self) -> Any:
        """Returns the node with a PartitionSpec for each leaf: every device holds all of it."""
        return jax.tree.map(lambda _: PartitionSpec(), self)


class Join(Site, abc.ABC):
    """Stands where a sub-layer's output joins what it is added to: `attention_output`, `mlp_output`."""

    @abc.abstractmethod
    def join(self, residual: jax.Array, output: jax.Array, rng: jax.Array | None, norm: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns what goes on, (tokens, hidden_size), in the place of residual + output, where `norm` is applied to it next.

        In families with their norms before the sub-layers nothing is: `norm` returns what it gets.
        """


class Prompt(Site, abc.ABC):
    """Stands at `prompt`: virtual tokens before the text."""

    @abc.abstractmethod
    def embeddings(self) -> jax.Array:
        """Returns the virtual tokens' embeddings, (virtual_tokens, hidden_size) float32."""

    @property
    def virtual_tokens(self) -> int:
        """How many there are."""
        return int(jax.eval_shape(lambda own: own.embeddings(), self).shape[0])


class Prefix(Site, abc.ABC):
    """Stands at `prefix`: virtual tokens that every layer's attention sees before the text's."""

    @abc.abstractmethod
    def keys_values(self) -> tuple[jax.Array, jax.Array]:
        """Returns every layer's keys and values, each (layers, virtual_tokens, key_value_heads, head_dim) float32."""

    @property
    def virtual_tokens(self) -> int:
        """How many there are."""
        return int(jax.eval_shape(lambda own: own.keys_values(), self)[0].shape[1])


def virtual_tokens(params: Any) -> int:
    """Returns how many virtual tokens stand before every text."""
    return sum(site.virtual_tokens for site in params.values() if isinstance(site, (Prefix, Prompt)))


def prompt_tokens(params: Any) -> int:
    """Returns how many of the virtual tokens are a prompt's, which stand in the row."""
    return sum(site.virtual_tokens for site in params.values() if isinstance(site, Prompt))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """An array within a stacked node that all layers have in common: it has no layer axis."""

    value: jax.Array


def is_shared(value: Any) -> bool:
    """Returns whether `value` is an array that layers have in common."""
    return isinstance(value, Shared)


def node(cls: type[_T]) -> type[_T]:
    """Class decorator: makes a frozen dataclass, and of it a pytree, every field a child."""
    cls = cls if dataclasses.is_dataclass(cls) else dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return jax.tree_util.register_dataclass(cls, names, [])


def is_node(value: Any) -> bool:
    """Returns whether `value` is a node: in a kernel's place, or at a site."""
    return isinstance(value, (Node, Site))


def find(value: Any, kind: type[Any]) -> Any:
    """Returns the outermost node of a class among those around a kernel, `value` itself included, or None where there is none."""
    while not isinstance(value, kind):
        if not isinstance(value, Around):
            return None
        value = value.base
    return value


def innermost(kernel: Kernel) -> Kernel:
    """Returns what stands within all nodes around a kernel: an array, or a number format's node."""
    while isinstance(kernel, Around):
        kernel = kernel.base
    return kernel


def is_site(value: Any) -> bool:
    """Returns whether `value` is a node at a site."""
    return isinstance(value, Site)


def prepared(params: Any) -> Any:
    """Returns parameters, or one kernel, for many passes without training: what doesn't depend on the tokens is computed once."""
    return jax.tree.map(lambda value: value.prepared() if isinstance(value, Node) else value, params, is_leaf=is_node)


def linear(x: jax.Array, kernel: Kernel, bias: jax.Array | None, rng: jax.Array | None = None) -> jax.Array:
    """Returns x (tokens, in) times kernel (in, out) plus bias (out,), where there is one: (tokens, out) in x's type."""
    if isinstance(kernel, Node):
        return kernel.linear(x, bias, rng)
    return _plus(dot(x, kernel), bias)


def _plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(y.dtype)


def dot(x: jax.Array, kernel: Kernel, rng: jax.Array | None = None) -> jax.Array:
    """Returns x (tokens, in) times kernel (in, out): (tokens, out) in x's type."""
    if isinstance(kernel, Node):
        return kernel.dot(x, rng)
    return x @ kernel.astype(x.dtype)


def take(ids: jax.Array, table: Kernel, dtype: Any = None) -> jax.Array:
    """Returns the rows `ids` (...) of a table (vocabulary, features), (..., features) in `dtype`, the table's own where it is None."""
    if isinstance(table, Node):
        return table.take(ids, table.dtype if dtype is None else dtype)
    rows = table[ids]
    return rows if dtype is None else rows.astype(dtype)


def dense(kernel: Kernel) -> jax.Array:
    """Returns the kernel as one float32 array."""
    return kernel.dense() if isinstance(kernel, Node) else jnp.asarray(kernel, jnp.float32)
