"""How much each weight matters to the loss, by gradients of a few training batches: what methods choose weights by."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.methods.kernels import is_kernel
from jaxft.methods.partition import combine, partition
from jaxft.methods.sparse_mask import scores_from_gradient
from jaxft.models import segments
from jaxft.models.node import dense, is_node
from jaxft.models.segments import Leaf


def gradient_scores(model: nn.Module, task: Any, batches: Iterable[Any], params: Any, chosen: Callable[[str], bool], choice: str) -> Any:
    """Returns each chosen kernel's scores, float32, in the structure of `params`, None elsewhere.

    Args:
      model: as `load_pretrained` gives it.
      task: whose loss counts.
      batches: of (batch, length) arrays, as the task takes them; one gradient each, of the mean over its scored tokens.
      params: a node in a kernel's place is scored as the kernel that it acts as.
      chosen: whether the kernel of a name is wanted; a stored kernel is scored in all its layers where one of them is.
      choice: `gradient`, the size of the mean gradient; `fisher`, the mean of its square, the diagonal of the Fisher information of
        the data (Sung et al. 2021, arXiv:2111.09839).
    """

    def wanted(leaf: Leaf) -> bool:
        return is_kernel(leaf) and any(map(chosen, leaf.names))

    plain = segments.map_leaves(lambda leaf: dense(leaf.value) if wanted(leaf) else leaf.value, params, is_leaf=is_node)
    scored, rest = partition(plain, segments.map_leaves(wanted, plain))

    @jax.jit
    def add(total: Any, scored: Any, rest: Any, batch: Any) -> Any:
        def mean(scored: Any) -> jax.Array:
            sums = task.sums(model, combine(scored, rest), batch, {})
            return sums.loss / jnp.maximum(sums.weight, 1e-9)

        return jax.tree.map(jnp.add, total, scores_from_gradient(jax.grad(mean)(scored), choice))

    total, count = jax.tree.map(jnp.zeros_like, scored), 0
    for batch in batches:
        total, count = add(total, scored, rest, batch), count + 1
    return jax.tree.map(lambda leaf: jnp.abs(leaf) / max(count, 1), total)
