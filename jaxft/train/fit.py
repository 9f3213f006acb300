"""Whether a method fits a model, and what of it there is to write: by shapes alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError
from jaxft.hub.load import OriginalKernels
from jaxft.hub.peft import adapter_format, has_form
from jaxft.methods.base import Compose, Material, Method
from jaxft.methods.head import with_head
from jaxft.methods.kernels import is_kernel
from jaxft.methods.partition import trainable_leaves
from jaxft.models.node import dense, is_node
from jaxft.models.segments import Leaf, map_leaves
from jaxft.train.state import key_for


def fit_method(method: Method, model: Any, shapes: Any, seed: int, kernels: OriginalKernels | None = None) -> tuple[Method, Any]:
    """Returns the method that trains the model's head too, and the model's shapes with its leaves; arguments as `check_method`."""
    found = check_method(method, model, shapes, seed, kernels)
    whole = with_head(method, model, found)
    return whole, found if whole is method else check_method(whole, model, shapes, seed, kernels)


def check_method(method: Method, model: Any, shapes: Any, seed: int, kernels: OriginalKernels | None = None) -> Any:
    """Returns the model's shapes with the method's leaves; raises `UserError` where the method doesn't fit the model, by these alone.

    `kernels` are those of the model's files, for methods that start from them.
    """
    arrays: list[int] = []

    def like(params: Any, chosen: Callable[[str], bool], *_: Any) -> Any:  # in the place of scores
        def score(leaf: Leaf) -> Any:
            return dense(leaf.value) if is_kernel(leaf) and any(map(chosen, leaf.names)) else None

        return map_leaves(score, params, is_leaf=is_node)

    def zeros(name: str) -> Any:
        assert kernels is not None
        return jnp.zeros(kernels.shape(name))

    def begin(params: Any) -> Any:
        params = method.begin(key_for(seed, "method"), model, params, Material(like, zeros))
        arrays.extend(map(id, jax.tree.leaves(params)))
        return params

    params = jax.eval_shape(begin, shapes)
    # What is one array in several places stays one.
    shape_of = dict(zip(arrays, jax.tree.leaves(params), strict=True))
    params = jax.tree.unflatten(jax.tree.structure(params), [shape_of[array] for array in arrays])
    trainable_leaves(params, method.mask(params))
    parts = method.methods if isinstance(method, Compose) else (method,)
    nowhere = None in map(adapter_format, parts) and not can_merge(method, model, params)
    if nowhere and not (model.head and adapter_format(method) and has_form(model, params, method)):  # an adapter and the task's head
        raise UserError(
            f"What {method.title} trains could be written nowhere: it can't be merged, and not all of it has an adapter's form. "
            "Leave a part of it out."
        )
    return params


def can_merge(method: Method, model: Any, params: Any) -> bool:
    """Returns whether a method can be folded into the base, by shapes alone."""
    try:
        jax.eval_shape(lambda params: method.merge(model, params), params)
    except UserError:
        return False
    return True
