"""Prefix tuning, prompt tuning and P-tuning as PEFT writes and reads them: one tensor, what the encoder gives."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import linen as nn

from jaxft.errors import UserError, nearest
from jaxft.hub import adapter_keys, peft_leaves
from jaxft.hub.checkpoint import ADAPTER_CONFIG
from jaxft.hub.names import listed
from jaxft.hub.peft_format import BASE, WEIGHTS, Params, Written
from jaxft.hub.peft_lora_config import VERSION
from jaxft.methods.base import Method
from jaxft.methods.p_tuning import EncodedEmbeddings, PTuning
from jaxft.methods.prefix import KeysValues, Prefix, ProjectedKeysValues
from jaxft.methods.prompt import Embeddings, Prompt
from jaxft.models import node as nodes

_TENSOR = "prompt_embeddings"  # (virtual_tokens, features)
_COMMON: dict[str, Any] = {  # peft's keys of every kind, beside those of the base model's shape
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "num_transformer_submodules": 1,
    "peft_version": VERSION,
    "revision": None,
    "task_type": None,
}
_SHAPE = ("num_attention_heads", "num_layers", "token_dim")  # keys that the base model decides
_FROM_PEFT = {"RANDOM": "random", "SAMPLE_VOCAB": "vocabulary", "TEXT": "random"}  # starts; a text's adapter holds no tokens of it


@dataclasses.dataclass(frozen=True)
class VirtualTokens:
    """One of PEFT's kinds of virtual tokens; follows peft_format.Format."""

    METHOD: type[Method]
    PEFT_TYPE: str
    site: str
    node: Callable[[Any], type]  # what the method puts at the site; in `read`, one that holds virtual tokens alone, as `embedding`
    shape: Callable[[Any], dict[str, int]]  # the base model's keys, of its config
    width: Callable[[Any], int]  # of the tensor, of the model's config
    settings: Callable[[Any, Any], dict[str, Any]]  # the method's own keys, of the method and the model
    keys: frozenset[str]  # their names
    made: Callable[[Mapping[str, Any], str], dict[str, Any]]  # the method's fields, of a configuration and where it is

    def write(self, model: nn.Module, params: Params, method: Any) -> Written:
        """Returns the configuration and the tensor of virtual tokens; raises `UserError` where `params` don't hold the method's."""
        node: Any = params.get(self.site)
        if node is None:
            raise UserError(f"These parameters hold no {self._name}: params = method.init(rng, model, params) adds one.")
        kind, count = type(node), node.virtual_tokens
        if kind is not self.node(method) or count != method.virtual_tokens:
            raise UserError(
                f"The {self.site} of these parameters is {kind.__name__} with {count} virtual tokens, not what "
                f"{method} gives. Pass the method that made the parameters."
            )
        base: Any = model
        own = {"peft_type": self.PEFT_TYPE, "num_virtual_tokens": method.virtual_tokens} | self.settings(method, model)
        tensors = {_TENSOR: lambda: np.asarray(jax.device_get(_folded(node)), np.float32)}
        return Written(_COMMON | self.shape(base.config) | own, tensors, BASE)

    def read(
        self, folder: pathlib.Path, config: dict[str, Any], model: nn.Module, params: Params, saved: Collection[str] = ()
    ) -> tuple[Params, Any]:
        """Returns `params` with a folder's virtual tokens, and the method that gives the same structure."""
        base: Any = model
        where = str(folder / ADAPTER_CONFIG)
        adapter_keys.check(config, adapter_keys.PEFT, where, ("num_virtual_tokens",))
        self._check(config, base.config, where)
        create: Any = self.METHOD
        method = create(virtual_tokens=config["num_virtual_tokens"], **self.made(config, where))
        have = peft_leaves.held(folder, model, params, saved, prefix=BASE)
        tensor = self._tensor(folder / WEIGHTS, (method.virtual_tokens, self.width(base.config)), have)
        params = method.init(jax.random.key(0), model, params)
        node = params[self.site]
        value = jnp.asarray(tensor.astype(np.float32).reshape(node.embedding.shape))
        return params | {self.site: dataclasses.replace(node, embedding=value)}, method

    @property
    def _name(self) -> str:
        return self.METHOD.__name__

    def _check(self, config: Mapping[str, Any], base: Any, where: str) -> None:
        """Raises `UserError` for a configuration of another model, or with an option that jaxft doesn't have.

        A key that jaxft doesn't know passes where its value is off (null, false, empty): newer versions of peft write such.
        """
        if config.get("num_transformer_submodules") not in (None, 1):
            raise UserError(
                f"{where}: num_transformer_submodules is {config['num_transformer_submodules']!r}; a causal model or an encoder has 1."
            )
        for key, value in self.shape(base).items():
            if config.get(key) not in (None, value):
                raise UserError(f"{where}: {key} is {config[key]!r}; this model's is {value}: the adapter is of another base model.")
        known = {*_COMMON, *_SHAPE, *self.keys, "num_virtual_tokens", "peft_type"}
        for key, value in config.items():
            if key in known or not value:
                continue
            raise UserError(f"{where} has a key that jaxft doesn't know, '{key}'.{nearest(key, known)}")

    def _tensor(self, path: pathlib.Path, shape: tuple[int, int], have: Mapping[str, tuple[int, ...]]) -> np.ndarray:
        if left := sorted(set(have) - {_TENSOR}):
            raise UserError(f"{path} doesn't fit: it has tensors that its configuration has no place for: {listed(left)}.")
        if _TENSOR not in have:
            raise UserError(f"{path} doesn't fit: it lacks {_TENSOR}.")
        if tuple(have[_TENSOR]) != shape:
            raise UserError(f"{path} doesn't fit: {_TENSOR} is {have[_TENSOR]} for {shape}: it is of another base model.")
        with safetensors.safe_open(path, framework="numpy") as file:
            tensor: np.ndarray = file.get_tensor(_TENSOR)
        return tensor


