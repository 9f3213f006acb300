"""Bottleneck adapters as AdapterHub's library writes and reads them: adapter_config.json and adapter.safetensors."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from jaxft.errors import UserError, nearest
from jaxft.hub import adapter_keys
from jaxft.hub.checkpoint import ADAPTER_CONFIG, header
from jaxft.hub.names import listed
from jaxft.hub.sources import PICKLE_SUFFIXES
from jaxft.methods.base import Params
from jaxft.methods.bottleneck import NONLINEARITIES, STARTS, Bottleneck, BottleneckAdapter
from jaxft.models import segments
from jaxft.models.node import is_node
from jaxft.models.registry import described

METHOD = Bottleneck
WEIGHTS = "adapter.safetensors"
NAME = "jaxft"  # of the adapter, where its writer gives none; the names of its tensors hold it
_OWN = {"attention_output": "attention_adapters", "mlp_output": "output_adapters"}  # modules of a layer that hold its adapters
_OUTPUTS = {"attention_output": "attention.output", "mlp_output": "output"}  # the same in BERT and its like
_LAYERS = {  # where a family's layers are, and the modules in them; the library has no CamemBERT, whose names are RoBERTa's
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("layers", _OWN)),
    "gpt2": ("h", _OWN),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), ("encoder.layer", _OUTPUTS)),
    "distilbert": ("transformer.layer", _OWN),
}
_NORM_LAST = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")  # where a norm follows the sum with the residual
VERSION = "adapters.1.3.0"
_PLACES = {"attention_output": "mh_adapter", "mlp_output": "output_adapter"}
_TENSORS = {  # of one adapter: our path, whether theirs is transposed
    "adapter_down.0.weight": (("down", "kernel"), True),
    "adapter_down.0.bias": (("down", "bias"), False),
    "adapter_up.weight": (("up", "kernel"), True),
    "adapter_up.bias": (("up", "bias"), False),
    "scaling": (("scale",), False),
}
_DEFAULTS: dict[str, Any] = {  # what jaxft has no other value of; None and False are the same here
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "ln_after": False,
    "ln_before": False,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_READ = frozenset({"mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before", "original_ln_after"}) | (
    frozenset({"residual_before_ln", "is_parallel", "init_weights", "leave_out", "dropout", "scaling"})
)
_NEEDED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")  # the library has no defaults of these
# What changes nothing in an adapter that is written: how it started, settings of PHM layers where there are none, and of norms.
_WITHOUT_EFFECT = frozenset(key for key in _DEFAULTS if "phm" in key.lower() and key != "phm_layer") | (
    frozenset({"init_weights_seed", "inv_adapter_reduction_factor", "hypercomplex_nonlinearity", "adapter_residual_before_ln"})
)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, and its place: the node at a storage path, the layer within it, the field."""

    name: str
    path: tuple[str, ...]
    index: int
    field: tuple[str, ...]
    transposed: bool
    value: jax.Array  # the stacked leaf

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.value.shape[1:])
        return shape[::-1] if self.transposed else shape

    def read(self) -> np.ndarray:
        part = np.asarray(jax.device_get(self.value[self.index]), np.float32)
        return part.T if self.transposed else part


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Returns whether an adapter_config.json is AdapterHub's."""
    return "peft_type" not in config and {"config", "model_type", "name"} <= set(config)


def write(model: Any, params: Params, method: Bottleneck, name: str) -> tuple[dict[str, Any], dict[str, Callable[[], np.ndarray]]]:
    """Returns the configuration, and what makes each tensor.

    Raises `UserError` where `params` hold no bottleneck adapter, or another one, and for a name that can't be part of a tensor's name.
    """
    if not name or "." in name:
        raise UserError(f"An adapter's name is without dots, not '{name}': AdapterHub makes it a part of its tensors' names.")
    _check_made_by(method, model, params)
    config = {
        "config": _config(method, model),
        "hidden_size": model.config.hidden_size,
        "model_class": model.config.architecture,
        "model_name": "",
        "model_type": model.config.family,
        "name": name,
        "version": VERSION,
    }
    return config, {tensor.name: tensor.read for tensor in _tensors(model, params, method, name, _base(model))}


