"""Which kernels of a model are held in few bits, and in what form: chosen by patterns, or as the model's files have them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError
from jaxft.hub.bitsandbytes_config import format_of, is_converted
from jaxft.hub.names import tensors_of
from jaxft.methods.kernels import chosen_kernels, is_kernel, wrap
from jaxft.methods.partition import first_match
from jaxft.models.mesh import fitted
from jaxft.models.node import Around, is_node, is_quantized
from jaxft.models.segments import Leaf, leaves
from jaxft.quant.blockwise import Format, quantize

Params = dict[str, Any]
PATTERNS = ("layers",)  # every linear layer but the output head, as bitsandbytes and QLoRA (arXiv:2305.14314) choose
FIELD = "config.model.quantized"  # what messages call the patterns


def quantized(params: Params, format: Format | None, patterns: Sequence[str] = PATTERNS) -> Params:
    """Returns `params` with the linear kernels that `patterns` choose in `format`.

    Where layers differ in what is quantized, they are grouped anew. Raises `UserError` for a pattern that matches nothing, for
    parameters that hold a method's nodes, and for kernels that are quantized otherwise already.

    Args:
      params: plain nested dicts of arrays, or of their shapes under `jax.eval_shape`.
      format: of the kernels; None leaves `params` as they are.
      patterns: of kernels, as a method's targets.
    """
    if format is None:
        return params
    wanted = chosen(params, format, patterns)
    held = [leaf for leaf in leaves(params, is_leaf=is_node) if isinstance(leaf.value, Around)]
    if held:
        raise UserError(f"{held[0].names[0]} holds {type(held[0].value).__name__}, a method's. Quantize the base first, then method.init.")
    check_same(wanted, formats_of(params), "The model")
    return in_formats(params, wanted)


def in_formats(params: Params, formats: Mapping[str, Format]) -> Params:
    """Returns `params` with each kernel that `formats` names in its format; one that is quantized already stays as it is."""

    def held(leaf: Leaf) -> Any:
        return leaf.value if is_quantized(leaf.value) else _quantize(leaf.value, formats[leaf.names[0]])

    return wrap(params, formats.get, held)


def _quantize(kernel: Any, format: Format) -> Any:
    """Computed on the host, where nothing is compiled for it and no bit differs, and put where the kernel lay; traced, for its shapes."""
    if isinstance(kernel, jax.core.Tracer):
        return quantize(kernel, format)
    made = quantize(np.asarray(jax.device_get(kernel)), format)
    where = getattr(kernel, "sharding", None)
    if not isinstance(where, NamedSharding):
        return jax.device_put(made, where)
    spec = (*where.spec, *[None] * (kernel.ndim - len(where.spec)))
    places = jax.tree.map(
        lambda part, value: fitted(where.mesh, P(*spec[:-2], *part), value.shape),
        made.placement(P(*spec[-2:])),
        made,
        is_leaf=lambda value: isinstance(value, P),
    )
    return jax.device_put(made, places)


def formats_of(params: Params) -> dict[str, Format]:
    """Returns the format of each kernel that is quantized, whatever a method put around it, by our names."""
    held = [leaf for leaf in leaves(params, is_leaf=is_quantized) if is_quantized(leaf.value)]
    return {name: leaf.value.format for leaf in held for name in leaf.names}


def shapes_in_formats(shapes: Params, formats: Mapping[str, Format]) -> Params:
    """Returns the shapes of a model whose kernels are in `formats`."""
    return jax.eval_shape(lambda params: in_formats(params, formats), shapes) if formats else shapes


def chosen(shapes: Params, format: Format | None, patterns: Sequence[str]) -> dict[str, Format]:
    """Returns the format of each kernel that `patterns` choose, by our names."""
    return {} if format is None else dict.fromkeys(chosen_kernels(shapes, patterns, FIELD), format)


def configured(model: Any, shapes: Params, config: Mapping[str, Any], block_size: int) -> dict[str, Format]:
    """Returns the format of each kernel, by our names, that a quantization_config says is quantized, in blocks of that size.

    The head of a task is never quantized there.
    """
    kernels = [entry for entry in tensors_of(model, shapes) if is_kernel(entry.leaf) and first_match(model.head, entry.path) is None]
    held = [entry for entry in kernels if is_converted(config, entry.module)]
    return {entry.path: format_of(config, block_size) for entry in held}


def check_same(wanted: Mapping[str, Format], held: Mapping[str, Format], name: str) -> None:
    """Raises `UserError` where a model that is quantized already is wanted in another form than it has."""
    for kernel, format in wanted.items():
        if kernel in held and held[kernel] != format:
            raise UserError(
                f"{name} is quantized already: {kernel} is in {_described(held[kernel])}, not {_described(format)}. Take it as it is "
                "(config.model.quantization=none), or pass the model in full precision."
            )


def _described(format: Format) -> str:
    double = "with" if format.double_quantization else "without"
    return f"{format.code}, blocks of {format.block_size}, {double} double quantization"
