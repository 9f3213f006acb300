"""Pre-trained models from files: tensor by tensor, each one accounted for."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.errors import UserError, unknown
from jaxft.hub import sources
from jaxft.hub.bitsandbytes_config import BLOCK_SIZE
from jaxft.hub.bitsandbytes_folder import BitsandbytesFolder
from jaxft.hub.checkpoint import QUANTIZATION, Checkpoint, Renamed, SafetensorsFolder, architecture_of, read_config
from jaxft.hub.gguf_file import GGUFFile
from jaxft.hub.names import EMBEDDING, HEAD, Entry, entries, listed
from jaxft.hub.quantized import PATTERNS, check_same, chosen, configured, shapes_in_formats
from jaxft.models.node import is_node, is_quantized
from jaxft.models.registry import Family, family_of
from jaxft.models.segments import Leaf, leaves
from jaxft.quant.blockwise import Format, QuantizedKernel, quantize

Params = dict[str, Any]
TASKS = ("causal_lm",)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_ALIGNMENT = 64  # bytes, XLA's for buffers


Placing = Callable[[Params, Any], Params]  # (shapes, the family's placement table) -> a Sharding for each leaf


def load_pretrained(
    source: str,
    task: str = "causal_lm",
    dtype: Any = "float32",
    revision: str = "main",
    placing: Placing | None = None,
    quantization: Format | None = None,
    quantized: Sequence[str] = PATTERNS,
) -> tuple[nn.Module, Params]:
    """Returns a pre-trained model and its parameters, plain nested dicts with all layers stacked in one segment.

    Host memory stays near one copy of the model as it is held and its largest leaf; with `placing`, a device holds its own share only.
    A quantized kernel is quantized as soon as it is read, one layer's at a time, from `dtype`, as transformers does with bitsandbytes.

    Args:
      source: hub id, local folder, `.gguf` file, or `bundled:NAME`. A folder of bitsandbytes' 4-bit weights is taken as it is.
      task: causal_lm.
      dtype: of computation and parameters: float32, bfloat16, float16; auto is float32 on CPU and bfloat16 on accelerators.
      revision: branch, tag or commit of a hub id.
      placing: says on which devices each leaf lies; None is the default device.
      quantization: the format that kernels are held in; None is as the files have them.
      quantized: patterns of the kernels that are quantized; layers: every linear layer but the output head. Layers that differ in it are
        segments of their own.

    Raises:
      UserError: nothing there, no access, files that are broken, pickled, of an architecture jaxft hasn't, or that lack tensors, have some
        left over or of another shape; a pattern that matches nothing; a model that is quantized otherwise already.

    >>> model, params = load_pretrained("bundled:smollm2-135m-instruct")
    >>> params["layers"]["0-29"]["attention"]["q_proj"]["kernel"].shape
    (30, 576, 576)
    """
    _check_options(task, dtype, quantization)
    model, family, checkpoint, name = _open(source, dtype, revision)
    shapes = _shapes(model)
    stored = _stored(checkpoint)
    held = {entry.path: stored[entry.name] for entry in entries(family.module, shapes) if entry.name in stored}
    formats = _formats(shapes, quantization, quantized, held, name)
    return model, fill(model, family, checkpoint, name, placing, formats)


def describe_pretrained(
    source: str,
    task: str = "causal_lm",
    dtype: Any = "float32",
    revision: str = "main",
    quantization: Format | None = None,
    quantized: Sequence[str] = PATTERNS,
) -> tuple[nn.Module, Params]:
    """Returns a pre-trained model and the shapes of its parameters, from its configuration alone: nothing else is downloaded or read.

    Arguments and errors are those of `load_pretrained`. What the files of a quantized model don't say in their configuration, the size of
    its blocks, is taken for that of `quantization`, or bitsandbytes' default.
    """
    _check_options(task, dtype, quantization)
    found = sources.find(source, revision, sources.CONFIG_FILES)
    config = GGUFFile(found.gguf).config if found.gguf else read_config(found)
    family, model = _model(config, found.name, dtype)
    shapes = _shapes(model)
    block_size = BLOCK_SIZE if quantization is None else quantization.block_size
    held = configured(family.module, shapes, config[QUANTIZATION], block_size) if QUANTIZATION in config else {}
    return model, shapes_in_formats(shapes, _formats(shapes, quantization, quantized, held, found.name))


class OriginalKernels:
    """The linear layers' kernels as a model's files hold them in full precision, read one at a time.

    >>> kernels = OriginalKernels("bundled:smollm2-135m-instruct")
    >>> kernels("layers/3/attention/q_proj/kernel").shape
    (576, 576)
    """

    def __init__(self, source: str, revision: str = "main") -> None:
        """Reads nothing yet; arguments are those of `load_pretrained`."""
        self._source, self._revision = source, revision

    def __call__(self, name: str) -> np.ndarray:
        """Returns the kernel of a name, (in, out), in the files' type; raises `UserError` for a model that is quantized in its files."""
        self.shape(name)
        checkpoint, kernels = self._opened
        return kernels[name].swap(checkpoint.read(kernels[name].name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns its shape, from the configuration alone; raises `UserError` as reading it does."""
        found = self._described[name]
        if is_quantized(found.value):
            raise UserError(
                f"'{self._source}' holds {name} in {found.value.format_name} alone, and what quantization lost of it is wanted. Pass the "
                "model in full precision, with config.model.quantization."
            )
        return found.shape

    @functools.cached_property
    def _described(self) -> dict[str, Leaf]:
        _, shapes = describe_pretrained(self._source, revision=self._revision)
        return {name: leaf for leaf in leaves(shapes, is_leaf=is_node) for name in leaf.names}

    @functools.cached_property
    def _opened(self) -> tuple[Checkpoint, dict[str, Entry]]:
        model, family, checkpoint, _ = _open(self._source, "float32", self._revision)
        return checkpoint, {entry.path: entry for entry in entries(family.module, _shapes(model))}


def _check_options(task: str, dtype: Any, quantization: Any = None) -> None:
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    compute_type(dtype)
    if not isinstance(quantization, Format | None):
        raise UserError(f'quantization is a jaxft.Format or None, not {quantization!r}: jaxft.Format("nf4") is QLoRA\'s.')


def _open(source: str, dtype: Any, revision: str) -> tuple[nn.Module, Family, Checkpoint, str]:
    found = sources.find(source, revision, sources.CONFIG_FILES + sources.WEIGHT_FILES + sources.TOKENIZER_FILES)
    checkpoint: Any = GGUFFile(found.gguf) if found.gguf else _folder(found)
    family, model = _model(checkpoint.config, found.name, dtype)
    prefix = getattr(family.module, "HF_PREFIX", "")
    if prefix and not any(name.startswith(prefix) for name in checkpoint.shapes):
        checkpoint = Renamed(checkpoint, _names_of_base(family, _shapes(model), checkpoint, prefix))
    return model, family, checkpoint, found.name


def _names_of_base(family: Family, shapes: Params, checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    """Names with the prefix of the model in its head, of files that were saved without one: theirs by ours."""
    wanted = {entry.name for entry in entries(family.module, shapes)}
    ignored = "|".join(family.module.HF_IGNORED)
    found = {prefix + name: name for name in checkpoint.shapes}
    return {name: theirs for name, theirs in found.items() if name in wanted or re.fullmatch(ignored, name)}


def _folder(found: sources.Source) -> Any:
    return BitsandbytesFolder(found) if QUANTIZATION in read_config(found) else SafetensorsFolder(found)


def _model(config: Mapping[str, Any], name: str, dtype: Any) -> tuple[Family, nn.Module]:
    compute = compute_type(dtype)
    family = family_of(architecture_of(config, name))
    plain = {key: value for key, value in config.items() if key != QUANTIZATION}  # how it was stored is no part of the model
    return family, family.model(family.config.from_hf(plain), dtype=compute)


def _stored(checkpoint: Checkpoint) -> Mapping[str, Format]:
    """The formats of a file's tensors, by its names."""
    return checkpoint.formats if isinstance(checkpoint, BitsandbytesFolder) else {}


def _formats(
    shapes: Params, quantization: Format | None, patterns: Sequence[str], held: Mapping[str, Format], name: str
) -> dict[str, Format]:
    """The format of each quantized kernel, by our names: what the files have, and what is asked for."""
    wanted = chosen(shapes, quantization, patterns)
    check_same(wanted, held, f"'{name}'")
    return wanted | dict(held)


def _shapes(model: nn.Module) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def compute_type(dtype: Any) -> Any:
    """Returns the type that a name stands for.

    >>> compute_type("bfloat16")
    dtype(bfloat16)
    """
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise unknown("dtype", name, [*DTYPES, "auto"])
    return jnp.dtype(DTYPES[name])


def fill(
    model: nn.Module, family: Family, checkpoint: Checkpoint, name: str, placing: Placing | None, formats: Mapping[str, Format]
) -> Params:
    """Returns the model's parameters, read leaf by leaf, kernels in `formats` by our names.

    Raises `UserError` where the checkpoint isn't exactly this model's.
    """
    shapes = shapes_in_formats(_shapes(model), formats)
    wanted = entries(family.module, shapes)
    _check(wanted, family, checkpoint, name)
    _check_tied(wanted, family, checkpoint, name)
    by_leaf: dict[tuple[str, ...], list[Entry]] = {}
    for entry in wanted:
        by_leaf.setdefault(entry.leaf.path, []).append(entry)
    places = (
        {} if placing is None else {leaf.path: leaf.value for leaf in leaves(placing(shapes, family.module.PLACEMENT), is_leaf=is_node)}
    )
    params: Params = {}
    for path, parts in by_leaf.items():
        inner = params
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = _read_leaf(parts[0].leaf, parts, checkpoint, places.get(path))
    return params


def _read_leaf(leaf: Leaf, parts: list[Entry], checkpoint: Checkpoint, place: Any) -> Any:
    """One leaf, or one quantized kernel, its layers written where they belong; on its devices before the next one is read."""
    host = jax.tree.map(lambda part: _empty(part.shape, np.dtype(part.dtype)), leaf.value)
    for entry in parts:
        layer = _read_quantized(entry, checkpoint) if is_quantized(leaf.value) else entry.swap(checkpoint.read(entry.name))
        for whole, part in zip(jax.tree.leaves(host), jax.tree.leaves(layer), strict=True):
            whole[... if entry.index is None else entry.index] = part
    if place is None:
        return jax.block_until_ready(jax.device_put(host))
    return jax.block_until_ready(
        jax.tree.map(lambda whole, sharding: jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__), host, place)
    )


def _read_quantized(entry: Entry, checkpoint: Checkpoint) -> QuantizedKernel:
    """One layer's kernel: its codes as the file has them, or quantized from the type that the model computes in."""
    like: QuantizedKernel = entry.leaf.value
    if isinstance(checkpoint, BitsandbytesFolder) and entry.name in checkpoint.formats:
        return checkpoint.read_quantized(entry.name)
    return quantize(entry.swap(checkpoint.read(entry.name)).astype(like.dtype), like.format)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at an address where jax, on CPU, takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _check(wanted: list[Entry], family: Family, checkpoint: Checkpoint, name: str) -> None:
    have = checkpoint.shapes
    names = {entry.name for entry in wanted}
    heads = {theirs for theirs, ours, _ in family.module.HF_NAMES if ours == HEAD}
    ignored = "|".join(family.module.HF_IGNORED)
    left = [other for other in have if other not in names | heads and not re.fullmatch(ignored, other)]
    quantized = _stored(checkpoint)  # bitsandbytes' are (out, in), whatever the layer's are in full precision
    shapes = {entry.name: entry.leaf.shape[::-1] if entry.name in quantized else entry.shape for entry in wanted}
    wrong = [f"{name} {have[name]} for {shape}" for name, shape in shapes.items() if have.get(name, shape) != shape]
    problems = []
    if missing := sorted(names - set(have)):
        problems.append(f"it lacks {listed(missing)}")
    if left:
        problems.append(f"it has tensors that the configuration has no place for: {listed(left)}")
    if wrong:
        problems.append(f"shapes differ from the configuration's: {listed(wrong)}")
    if problems:
        raise UserError(f"'{name}' isn't the model that its configuration describes: {'; '.join(problems)}.")


def _check_tied(wanted: list[Entry], family: Family, checkpoint: Checkpoint, name: str) -> None:
    """A file may hold the output head of a tied model too; then it must be the embedding."""
    theirs = {ours: name for name, ours, _ in family.module.HF_NAMES}
    head, embedding = theirs.get(HEAD), theirs.get(EMBEDDING)
    if head is None or embedding is None or head not in checkpoint.shapes or any(entry.name == head for entry in wanted):
        return
    if checkpoint.shapes[head] != checkpoint.shapes[embedding] or not np.array_equal(checkpoint.read(head), checkpoint.read(embedding)):
        raise UserError(
            f"'{name}' says tie_word_embeddings, but its {head} differs from {embedding}: it is an untied model. "
            "Set tie_word_embeddings to false in its config.json."
        )
