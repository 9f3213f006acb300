"""Pre-trained models from files: tensor by tensor, each one accounted for."""

import dataclasses
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
from jaxft.hub.checkpoint import QUANTIZATION, Checkpoint, SafetensorsFolder, architecture_of, read_config
from jaxft.hub.gguf_file import GGUFFile
from jaxft.hub.names import Entry, listed, tensors_of
from jaxft.hub.quantized import PATTERNS, check_same, chosen, configured, shapes_in_formats
from jaxft.hub.task import Aim, Task, aim, check_language_head, drawn_anew, in_file, second_names
from jaxft.models import heads
from jaxft.models.heads import CAUSAL_LM
from jaxft.models.node import is_node, is_quantized
from jaxft.models.registry import family_of
from jaxft.models.segments import Leaf, leaves, map_leaves
from jaxft.quant.blockwise import Format, QuantizedKernel, quantize

Params = dict[str, Any]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_ALIGNMENT = 64  # bytes, XLA's for buffers


Placing = Callable[[Params, Any], Params]  # (shapes, the family's placement table) -> a Sharding for each leaf


def load_pretrained(
    source: str,
    task: str = CAUSAL_LM,
    dtype: Any = "float32",
    revision: str = "main",
    placing: Placing | None = None,
    quantization: Format | None = None,
    quantized: Sequence[str] = PATTERNS,
    labels: Sequence[str] = (),
    problem_type: str = "",
    seed: int = 0,
    new_head: bool = False,
) -> tuple[nn.Module, Params]:
    """Returns a pre-trained model and its parameters, plain nested dicts with all layers stacked in one segment.

    Host memory stays near one copy of the model as it is held and its largest leaf; with `placing`, a device holds its own share only.
    A quantized kernel is quantized as soon as it is read, one layer's at a time, from `dtype`, as transformers does with bitsandbytes.

    The files may be of the bare model, of the task's own class, or of another task's: what they lack of the task's head, or have for
    other labels, is drawn anew. The head of a language model isn't, but for that of masked_lm where `new_head` asks for it.

    Args:
      source: hub id, local folder, `.gguf` file, or `bundled:NAME`. A folder of bitsandbytes' 4-bit weights is taken as it is.
      task: causal_lm, masked_lm, sequence_classification, token_classification, question_answering; a family has some of them.
        multiple_choice is causal_lm: choices are told apart by their likelihood.
      dtype: of computation and parameters: float32, bfloat16, float16; auto is float32 on CPU and bfloat16 on accelerators.
      revision: branch, tag or commit of a hub id.
      placing: says on which devices each leaf lies; None is the default device.
      quantization: the format that kernels are held in; None is as the files have them.
      quantized: patterns of the kernels that are quantized; layers: every linear layer but the output head. Layers that differ in it are
        segments of their own.
      labels: names of the classes by id, for the two classifications; empty is those of the files. The same names in another order are the
        files' head in the files' order: `model.config.labels` says what counts.
      problem_type: of sequence classification: single_label_classification, multi_label_classification, regression; empty is the files'.
      seed: of what is drawn anew.
      new_head: for masked_lm: where the files have no head, its transform is drawn (the product with the embedding, where the family ties
        the two, is the files' own). It knows no word before it is trained; `model.head` says that it is to be.

    Raises:
      UserError: nothing there, no access, files that are broken, pickled, of an architecture jaxft hasn't, or that lack tensors, have some
        left over or of another shape; a task that the family hasn't, or a language model's head that the files haven't; no labels for a
        new head; a pattern that matches nothing; a model that is quantized otherwise already.

    >>> model, params = load_pretrained("bundled:smollm2-135m-instruct")
    >>> params["layers"]["0-29"]["attention"]["q_proj"]["kernel"].shape
    (30, 576, 576)
    """
    wanted = _checked(task, labels, problem_type, seed, new_head, dtype, quantization)
    opened = open_for(source, dtype, revision, wanted)
    formats = _formats(opened.shapes, quantization, quantized, opened.formats, opened.name)
    return opened.model, fill(opened, placing, formats)


