"""Pre-trained models from files: tensor by tensor, each one accounted for."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxft.errors import UserError, unknown
from jaxft.hub import sources
from jaxft.hub.checkpoint import Checkpoint, SafetensorsFolder, architecture_of, read_config
from jaxft.hub.gguf_file import GGUFFile
from jaxft.hub.names import Entry, entries, listed
from jaxft.models.registry import Family, family_of
from jaxft.models.segments import Leaf, leaves

Params = dict[str, Any]
TASKS = ("causal_lm",)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_ALIGNMENT = 64  # bytes, XLA's for buffers
EMBEDDING, HEAD = "embed/embedding", "lm_head/kernel"  # what a model with tied embeddings may store twice


Placing = Callable[[Params, Any], Params]  # (shapes, the family's placement table) -> a Sharding for each leaf


def load_pretrained(
    source: str, task: str = "causal_lm", dtype: Any = "float32", revision: str = "main", placing: Placing | None = None
) -> tuple[nn.Module, Params]:
    """Returns a pre-trained model and its parameters, plain nested dicts with all layers stacked in one segment.

    Host memory stays near one copy of the model in `dtype` and its largest leaf; with `placing`, a device holds its own share only.

    Args:
      source: hub id, local folder, `.gguf` file, or `bundled:NAME`.
      task: causal_lm.
      dtype: of computation and parameters: float32, bfloat16, float16; auto is float32 on CPU and bfloat16 on accelerators.
      revision: branch, tag or commit of a hub id.
      placing: says on which devices each leaf lies; None is the default device.

    Raises:
      UserError: nothing there, no access, files that are broken, pickled, of an architecture jaxft hasn't, or that lack tensors, have some
        left over or of another shape.

    >>> model, params = load_pretrained("bundled:smollm2-135m-instruct")
    >>> params["layers"]["0-29"]["attention"]["q_proj"]["kernel"].shape
    (30, 576, 576)
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    compute = compute_type(dtype)
    found = sources.find(source, revision, sources.CONFIG_FILES + sources.WEIGHT_FILES + sources.TOKENIZER_FILES)
    checkpoint: Any = GGUFFile(found.gguf) if found.gguf else SafetensorsFolder(found)
    family = family_of(architecture_of(checkpoint.config, found.name))
    model = family.model(family.config.from_hf(checkpoint.config), dtype=compute)
    return model, fill(model, family, checkpoint, found.name, placing)


def describe_pretrained(source: str, task: str = "causal_lm", dtype: Any = "float32", revision: str = "main") -> tuple[nn.Module, Params]:
    """Returns a pre-trained model and the shapes of its parameters, from its configuration alone: nothing else is downloaded or read.

    Arguments and errors are those of `load_pretrained`.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    found = sources.find(source, revision, sources.CONFIG_FILES)
    config = GGUFFile(found.gguf).config if found.gguf else read_config(found)
    family = family_of(architecture_of(config, found.name))
    model = family.model(family.config.from_hf(config), dtype=compute_type(dtype))
    return model, _shapes(model)


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


def fill(model: nn.Module, family: Family, checkpoint: Checkpoint, name: str, placing: Placing | None = None) -> Params:
    """Returns the model's parameters, read leaf by leaf; raises `UserError` where the checkpoint isn't exactly this model's."""
    shapes = _shapes(model)
    wanted = entries(family.module, shapes)
    _check(wanted, family, checkpoint, name)
    _check_tied(wanted, family, checkpoint, name)
    by_leaf: dict[tuple[str, ...], list[Entry]] = {}
    for entry in wanted:
        by_leaf.setdefault(entry.leaf.path, []).append(entry)
    places = {} if placing is None else {leaf.path: leaf.value for leaf in leaves(placing(shapes, family.module.PLACEMENT))}
    params: Params = {}
    for path, parts in by_leaf.items():
        inner = params
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = _read_leaf(parts[0].leaf, parts, checkpoint, places.get(path))
    return params


def _read_leaf(leaf: Leaf, parts: list[Entry], checkpoint: Checkpoint, place: jax.sharding.Sharding | None) -> jax.Array:
    """One leaf, its layers written where they belong; on its devices before the next one is read."""
    host = _empty(leaf.value.shape, np.dtype(leaf.value.dtype))
    for entry in parts:
        host[... if entry.index is None else entry.index] = entry.swap(checkpoint.read(entry.name))
    if place is None:
        return jax.block_until_ready(jax.device_put(host))
    return jax.block_until_ready(jax.make_array_from_callback(host.shape, place, host.__getitem__))


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
    wrong = [f"{entry.name} {have[entry.name]} for {entry.shape}" for entry in wanted if have.get(entry.name, entry.shape) != entry.shape]
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
