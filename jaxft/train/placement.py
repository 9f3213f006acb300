"""Placement is data: one mesh (data, fsdp, tensor), one table of path pattern -> PartitionSpec a family."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import TrainConfig
from jaxft.errors import UserError
from jaxft.methods.partition import first_match
from jaxft.models import segments
from jaxft.models.layers import HOST_MEMORY
from jaxft.models.mesh import AXES, ROWS, fitted
from jaxft.models.node import Shared, is_node, is_shared, is_site
from jaxft.objectives.base import Objective
from jaxft.train.moments import is_8bit
from jaxft.train.state import State

BATCH = P(None, ROWS)  # (accumulation, batch, ...)
EVALUATION_BATCH = P(ROWS)  # (batch, ...)
_T = TypeVar("_T")
Table = Sequence[tuple[str, P]]


def make_mesh(config: TrainConfig, count: int | None = None) -> Any:
    """Returns the mesh of all devices, or for a plan an abstract one of `count`.

    Raises `UserError` where its sides don't multiply to their number.
    """
    sides = [config.data_parallel, config.fsdp_parallel, config.tensor_parallel]
    devices = jax.devices() if count is None else range(count)
    known = int(np.prod([side for side in sides if side != -1]))
    if sides.count(-1) > 1 or any(side < 1 and side != -1 for side in sides) or len(devices) % known:
        raise UserError(f"{len(devices)} devices can't form a mesh of train.data_parallel x fsdp_parallel x tensor_parallel = {sides}.")
    sides = [len(devices) // known if side == -1 else side for side in sides]
    if int(np.prod(sides)) != len(devices):
        raise UserError(
            f"A mesh of train.data_parallel x fsdp_parallel x tensor_parallel = {sides} takes {int(np.prod(sides))} devices; "
            f"there are {len(devices)}. Set one of them to -1 to use them all."
        )
    rows = sides[0] * sides[1]
    for name, size in {"batch_size": config.batch_size, "unlabelled_batch_size": config.unlabelled_batch_size}.items():
        if size % rows:
            raise UserError(f"train.{name} is {size} rows, which {rows} devices (data x fsdp) can't share evenly.")
    return Mesh(np.asarray(devices).reshape(sides), AXES) if count is None else AbstractMesh(tuple(sides), AXES)


def on_mesh(function: Callable[..., _T], mesh: Mesh) -> Callable[..., _T]:
    """Returns the function, to be jitted, of a model that says on this mesh where its activations lie."""

    def placed(*arguments: Any) -> _T:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return placed


def shardings(params: Any, table: Table, mesh: Mesh) -> Any:
    """Returns a NamedSharding for each leaf; raises `ValueError` for a leaf that no pattern of the table covers."""

    def kernel(leaf: segments.Leaf) -> Any:
        found = first_match([pattern for pattern, _ in table], leaf.names[0])
        if found is None:
            raise ValueError(f"The placement table covers no '{leaf.names[0]}'.")
        spec = table[found][1]
        return leaf.value.placement(spec) if is_node(leaf.value) else spec

    def place(leaf: segments.Leaf) -> Any:
        specs = leaf.value.placement() if is_site(leaf.value) else kernel(leaf)
        stacked = leaf.layers is not None

        def fit(spec: Any, value: Any) -> Any:
            if is_shared(value):
                held: Any = fitted(mesh, spec.value, value.value.shape)
                return Shared(held)
            return fitted(mesh, P(None, *spec) if stacked else spec, value.shape)

        return jax.tree.map(fit, specs, leaf.value, is_leaf=lambda value: isinstance(value, P) or is_shared(value))

    return segments.map_leaves(place, params, is_leaf=is_node)


def place(params: Any, places: Any) -> Any:
    """Returns `params` on the devices; an array that stands in several places is put there once, and stays one array."""
    put: dict[tuple[int, NamedSharding], jax.Array] = {}

    def once(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if (found := put.get((id(leaf), sharding))) is None:
            found = put[id(leaf), sharding] = jax.device_put(leaf, sharding)
        return found

    return jax.tree.map(once, params, places)


def state_shardings(
    state: State,
    trainable: Any,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    offload: bool = False,
    objective: Objective | None = None,
) -> Any:
    """Returns the state's shardings: moments and average lie where their parameters do, the objective's arrays where it says, everything
    else is on every device.

    With `offload` the optimizer's arrays lie in the memory of each device's host.
    """
    everywhere: Any = NamedSharding(mesh, P())

    def beside(moment: Any, parameter: NamedSharding) -> Any:
        return moment.placement(parameter) if is_8bit(moment) else parameter

    moments = optax.tree_utils.tree_map_params(
        optimizer, beside, state.optimizer, trainable, transform_non_params=lambda _: everywhere, is_leaf=is_8bit
    )
    moments = jax.tree.map(lambda sharding, leaf: sharding if len(sharding.spec) <= leaf.ndim else everywhere, moments, state.optimizer)
    if offload:
        moments = jax.tree.map(lambda place, leaf: place.with_memory_kind(HOST_MEMORY) if leaf.ndim else place, moments, state.optimizer)
    own = None if objective is None else objective.places(state.objective, trainable, everywhere)
    return State(everywhere, trainable, moments, None if state.average is None else trainable, own)


def in_device_memory(places: Any) -> Any:
    """Returns the same shardings in the devices' own memory."""
    return jax.tree.map(lambda place: place.with_memory_kind(None), places)


def is_in_host_memory(leaf: Any) -> bool:
    """Returns whether an array, or what stands for one, lies in the host's memory."""
    return leaf.sharding.memory_kind == HOST_MEMORY


def check_host_memory(field: str) -> None:
    """Raises `UserError` where devices can't use the host's memory, which `field` asks for."""
    device = jax.local_devices()[0]
    if HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(f"{field}: {device.device_kind} ({device.platform}) can't hold arrays in its host's memory. Leave it out.")


def place_batch(batch: Mapping[str, Any], mesh: Mesh, spec: P) -> dict[str, Any]:
    """Returns the batch on the devices; each process hands over its own part of the same global arrays."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda value: jax.make_array_from_callback(value.shape, sharding, value.__getitem__), dict(batch))
