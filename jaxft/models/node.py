"""Kernel nodes: pytrees that stand where an array could, and know how to multiply.

Models multiply through `dot` and look words up through `take`; they never ask what stands in a parameter's place. A method or a
number format brings its own subclass of `Node`, and nodes nest: a LoRA around a quantized kernel.
"""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Kernel = Any  # jax.Array of shape (in, out), or a Node that acts like one
_LONGEST_SUM = 1024  # terms; SmolLM2's first token, with 1536, was 1.4e-4 off in its logits
BASE = "base"  # the field of a node that holds what it wraps; listings and patterns leave it out of names


class Node(abc.ABC):
    """A kernel of shape (in, out) that isn't one array. Leaves of a stacked node have a leading layer axis."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Returns x (tokens, in) times the kernel, (tokens, out), in x's type; `rng` draws dropout, None is none."""

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


def node(cls: type) -> Any:
    """Class decorator: makes `cls` a frozen dataclass that is a pytree, every field a child."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    return functools.partial(jax.tree_util.register_dataclass, meta_fields=[])(cls, [field.name for field in dataclasses.fields(cls)])


def is_node(value: Any) -> bool:
    """Returns whether `value` is a kernel node."""
    return isinstance(value, Node)


def dot(x: jax.Array, kernel: Kernel, rng: jax.Array | None = None) -> jax.Array:
    """Returns x (tokens, in) times kernel (in, out): (tokens, out) in x's type."""
    if isinstance(kernel, Node):
        return kernel.dot(x, rng)
    return _product(x, kernel.astype(x.dtype))


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel. On CPU, where XLA adds a long row of float32 products one by one, as a few sums: a third of the rounding error."""
    parts = -(-kernel.shape[0] // _LONGEST_SUM) if x.dtype == jnp.float32 and jax.default_backend() == "cpu" else 1
    size = -(-kernel.shape[0] // parts)
    pieces = [x[:, start : start + size] @ kernel[start : start + size] for start in range(0, kernel.shape[0], size)]
    return functools.reduce(jnp.add, pieces)


def dense(kernel: Kernel) -> jax.Array:
    """Returns the kernel as one float32 array."""
    return kernel.dense() if isinstance(kernel, Node) else jnp.asarray(kernel, jnp.float32)
