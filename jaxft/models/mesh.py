"""What a model says of where its arrays lie on the devices of the mesh that it is traced for; on no mesh, nothing."""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_T = TypeVar("_T")
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that share the rows of a batch


def fitted(mesh: Mesh | AbstractMesh, spec: P, shape: tuple[int, ...]) -> NamedSharding:
    """Returns where an array lies by `spec`; an axis that devices can't share evenly is whole on each of them.

    >>> tuple(fitted(AbstractMesh((1, 2, 1), AXES), P("fsdp", "fsdp"), (4, 3)).spec)
    ('fsdp', None)
    """

    def divides(axis: Any, size: int) -> bool:
        names = axis if isinstance(axis, tuple) else (axis,)
        return axis is not None and size % int(np.prod([mesh.shape[name] for name in names])) == 0

    return NamedSharding(mesh, P(*(axis if divides(axis, size) else None for axis, size in zip(spec, shape, strict=False))))


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
