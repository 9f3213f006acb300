"""What a model says of where its arrays lie on the devices of the mesh that it is traced for; on no mesh, nothing."""

from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P

_T = TypeVar("_T")
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that share the rows of a batch


def by_rows(x: jax.Array) -> jax.Array:
    """Returns activations (tokens, features), each device with those of its own rows.

    The weights' placement alone leaves the choice to XLA, which may split features instead: every device would compute all rows.
    """
    shape = _shape()
    return jax.lax.with_sharding_constraint(x, P(ROWS)) if shape and x.shape[0] % (shape["data"] * shape["fsdp"]) == 0 else x


def gathered(stored: _T) -> _T:
    """Returns the arrays that a kernel is stored as, whole on every device where devices share weights and no product.

    What is made of them is made after that: codes of a few bits go over the wire, not the dense kernel.
    """
    shape = _shape()
    if not shape or shape["fsdp"] == 1 or shape["tensor"] > 1:
        return stored
    whole: _T = jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), stored)
    return whole


def _shape() -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh.shape
