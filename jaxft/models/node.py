"""Kernel nodes: pytrees that stand where an array could, and know how to multiply.

Models multiply through `dot` and look words up through `take`; they never ask what stands in a parameter's place. A method or a
number format brings its own subclass of `Node`, and nodes nest: a LoRA around a quantized kernel.
"""

import abc
import dataclasses
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


def node(cls: type[_T]) -> type[_T]:
    """Class decorator: makes a frozen dataclass, and of it a pytree, every field a child."""
    cls = cls if dataclasses.is_dataclass(cls) else dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return jax.tree_util.register_dataclass(cls, names, [])


def is_node(value: Any) -> bool:
    """Returns whether `value` is a kernel node."""
    return isinstance(value, Node)


def dot(x: jax.Array, kernel: Kernel, rng: jax.Array | None = None) -> jax.Array:
    """Returns x (tokens, in) times kernel (in, out): (tokens, out) in x's type."""
    if isinstance(kernel, Node):
        return kernel.dot(x, rng)
    return x @ kernel.astype(x.dtype)


def dense(kernel: Kernel) -> jax.Array:
    """Returns the kernel as one float32 array."""
    return kernel.dense() if isinstance(kernel, Node) else jnp.asarray(kernel, jnp.float32)