def _folded(node: Any) -> jax.Array:
    """What the node gives, as PEFT's one tensor."""
    if isinstance(node, nodes.Prompt):
        return node.embeddings()
    stacked = jnp.stack(node.keys_values(), axis=1)  # (layers, 2, virtual_tokens, heads, head_dim)
    return jnp.moveaxis(stacked, 2, 0).reshape(node.virtual_tokens, -1)


def _hidden(config: Mapping[str, Any]) -> int:
    """The width of an encoder, 0 where it is peft's default."""
    width = config.get("encoder_hidden_size") or 0
    return 0 if width == config.get("token_dim") else width


def _prefix_width(config: Any) -> int:
    return int(config.num_key_value_heads * config.head_dim)


def _prefix_shape(config: Any) -> dict[str, int]:
    heads = config.num_key_value_heads  # peft's num_attention_heads too, in models of grouped queries
    return {"num_attention_heads": heads, "num_layers": config.num_hidden_layers, "token_dim": _prefix_width(config)}


def _prompt_shape(config: Any) -> dict[str, int]:
    heads = config.num_attention_heads
    return {"num_attention_heads": heads, "num_layers": config.num_hidden_layers, "token_dim": config.hidden_size}


def _prefix_settings(method: Prefix, model: Any) -> dict[str, Any]:
    return {
        "prefix_projection": method.projection,
        "encoder_hidden_size": method.hidden_of(model),
        "init_weights": "zero" if method.start == "zero" else None,
    }


def _prefix_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    projection = bool(config.get("prefix_projection"))
    start = "zero" if config.get("init_weights") == "zero" else "random"
    return {"projection": projection, "projection_hidden": _hidden(config), "folded": projection, "start": start}


def _prompt_settings(method: Prompt, model: Any) -> dict[str, Any]:
    start = "SAMPLE_VOCAB" if method.start == "vocabulary" else "RANDOM"  # peft's TEXT wants the name of a tokenizer
    return {"prompt_tuning_init": start, "prompt_tuning_init_text": None, "tokenizer_name_or_path": None, "tokenizer_kwargs": None}


def _prompt_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    start = config.get("prompt_tuning_init") or "RANDOM"
    if start not in _FROM_PEFT:
        raise UserError(f"{where}: prompt_tuning_init is {start!r}, which PEFT wouldn't take.")
    return {"start": _FROM_PEFT[start]}


def _p_tuning_settings(method: PTuning, model: Any) -> dict[str, Any]:
    return {
        "encoder_reparameterization_type": method.encoder.upper(),
        "encoder_hidden_size": method.hidden_of(model),
        "encoder_num_layers": method.layers,
        "encoder_dropout": 0.0,
    }


def _p_tuning_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    encoder = config.get("encoder_reparameterization_type") or "MLP"
    if encoder not in ("MLP", "LSTM"):
        raise UserError(f"{where}: encoder_reparameterization_type is {encoder!r}, which PEFT wouldn't take.")
    layers = config.get("encoder_num_layers") or PTuning.layers
    return {"encoder": encoder.lower(), "hidden_size": _hidden(config), "layers": layers, "folded": True}


PREFIX = VirtualTokens(
    METHOD=Prefix,
    PEFT_TYPE="PREFIX_TUNING",
    site="prefix",
    node=lambda method: ProjectedKeysValues if method.projected else KeysValues,
    shape=_prefix_shape,
    width=lambda config: 2 * config.num_hidden_layers * _prefix_width(config),
    settings=_prefix_settings,
    keys=frozenset({"prefix_projection", "encoder_hidden_size", "init_weights"}),
    made=_prefix_fields,
)
PROMPT = VirtualTokens(
    METHOD=Prompt,
    PEFT_TYPE="PROMPT_TUNING",
    site="prompt",
    node=lambda method: Embeddings,
    shape=_prompt_shape,
    width=lambda config: config.hidden_size,
    settings=_prompt_settings,
    keys=frozenset({"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}),
    made=_prompt_fields,
)
P_TUNING = VirtualTokens(
    METHOD=PTuning,
    PEFT_TYPE="P_TUNING",
    site="prompt",
    node=lambda method: Embeddings if method.folded else EncodedEmbeddings,
    shape=_prompt_shape,
    width=lambda config: config.hidden_size,
    settings=_p_tuning_settings,
    keys=frozenset({"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}),
    made=_p_tuning_fields,
)
FORMATS = (PREFIX, PROMPT, P_TUNING)