def read(folder: pathlib.Path, config: Mapping[str, Any], model: Any, params: Params) -> tuple[Params, Bottleneck]:
    """Returns `params` with a folder's adapter, and the method that gives the same structure.

    Raises `UserError` for an adapter of another base, an option that jaxft doesn't have, and weights that don't fit.
    """
    where = str(folder / ADAPTER_CONFIG)
    for key, own in (("model_type", model.config.family), ("hidden_size", model.config.hidden_size)):
        if config.get(key) not in (None, own):
            raise UserError(f"{where}: the adapter is of another base model: its {key} is {config[key]!r}, this model's {own!r}.")
    method = _method(config["config"], where, model.config.family in _NORM_LAST)
    depth = model.config.num_hidden_layers
    for key, layers in (("leave_out", method.leave_out), ("reduction_factor", [layer for layer, _ in method.layer_reductions])):
        if beyond := [layer for layer in layers if layer >= depth]:
            raise UserError(f"{where}: {key} has layer {beyond[0]}; the model's are numbered 0 to {depth - 1}.")
    if not (folder / WEIGHTS).exists():
        raise _no_weights(folder)
    params = method.init(jax.random.key(0), model, params)
    stored = header(folder / WEIGHTS)
    # a model without a head writes layers.0..., one with a head model.layers.0...
    bare = any(name.startswith(f"{_LAYERS[model.config.family][0]}.") for name in stored)
    tensors = list(_tensors(model, params, method, config["name"], "" if bare else _base(model)))
    _check_weights(folder / WEIGHTS, stored, tensors)
    return _fill(folder / WEIGHTS, params, tensors), method


def _base(model: Any) -> str:
    """What names begin with in a model with a head."""
    return f"{described(model.config.architecture).base}."


def _tensors(model: Any, params: Params, method: Bottleneck, name: str, prefix: str) -> Iterator[_Tensor]:
    """Yields what the file holds of `params`."""
    stack, modules = _LAYERS[model.config.family]
    for leaf in segments.leaves(params, is_leaf=is_node):
        if not isinstance(leaf.value, BottleneckAdapter) or leaf.layers is None or leaf.path[2] not in method.sites:
            continue
        for index, layer in enumerate(leaf.layers):
            start = f"{prefix}{stack}.{layer}.{modules[leaf.path[2]]}.adapters.{name}"
            for tail, (field, transposed) in _TENSORS.items():
                if tail != "scaling" or method.trained_scale:
                    yield _Tensor(f"{start}.{tail}", leaf.path, index, field, transposed, _get(leaf.value, field))


def _get(value: Any, field: tuple[str, ...]) -> jax.Array:
    for part in field:
        value = getattr(value, part)
    return value


def _check_made_by(method: Bottleneck, model: nn.Module, params: Params) -> None:
    """Raises `UserError` unless `params` have the adapters that the method gives, at its places and with its settings."""
    found = [
        leaf
        for leaf in segments.leaves(params, is_leaf=is_node)
        if isinstance(leaf.value, BottleneckAdapter) and leaf.path[2] in method.sites
    ]
    if not found:
        raise UserError("These parameters hold no bottleneck adapter: params = method.init(rng, model, params) adds one.")
    depth, hidden = model.config.num_hidden_layers, model.config.hidden_size
    sizes = {(site, layer): size for site in method.sites for layer in range(depth) if (size := method.size_at(layer, hidden))}
    held = {(leaf.path[2], layer): leaf.value.down.bias.shape[-1] for leaf in found for layer in leaf.layers or ()}
    scale = {"": (), "learned": (1,), "channel": (hidden,)}[method.trained_scale]
    for leaf in found:
        node = leaf.value
        settings = (node.activation, node.input, node.scale.shape[1:]) == (method.activation, method.input, scale)
        if not settings or (not method.trained_scale and not np.allclose(node.scale, method.scaling, rtol=1e-6)):
            raise UserError(f"{leaf.title} has other settings than this method gives it. Pass the method that made the parameters.")
    if held != sizes:
        raise UserError("The adapters' places or sizes aren't those that this method gives. Pass the method that made the parameters.")


def _config(method: Bottleneck, model: nn.Module) -> dict[str, Any]:
    return _DEFAULTS | {
        **{place: site in method.sites for site, place in _PLACES.items()},
        "reduction_factor": _reduction(method, model.config.hidden_size),
        "non_linearity": method.activation,
        "original_ln_before": method.input == "sum",
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": method.input == "residual",
        "init_weights": method.init_weights,
        "leave_out": list(method.leave_out),
        "dropout": method.dropout,
        "scaling": method.trained_scale or float(method.scaling),
    }