def redrawn(
    params: Params,
    source: str,
    task: str = CAUSAL_LM,
    dtype: Any = "float32",
    revision: str = "main",
    quantization: Format | None = None,
    quantized: Sequence[str] = PATTERNS,
    labels: Sequence[str] = (),
    problem_type: str = "",
    seed: int = 0,
    new_head: bool = False,
) -> Params:
    """Returns parameters that `load_pretrained` returned, with what the model's files lack, parts of a head, drawn by another seed.

    What the files have stays the same arrays. Other arguments are those that the parameters were loaded with.
    """
    drawn = open_for(source, dtype, revision, _checked(task, labels, problem_type, seed, new_head, dtype, quantization)).drawn

    def draw(leaf: Leaf) -> Any:
        if leaf.layers is not None or leaf.names[0] not in drawn:
            return leaf.value
        return jax.device_put(drawn[leaf.names[0]].astype(leaf.value.dtype), leaf.value.sharding)

    return map_leaves(draw, params, is_leaf=is_node) if drawn else params


def describe_pretrained(
    source: str,
    task: str = CAUSAL_LM,
    dtype: Any = "float32",
    revision: str = "main",
    quantization: Format | None = None,
    quantized: Sequence[str] = PATTERNS,
    labels: Sequence[str] = (),
    problem_type: str = "",
    seed: int = 0,
    new_head: bool = False,
) -> tuple[nn.Module, Params]:
    """Returns a pre-trained model and the shapes of its parameters, from its configuration alone: nothing else is downloaded or read.

    Arguments and errors are those of `load_pretrained`. What the files of a quantized model don't say in their configuration, the size of
    its blocks, is taken for that of `quantization`, or bitsandbytes' default.
    """
    wanted = _checked(task, labels, problem_type, seed, new_head, dtype, quantization)
    return _describe(source, wanted, dtype, revision, quantization, quantized)


def _describe(
    source: str, task: Task, dtype: Any, revision: str, quantization: Format | None = None, quantized: Sequence[str] = PATTERNS
) -> tuple[nn.Module, Params]:
    found = sources.find(source, revision, sources.CONFIG_FILES)
    config = _config_of(found)
    model, _ = _model(config, found.name, dtype, task)
    shapes = _shapes(model)
    block_size = BLOCK_SIZE if quantization is None else quantization.block_size
    held = configured(model, shapes, config[QUANTIZATION], block_size) if QUANTIZATION in config else {}
    return model, shapes_in_formats(shapes, _formats(shapes, quantization, quantized, held, found.name))


def describe_for(source: str, task: Task, dtype: Any, revision: str) -> tuple[nn.Module, Aim]:
    """Returns the model of a task, and what its files have of its head, from the configuration alone."""
    found = sources.find(source, revision, sources.CONFIG_FILES)
    return _model(_config_of(found), found.name, dtype, task)


def _config_of(found: sources.Source) -> dict[str, Any]:
    return GGUFFile(found.gguf).config if found.gguf else read_config(found)


class OriginalKernels:
    """The linear layers' kernels as a model's files hold them in full precision, read one at a time.

    >>> kernels = OriginalKernels("bundled:smollm2-135m-instruct")
    >>> kernels("layers/3/attention/q_proj/kernel").shape
    (576, 576)
    """

    def __init__(
        self,
        source: str,
        revision: str = "main",
        task: str = CAUSAL_LM,
        labels: Sequence[str] = (),
        problem_type: str = "",
        seed: int = 0,
        new_head: bool = False,
    ) -> None:
        """Reads nothing yet; arguments are those of `load_pretrained`."""
        self._source, self._revision = source, revision
        self._task = Task(heads.ALIASES.get(task, task), tuple(labels), problem_type, seed, new_head)

    def __call__(self, name: str) -> np.ndarray:
        """Returns the kernel of a name, (in, out), in the files' type; raises `UserError` for a model that is quantized in its files."""
        self.shape(name)
        opened, kernels = self._opened
        return opened.read(kernels[name])

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
        _, shapes = _describe(self._source, self._task, "float32", self._revision)
        return {name: leaf for leaf in leaves(shapes, is_leaf=is_node) for name in leaf.names}

    @functools.cached_property
    def _opened(self) -> tuple["Opened", dict[str, Entry]]:
        opened = open_for(self._source, "float32", self._revision, self._task)
        return opened, {entry.path: entry for entry in opened.entries(opened.shapes)}


