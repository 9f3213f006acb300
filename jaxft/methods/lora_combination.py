"""Weighted combinations of LoRA adapters of one base, as peft's add_weighted_adapter makes them."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.errors import UserError, unknown
from jaxft.methods.kernels import key_of
from jaxft.methods.lora import LoRA, LoRAKernel
from jaxft.models import segments
from jaxft.models.node import is_node

Params = dict[str, Any]
CAT, SVD = "cat", "svd"
RULES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # on lora_a and lora_b each; with _svd, on their products
HOW = (CAT, SVD, *RULES, *(f"{rule}_{SVD}" for rule in RULES[1:]))
SIGNS = ("total", "frequency")


def combine_adapters(
    model: nn.Module,
    base: Params,
    adapters: Sequence[tuple[Params, LoRA]],
    weights: Sequence[float],
    how: str = "linear",
    density: float = 1.0,
    sign: str = "total",
    rank: int = 0,
    rng: jax.Array | None = None,
) -> tuple[Params, LoRA]:
    """Returns one adapter that stands for several, parameters and method as `load_adapter` gives them.

    Args:
      model: the base model.
      base: its parameters.
      adapters: each on `base`; a kernel that only some of them have takes those.
      weights: one an adapter, of either sign.
      how: cat is exact, its rank the sum of ranks; svd is the nearest of `rank` to the exact sum; linear, on lora_a and lora_b each, is
        rough; ties prunes and elects signs (Yadav et al. 2023, arXiv:2306.01708), dare_linear and dare_ties drop at random and scale up
        (Yu et al. 2023, arXiv:2311.03099), magnitude_prune keeps the largest; with _svd, these act on the products.
      density: the share of values that pruning leaves.
      sign: how ties elects: by total size, or by frequency.
      rank: of svd, and of what acts on products; 0 is the largest of the adapters.
      rng: what DARE drops.

    Raises:
      UserError: adapters that can't be added, of unequal ranks where lora_a and lora_b are added, or that trained more than their LoRA;
        weights that aren't finite; an unknown `how`, and settings that it doesn't have.
    """
    if not adapters or len(adapters) != len(weights):
        raise UserError(f"There are {len(adapters)} adapters and {len(weights)} weights; there must be one weight an adapter.")
    if not np.isfinite(np.asarray(weights, np.float64)).all():
        raise UserError(f"The weights of adapters are finite numbers, not {list(weights)}.")
    _check_settings(how, density, sign, rank, rng)
    kernels = [low_rank_kernels(params) for params, _ in adapters]
    for number, (params, _) in enumerate(adapters):
        check_rest(base, params, number)
    for found in kernels:
        for name, kernel in found.items():
            if rank > (smaller := min(kernel.lora_a.shape[0], kernel.lora_b.shape[1])):
                raise UserError(f"rank is {rank}; {name} is of {smaller} on its smaller side, and has no larger rank.")
    names = list(dict.fromkeys(name for found in kernels for name in found))
    method = _method(names, kernels, how, rank)
    settings = (how, density, sign, method.rank)
    params = method.added(jax.random.key(0), model, base)

    def fill(leaf: segments.Leaf) -> Any:
        if not isinstance(leaf.value, LoRAKernel):
            return leaf.value
        sides = []
        for name in leaf.names:
            held = [(found[name], weight) for found, weight in zip(kernels, weights, strict=True) if name in found]
            sides.append(_combined(held, settings, None if rng is None else key_of(rng, name)))
        lora_a, lora_b = (jnp.stack(side) for side in zip(*sides, strict=True))
        if leaf.layers is None:
            lora_a, lora_b = lora_a[0], lora_b[0]
        return dataclasses.replace(leaf.value, lora_a=lora_a, lora_b=lora_b)

    return segments.map_leaves(fill, params, is_leaf=is_node), method


def _check_settings(how: str, density: float, sign: str, rank: int, rng: jax.Array | None) -> None:
    if how not in HOW:
        raise unknown("way to combine adapters", how, HOW)
    if sign not in SIGNS:
        raise unknown("way to elect signs", sign, SIGNS)
    if how.startswith("dare") and rng is None:
        raise UserError(f"'{how}' drops at random: give it rng, a key.")
    if not 0.0 <= density <= 1.0:
        raise UserError(f"density is a share from 0 to 1, not {density}.")
    if density < 1.0 and how in (CAT, SVD, "linear"):
        raise UserError(f"density is for what prunes: '{how}' leaves every value. Use {', '.join(RULES[1:])}.")
    if rank < 0 or (rank and not how.endswith(SVD)):
        raise UserError(f"rank is {rank}, which is for svd alone, 1 or more: that of '{how}' follows from the adapters'.")


def low_rank_kernels(params: Params) -> dict[str, LoRAKernel]:
    """Each layer's LoRA by its kernel's name, without the base; raises `UserError` for what is more than a low-rank difference."""
    found = {}
    for leaf in segments.leaves(params, is_leaf=is_node):
        if not isinstance(leaf.value, LoRAKernel):
            continue
        if leaf.value.magnitude is not None:
            raise UserError(f"{leaf.title} is a DoRA, which can't be added to others. Merge it into the base instead.")
        if leaf.value.lora_bias is not None:
            raise UserError(f"{leaf.title} has a lora_bias, which can't be added to others. Merge it into the base instead.")
        if leaf.value.start_a is not None:
            raise UserError(f"{leaf.title} took a part of the base. Save the adapter and load it again: then it fits the original base.")
        own = dataclasses.replace(leaf.value, base=None)
        for index, name in enumerate(leaf.names):
            found[name] = own if leaf.layers is None else jax.tree.map(lambda part, i=index: part[i], own)
    if not found:
        raise UserError("One of the adapters holds no LoRA.")
    return found


def check_rest(base: Params, params: Params, number: int) -> None:
    """Raises `UserError` unless an adapter's parameters are the base's, but for its LoRA."""
    found, expected = _by_name(jax.tree.map(_without, params, is_leaf=is_node)), _by_name(base)
    for name in [*sorted(found.keys() ^ expected.keys()), *expected]:
        if name not in found or name not in expected or not _same(found[name], expected[name]):
            raise UserError(
                f"Adapter {number}: {name} isn't what the base has. Adapters that are mixed or combined share the base and "
                "differ in their LoRA alone: load each on this base, and leave out those that trained anything else."
            )


def _without(value: Any) -> Any:
    return value.base if isinstance(value, LoRAKernel) else value


def _by_name(params: Params) -> dict[str, tuple[Any, int | None]]:
    """Each stored array and the layer's place in it, by the name of the layer's part."""
    found = {}
    for leaf in segments.leaves(params):
        for place, name in enumerate(leaf.names):
            found[name] = (leaf.value, None if leaf.layers is None else place)
    return found


def _same(one: tuple[Any, int | None], other: tuple[Any, int | None]) -> bool:
    if one[0] is other[0] and one[1] == other[1]:
        return True
    left, right = (array if place is None else array[place] for array, place in (one, other))
    return left.shape == right.shape and left.dtype == right.dtype and bool(jnp.array_equal(left, right))


def _method(names: list[str], kernels: list[dict[str, LoRAKernel]], how: str, rank: int) -> LoRA:
    ranks = [max(kernel.lora_a.shape[-1] for kernel in found.values()) for found in kernels]
    every = {kernel.lora_a.shape[-1] for found in kernels for kernel in found.values()}
    if how in RULES and len(every) > 1:
        raise UserError(f"'{how}' adds adapters of one rank; these have {sorted(every)}. Use cat, or svd.")
    if how == CAT:
        rank = sum(ranks)
    elif how in RULES or not rank:
        rank = max(ranks)
    return LoRA(rank=rank, alpha=float(rank), targets=tuple(re.escape(name.rpartition("/")[0]) for name in names))


def _combined(held: list[tuple[LoRAKernel, float]], settings: tuple[str, float, str, int], rng: Any) -> tuple[jax.Array, jax.Array]:
    """lora_a (in, rank) and lora_b (rank, out) of one kernel, at scale 1."""
    how, density, sign, rank = settings
    scales = [weight * float(kernel.scale) for kernel, weight in held]
    if how == CAT:
        lora_a = jnp.concatenate([scale * kernel.lora_a for (kernel, _), scale in zip(held, scales, strict=True)], axis=1)
        lora_b = jnp.concatenate([kernel.lora_b for kernel, _ in held], axis=0)
        return _padded(lora_a, lora_b, rank)
    if how.endswith(SVD):
        products = [kernel.scale * jnp.matmul(kernel.lora_a, kernel.lora_b, precision="highest") for kernel, _ in held]
        rule = how.removesuffix(f"_{SVD}") if how != SVD else "linear"
        whole = _mixed(rule, products, jnp.asarray([weight for _, weight in held], jnp.float32), density, sign, rng)
        u, values, v = jnp.linalg.svd(whole.T, full_matrices=False)  # as peft's (out, in)
        return _padded(v[:rank].T, (u[:, :rank] * values[:rank]).T, rank)
    root = jnp.sqrt(jnp.abs(jnp.asarray(scales, jnp.float32)))
    keys = (None, None) if rng is None else jax.random.split(rng)
    signed = root * jnp.where(jnp.asarray(scales) >= 0, 1.0, -1.0).astype(jnp.float32)  # the sign on one side only
    lora_a = _mixed(how, [kernel.lora_a for kernel, _ in held], signed, density, sign, keys[0])
    return lora_a, _mixed(how, [kernel.lora_b for kernel, _ in held], root, density, sign, keys[1])


def _padded(lora_a: jax.Array, lora_b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    more = rank - lora_a.shape[1]
    return jnp.pad(lora_a, ((0, 0), (0, more))), jnp.pad(lora_b, ((0, more), (0, 0)))


def _mixed(rule: str, arrays: list[jax.Array], weights: jax.Array, density: float, sign: str, rng: Any) -> jax.Array:
    """The weighted sum of arrays of one shape, each pruned first as the rule has it."""
    if density < 1.0 and rule.startswith("dare"):
        keys = jax.random.split(rng, len(arrays))
        arrays = [_dropped(array, density, key) for array, key in zip(arrays, keys, strict=True)]
    elif density < 1.0 and rule != "linear":
        arrays = [_largest(array, density) for array in arrays]
    stacked = jnp.stack(arrays)
    weighted = stacked * weights[:, None, None]
    if not rule.endswith("ties"):
        return jnp.sum(weighted, axis=0)
    elected = jnp.sum(stacked if sign == "total" else jnp.sign(stacked), axis=0) >= 0
    agrees = jnp.sign(stacked) == jnp.where(elected, 1.0, -1.0)
    return jnp.sum(jnp.where(agrees, weighted, 0.0), axis=0) / jnp.maximum(jnp.sum(agrees, axis=0), 1).astype(jnp.float32)


def _dropped(array: jax.Array, density: float, rng: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(rng, density, array.shape), array / density, 0.0) if density else jnp.zeros_like(array)


def _largest(array: jax.Array, density: float) -> jax.Array:
    """The array with all but its largest values zero."""
    flat = array.ravel()
    kept = jax.lax.top_k(jnp.abs(flat), int(density * flat.size))[1]
    return jnp.zeros_like(flat).at[kept].set(flat[kept]).reshape(array.shape)