def _reduction(method: Bottleneck, hidden_size: int) -> Any:
    if method.size:  # the library rounds down: half a unit more keeps what doesn't divide from falling below
        return hidden_size // method.size if hidden_size % method.size == 0 else hidden_size / (method.size + 0.5)
    if method.layer_reductions:
        return {str(layer): _whole(factor) for layer, factor in method.layer_reductions} | {"default": _whole(method.reduction)}
    return _whole(method.reduction)


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _method(config: Any, where: str, norm_last: bool) -> Bottleneck:
    """The method of the library's settings."""
    if not isinstance(config, dict) or config.get("architecture"):
        kind = config.get("architecture") if isinstance(config, dict) else config
        raise UserError(f"{where} is of the kind {kind!r}; of AdapterHub's adapters jaxft reads bottleneck adapters.")
    adapter_keys.check(config, adapter_keys.ADAPTERHUB, where, _NEEDED)
    _check_options(config, where)
    scaling, reduction = config.get("scaling", 1.0), config["reduction_factor"]
    by_layer = isinstance(reduction, Mapping)
    if by_layer and "default" not in reduction:
        raise UserError(f"{where}: reduction_factor has no 'default'. Add one.")
    if wrong := [layer for layer in reduction if layer != "default" and not layer.isdecimal()] if by_layer else []:
        raise UserError(f"{where}: reduction_factor has the key '{wrong[0]}'; its keys are layers, and 'default'.")
    activation = config["non_linearity"].lower()
    if activation not in NONLINEARITIES:
        raise UserError(f"{where}: non_linearity is {activation!r}; jaxft has {', '.join(sorted(NONLINEARITIES))}.")
    start = config.get("init_weights", "bert")
    if start not in STARTS:
        raise UserError(f"{where}: init_weights is {start!r}; jaxft has {', '.join(STARTS)}.")
    if not any(config[place] for place in _PLACES.values()):
        raise UserError(f"{where}: {' and '.join(_PLACES.values())} are false: the adapter is nowhere.")
    return Bottleneck(
        sites=tuple(site for site, place in _PLACES.items() if config[place]),
        input=_input(config, where, norm_last),
        reduction=float(reduction["default"] if by_layer else reduction),
        layer_reductions=tuple((int(layer), float(f)) for layer, f in reduction.items() if layer != "default") if by_layer else (),
        activation=activation,
        scaling=1.0 if isinstance(scaling, str) else float(scaling),
        trained_scale=scaling if isinstance(scaling, str) else "",
        leave_out=tuple(config.get("leave_out") or ()),
        dropout=float(config.get("dropout") or 0.0),
        init_weights=start,
    )


def _check_options(config: Mapping[str, Any], where: str) -> None:
    for key, value in config.items():
        if key in _READ | _WITHOUT_EFFECT or key == "architecture" or value == _DEFAULTS.get(key) or not value:
            continue
        if key in _DEFAULTS:
            raise UserError(f"{where}: {key} is {value!r}, which jaxft doesn't have; it reads {_DEFAULTS[key]!r}.")
        raise UserError(f"{where} has a key that jaxft doesn't know, '{key}'.{nearest(key, {*_DEFAULTS, *_READ})}")


def _input(config: Mapping[str, Any], where: str, norm_last: bool) -> str:
    """What the adapter reads. In models that have their norms before a sub-layer, `original_ln` is the residual alone.

    The library adds the residual, and norms the sum in models with their norms last, before the adapter (original_ln_before), after it
    (original_ln_after), and once more where the adapter's own residual holds it already (residual_before_ln false). Settings that add it
    never or twice break the base model; so do those of models with their norms last that leave the last norm out.
    """
    before, after = bool(config.get("original_ln_before", False)), bool(config.get("original_ln_after", True))
    own = config.get("residual_before_ln", True)
    if config.get("is_parallel"):
        if after:
            return "residual"
    elif (after and own is True) if norm_last else (own in (True, False) and after + (before and not own) == 1):
        return "sum" if before else "output"
    raise UserError(
        f"{where}: original_ln_before {before}, original_ln_after {after} and residual_before_ln {own!r} don't add the residual once, "
        "as the base model does. jaxft reads adapters that do, as all of AdapterHub's presets."
    )


def _no_weights(folder: pathlib.Path) -> UserError:
    if any(path.suffix in PICKLE_SUFFIXES for path in folder.iterdir()):
        return UserError(
            f"{folder} holds pickle files, which can run code when they are opened; jaxft reads safetensors. Where you trust it, write it "
            "anew with AdapterHub's library: model.load_adapter(FOLDER), then model.save_adapter(NEW, NAME, use_safetensors=True)."
        )
    return UserError(f"{folder} has no {WEIGHTS}.")


def _check_weights(path: pathlib.Path, stored: Mapping[str, tuple[int, ...]], tensors: list[_Tensor]) -> None:
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    problems = []
    if missing := sorted(set(shapes) - set(stored)):
        problems.append(f"it lacks {listed(missing)}")
    if left := sorted(set(stored) - set(shapes)):
        problems.append(f"it has tensors that its configuration has no place for: {listed(left)}")
    if wrong := [f"{name} {stored[name]} for {shape}" for name, shape in shapes.items() if stored.get(name, shape) != shape]:
        problems.append(f"shapes are those of another base model, or another reduction: {listed(wrong)}")
    if problems:
        raise UserError(f"{path} doesn't fit: {'; '.join(problems)}.")


def _fill(path: pathlib.Path, params: Params, tensors: list[_Tensor]) -> Params:
    """Returns `params` with the file's numbers."""
    hosts: dict[tuple[str, ...], np.ndarray] = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for tensor in tensors:
            host = hosts.setdefault((*tensor.path, *tensor.field), np.empty(tensor.value.shape, np.float32))
            found = file.get_tensor(tensor.name)
            host[tensor.index] = found.T if tensor.transposed else found
    return segments.map_leaves(lambda leaf: jnp.asarray(hosts[leaf.path]) if leaf.path in hosts else leaf.value, params)