def _checked(task: str, labels: Sequence[str], problem_type: str, seed: int, new_head: bool, dtype: Any, quantization: Any) -> Task:
    compute_type(dtype)
    if not isinstance(quantization, Format | None):
        raise UserError(f'quantization is a jaxft.Format or None, not {quantization!r}: jaxft.Format("nf4") is QLoRA\'s.')
    return Task(heads.ALIASES.get(task, task), tuple(labels), problem_type, seed, new_head)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model, and the files that hold it."""

    model: nn.Module
    checkpoint: Checkpoint
    name: str
    task: Task
    aimed: Aim

    @functools.cached_property
    def shapes(self) -> Params:
        """Of the model's parameters."""
        return _shapes(self.model)

    def entries(self, shapes: Params) -> list[Entry]:
        """The tensors of parameters of such shapes, under the files' names."""
        return in_file(self.model, tensors_of(self.model, shapes), self.aimed.held, self.checkpoint.shapes)

    @functools.cached_property
    def drawn(self) -> dict[str, np.ndarray]:
        """What the files haven't of the task's head, by our names."""
        return drawn_anew(self.model, self.entries(self.shapes), self.aimed, self.checkpoint.shapes, self.task.seed)

    @functools.cached_property
    def formats(self) -> dict[str, Format]:
        """The formats of the kernels that the files hold quantized, by our names."""
        if not isinstance(self.checkpoint, BitsandbytesFolder):
            return {}
        stored = self.checkpoint.formats
        return {
            entry.path: stored[entry.name] for entry in self.entries(self.shapes) if entry.name in stored and entry.path not in self.drawn
        }

    def read(self, entry: Entry) -> np.ndarray:
        """Returns a tensor that isn't quantized in the files, in our layout."""
        return self.drawn[entry.path] if entry.path in self.drawn else entry.swap(self.checkpoint.read(entry.name))

    def read_quantized(self, entry: Entry) -> QuantizedKernel:
        """Returns one layer's kernel: its codes as the files have them, or quantized from the type that the model computes in."""
        like: QuantizedKernel = entry.leaf.value
        if isinstance(self.checkpoint, BitsandbytesFolder) and entry.path in self.formats:
            return self.checkpoint.read_quantized(entry.name)
        return quantize(self.read(entry).astype(like.dtype), like.format)


def open_for(source: str, dtype: Any, revision: str, task: Task) -> Opened:
    """Returns the model of a task, and its files, opened."""
    found = sources.find(source, revision, sources.CONFIG_FILES + sources.WEIGHT_FILES + sources.TOKENIZER_FILES)
    checkpoint: Any = GGUFFile(found.gguf) if found.gguf else _folder(found)
    model, aimed = _model(checkpoint.config, found.name, dtype, task)
    return Opened(model, checkpoint, found.name, task, aimed)


def _folder(found: sources.Source) -> Any:
    return BitsandbytesFolder(found) if QUANTIZATION in read_config(found) else SafetensorsFolder(found)


def _model(config: Mapping[str, Any], name: str, dtype: Any, task: Task) -> tuple[nn.Module, Aim]:
    plain = {key: value for key, value in config.items() if key != QUANTIZATION}  # how it was stored is no part of the model
    aimed = aim(task, plain, architecture_of(config, name), name)
    family = family_of(aimed.config["architectures"][0])
    shape = family.config.from_hf(aimed.config)
    if aimed.new_head:
        shape = dataclasses.replace(shape, new_head=True)
    model = family.model(shape, dtype=compute_type(dtype))
    if not aimed.new_head:
        check_language_head(model, tensors_of(model, _shapes(model)), aimed.held, name)
    return model, aimed


def _formats(
    shapes: Params, quantization: Format | None, patterns: Sequence[str], held: Mapping[str, Format], name: str
) -> dict[str, Format]:
    """The format of each quantized kernel, by our names: what the files have, and what is asked for."""
    wanted = chosen(shapes, quantization, patterns)
    check_same(wanted, held, f"'{name}'")
    return wanted | dict(held)


def _shapes(model: nn.Module) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def compute_type(dtype: Any, platform: str = "") -> Any:
    """Returns the type that a name stands for, on this machine's devices or on those of a platform.

    >>> compute_type("bfloat16"), compute_type("auto", "gpu"), compute_type("auto", "cpu")
    (dtype(bfloat16), dtype(bfloat16), dtype('float32'))
    """
    if dtype == "auto":
        dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in DTYPES:
        raise unknown("dtype", name, [*DTYPES, "auto"])
    return jnp.dtype(DTYPES[name])


def fill(opened: Opened, placing: Placing | None, formats: Mapping[str, Format]) -> Params:
    """Returns the model's parameters, read leaf by leaf, kernels in `formats` by our names.

    Raises `UserError` where the checkpoint isn't exactly this model's.
    """
    shapes = shapes_in_formats(opened.shapes, formats)
    wanted = opened.entries(shapes)
    check_whole([entry for entry in wanted if entry.path not in opened.drawn], opened)
    _check_tied(opened)
    by_leaf: dict[tuple[str, ...], list[Entry]] = {}
    for entry in wanted:
        by_leaf.setdefault(entry.leaf.path, []).append(entry)
    table = family_of(opened.model.config.architecture).module.PLACEMENT
    places = {} if placing is None else {leaf.path: leaf.value for leaf in leaves(placing(shapes, table), is_leaf=is_node)}
    params: Params = {}
    for path, parts in by_leaf.items():
        inner = params
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = _read_leaf(parts[0].leaf, parts, opened, places.get(path))
    return params


def _read_leaf(leaf: Leaf, parts: list[Entry], opened: Opened, place: Any) -> Any:
    """One leaf, or one quantized kernel, its layers written where they belong; on its devices before the next one is read."""
    host = jax.tree.map(lambda part: _empty(part.shape, np.dtype(part.dtype)), leaf.value)
    for entry in parts:
        layer = opened.read_quantized(entry) if is_quantized(leaf.value) else opened.read(entry)
        for whole, part in zip(jax.tree.leaves(host), jax.tree.leaves(layer), strict=True):
            whole[... if entry.index is None else entry.index] = part
    if place is None:
        return jax.block_until_ready(jax.device_put(host))
    return jax.block_until_ready(
        jax.tree.map(lambda whole, sharding: jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__), host, place)
    )


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at an address where jax, on CPU, takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def check_whole(wanted: list[Entry], opened: Opened) -> None:
    """Raises `UserError` unless every tensor is where it belongs; what the files have of other heads may be left over."""
    have, names = opened.checkpoint.shapes, {entry.name for entry in wanted}
    others = "|".join(family_of(opened.model.config.architecture).module.OTHER_HEADS)
    left = [other for other in have if other not in names and not re.fullmatch(others, other)]
    # bitsandbytes' kernels are (out, in), whatever the layer's are in full precision
    shapes = {entry.name: entry.leaf.shape[::-1] if entry.path in opened.formats else entry.shape for entry in wanted}
    wrong = [f"{name} {have[name]} for {shape}" for name, shape in shapes.items() if have.get(name, shape) != shape]
    problems = []
    if missing := sorted(names - set(have)):
        problems.append(f"it lacks {listed(missing)}")
    if left:
        problems.append(f"it has tensors that the configuration has no place for: {listed(left)}")
    if wrong:
        problems.append(f"shapes differ from the configuration's: {listed(wrong)}")
    if problems:
        raise UserError(f"'{opened.name}' isn't the model that its configuration describes: {'; '.join(problems)}.")


def _check_tied(opened: Opened) -> None:
    """A file may hold a tensor of a tied model under its second name too; then the two must be the same."""
    if not opened.model.config.tie_word_embeddings:
        return
    have, read = opened.checkpoint.shapes, opened.checkpoint.read
    for first, second in second_names(opened.model).items():
        if first not in have or second not in have:
            continue
        if have[first] != have[second] or not np.array_equal(read(first), read(second)):
            raise UserError(
                f"'{opened.name}' says tie_word_embeddings, but its {second} differs from {first}: it is an untied model. "
                "Set tie_word_embeddings to false in its config.json."
            )
