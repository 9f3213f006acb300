"""The Llama family: Llama 1, 2 and 3.x, SmolLM2, Mistral (sliding window), Qwen2 (q/k/v bias), Qwen3 (q/k norm).

Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288); Jiang et al. 2023 (arXiv:2310.06825); Qwen team 2024 and 2025
(arXiv:2407.10671, arXiv:2505.09388). The reference in the tests is transformers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxft.errors import UserError, unknown
from jaxft.models import attention, heads, layers
from jaxft.models.dropout import dropped, drops
from jaxft.models.heads import Architecture
from jaxft.models.layers import Cache, Output
from jaxft.models.rotary import TYPES, Rotary, angles, rotate

_STEMS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_TASKS = (heads.CAUSAL_LM, heads.SEQUENCE_CLASSIFICATION, heads.TOKEN_CLASSIFICATION, heads.QUESTION_ANSWERING)
ARCHITECTURES = {
    name: found for kind, stem in _STEMS.items() for name, found in heads.architectures(stem, kind, "model", _TASKS).items()
} | {  # transformers kept an older name of the base in these
    f"{_STEMS[kind]}ForQuestionAnswering": Architecture(kind, heads.QUESTION_ANSWERING, "transformer")
    for kind in ("llama", "qwen2", "qwen3")
}

# (name in Hugging Face's files, path in ours, transform); {layer} is the layer's number, {base} the base's own name within a model
# with a head. Linear weights are (out, in) there.
HF_NAMES = (
    ("{base}.embed_tokens.weight", "embed/embedding", ""),
    ("{base}.layers.{layer}.input_layernorm.weight", "layers/{layer}/input_norm/scale", ""),
    ("{base}.layers.{layer}.self_attn.q_proj.weight", "layers/{layer}/attention/q_proj/kernel", "transpose"),
    ("{base}.layers.{layer}.self_attn.q_proj.bias", "layers/{layer}/attention/q_proj/bias", ""),
    ("{base}.layers.{layer}.self_attn.k_proj.weight", "layers/{layer}/attention/k_proj/kernel", "transpose"),
    ("{base}.layers.{layer}.self_attn.k_proj.bias", "layers/{layer}/attention/k_proj/bias", ""),
    ("{base}.layers.{layer}.self_attn.v_proj.weight", "layers/{layer}/attention/v_proj/kernel", "transpose"),
    ("{base}.layers.{layer}.self_attn.v_proj.bias", "layers/{layer}/attention/v_proj/bias", ""),
    ("{base}.layers.{layer}.self_attn.o_proj.weight", "layers/{layer}/attention/o_proj/kernel", "transpose"),
    ("{base}.layers.{layer}.self_attn.o_proj.bias", "layers/{layer}/attention/o_proj/bias", ""),
    ("{base}.layers.{layer}.self_attn.q_norm.weight", "layers/{layer}/attention/q_norm/scale", ""),
    ("{base}.layers.{layer}.self_attn.k_norm.weight", "layers/{layer}/attention/k_norm/scale", ""),
    ("{base}.layers.{layer}.post_attention_layernorm.weight", "layers/{layer}/post_attention_norm/scale", ""),
    ("{base}.layers.{layer}.mlp.gate_proj.weight", "layers/{layer}/mlp/gate_proj/kernel", "transpose"),
    ("{base}.layers.{layer}.mlp.gate_proj.bias", "layers/{layer}/mlp/gate_proj/bias", ""),
    ("{base}.layers.{layer}.mlp.up_proj.weight", "layers/{layer}/mlp/up_proj/kernel", "transpose"),
    ("{base}.layers.{layer}.mlp.up_proj.bias", "layers/{layer}/mlp/up_proj/bias", ""),
    ("{base}.layers.{layer}.mlp.down_proj.weight", "layers/{layer}/mlp/down_proj/kernel", "transpose"),
    ("{base}.layers.{layer}.mlp.down_proj.bias", "layers/{layer}/mlp/down_proj/bias", ""),
    ("{base}.norm.weight", "norm/scale", ""),
    ("lm_head.weight", "lm_head/kernel", "transpose"),
    ("score.weight", "score/kernel", "transpose"),
    ("score.bias", "score/bias", ""),
    ("qa_outputs.weight", "qa_outputs/kernel", "transpose"),
    ("qa_outputs.bias", "qa_outputs/bias", ""),
)
ALSO_NAMED = {"{base}.embed_tokens.weight": "lm_head.weight"}  # a second name that a tied model's files may have for a tensor
OTHER_HEADS = (r"lm_head\.weight", r"(score|qa_outputs)\.\w+")  # that another task's files may hold
HF_IGNORED = (r"(.*\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # in old files; computed, not a parameter

# (path pattern, placement of one layer's leaf on the mesh), first match wins; the mesh is (data, fsdp, tensor).
PLACEMENT = (
    ("embed/embedding", P("tensor", "fsdp")),
    ("(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel", P("fsdp", "tensor")),
    ("(o_proj|down_proj)/kernel", P("tensor", "fsdp")),
    ("lm_head/kernel", P("fsdp", "tensor")),
    ("(score|qa_outputs)/kernel", P("fsdp", None)),
    ("(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias", P("tensor")),
    ("(bias|scale)", P()),
)

_EVERYTHING = 2**30  # a window that no position reaches


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama-family model, under the names of config.json."""

    learned_positions: ClassVar[bool] = False  # rotary angles go on beyond max_position_embeddings
    roles: ClassVar[layers.Roles] = layers.Roles(keys="k_proj", values="v_proj", mlp_output="down_proj")

    architecture: str = "LlamaForCausalLM"
    task: str = heads.CAUSAL_LM  # what the head is for
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # sliding window of each layer; empty: none has one
    rotary: Rotary = dataclasses.field(default_factory=Rotary)
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0  # before the head of token classification
    labels: tuple[str, ...] = ()  # names by class id
    problem_type: str = ""
    score_bias: bool = False  # of the head of token classification
    hf: str = "{}"  # the config.json it came from, as JSON

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a config.json, completed by transformers' config class (`PreTrainedConfig.to_dict()`)."""
        architecture = ARCHITECTURES[hf["architectures"][0]]
        family, tags = architecture.model_type, architecture.task == heads.TOKEN_CLASSIFICATION
        heads.check_causal(hf)
        if hf["hidden_act"] not in layers.ACTIVATIONS:
            raise unknown("activation (hidden_act of config.json)", str(hf["hidden_act"]), layers.ACTIVATIONS)
        bias = bool(hf.get("attention_bias", False))
        query_heads, key_value_heads, head_dim = _head_layout(hf)
        return cls(
            **heads.common_fields(hf, architecture),
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_hidden_layers=hf["num_hidden_layers"],
            num_attention_heads=query_heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            hidden_act=hf["hidden_act"],
            rms_norm_eps=hf["rms_norm_eps"],
            max_position_embeddings=hf["max_position_embeddings"],
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)) and architecture.task == heads.CAUSAL_LM,
            qkv_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=_windows(hf, family),
            rotary=_rotary(hf),
            initializer_range=hf.get("initializer_range", 0.02),
            attention_dropout=hf.get("attention_dropout", 0.0),
            classifier_dropout=heads.tagger_dropout(hf) if tags else 0.0,
            score_bias=bool(hf.get("token_classification_bias", True)) if tags else False,
        )

    @property
    def dropouts(self) -> dict[str, tuple[str, ...]]:
        """The fields that have the rate of each kind of dropout."""
        kinds = ("attention_dropout", "classifier_dropout") if self.task == heads.TOKEN_CLASSIFICATION else ("attention_dropout",)
        return {kind: (kind,) for kind in kinds}

    @property
    def family(self) -> str:
        """transformers' model_type."""
        return ARCHITECTURES[self.architecture].model_type


def _head_layout(hf: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads of the queries, heads of keys and values, and the size of one; raises `UserError` where they don't fit each other."""
    heads, hidden_size = hf["num_attention_heads"], hf["hidden_size"]
    shared, size = hf["num_key_value_heads"] or heads, hf.get("head_dim")
    if heads < 1 or shared < 1 or heads % shared:
        raise UserError(
            f"config.json: num_attention_heads {heads} isn't a multiple of num_key_value_heads {shared}, and as many query heads share "
            "each head of keys and values. Set them as the model was trained."
        )
    if not size and hidden_size % heads:
        raise UserError(
            f"config.json: hidden_size {hidden_size} isn't a multiple of num_attention_heads {heads}. Set them as the model was trained, "
            "or say head_dim."
        )
    size = size or hidden_size // heads
    if size < 2 or size % 2:
        raise UserError(
            f"config.json: head_dim {size} isn't an even number above 0, and rotary positions turn pairs of a head's numbers. Set it as "
            "the model was trained."
        )
    return heads, shared, size


def _windows(hf: Mapping[str, Any], family: str) -> tuple[int | None, ...]:
    window = hf.get("sliding_window")
    if family == "llama" or not window:
        return ()
    if family == "mistral":
        return (window,) * hf["num_hidden_layers"]
    kinds = hf.get("layer_types") or ()
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _rotary(hf: Mapping[str, Any]) -> Rotary:
    settings = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    settings.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    settings["rope_type"] = settings.pop("type", None) or settings.get("rope_type") or "default"
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("Rotary embeddings over a part of the head (partial_rotary_factor) aren't part of the Llama family.")
    known = {field.name for field in dataclasses.fields(Rotary)}
    if settings["rope_type"] in TYPES and (left := sorted(set(settings) - known)):
        raise UserError(f"config.json's rope_parameters has keys that jaxft doesn't know: {', '.join(left)}.")
    return Rotary(**{name: value for name, value in settings.items() if name in known and value is not None})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer gets: angles (batch, length, 1, head_dim / 2), the places of queries and keys, and the cache's next index."""

    cosine: jax.Array
    sine: jax.Array
    queries: attention.Tokens
    keys: attention.Tokens
    index: Any  # () int32, or None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, per_layer: Any, cache: Any, context: Context) -> tuple[jax.Array, Any]:
        config = self.config
        batch, length = context.queries.segments.shape
        window, prefix = per_layer
        linear = functools.partial(layers.Linear, dtype=self.dtype)

        def heads(name: str, count: int) -> jax.Array:
            return linear(count * config.head_dim, config.qkv_bias, name=name)(x).reshape(batch, length, count, config.head_dim)

        query, key = heads("q_proj", config.num_attention_heads), heads("k_proj", config.num_key_value_heads)
        value = heads("v_proj", config.num_key_value_heads)
        if config.qk_norm:
            query = layers.RMSNorm(config.rms_norm_eps, self.dtype, name="q_norm")(query)
            key = layers.RMSNorm(config.rms_norm_eps, self.dtype, name="k_norm")(key)
        query = rotate(query, context.cosine, context.sine)
        key = rotate(key, context.cosine, context.sine)
        if cache is not None:
            key, value = cache = layers.appended(cache, (key, value), context.index)
        elif prefix is not None:
            key, value = (layers.after_prefix(part, own) for part, own in zip(prefix, (key, value), strict=True))
        before = 0 if prefix is None else len(prefix[0])
        rng = layers.dropout_rng(self) if drops(config.attention_dropout) else None

        def attend(value: jax.Array) -> jax.Array:
            return attention.attention(
                query, key, value, context.queries, context.keys, window, before, dropout=config.attention_dropout, rng=rng
            )

        layers.note_received(self, attend, value)
        return linear(config.hidden_size, config.o_bias, name="o_proj")(attend(value).reshape(x.shape[0], -1)), cache


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = functools.partial(layers.Linear, use_bias=self.config.mlp_bias, dtype=self.dtype)
        gate = linear(self.config.intermediate_size, name="gate_proj")(x)
        up = linear(self.config.intermediate_size, name="up_proj")(x)
        act = layers.ACTIVATIONS[self.config.hidden_act]
        gated = layers.made_again(lambda gate, up: act(gate) * up)
        return linear(self.config.hidden_size, name="down_proj")(gated(gate, up))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), on (tokens, hidden_size)."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, per_layer: Any, cache: Any, context: Context) -> tuple[jax.Array, Any]:
        norm = functools.partial(layers.RMSNorm, self.config.rms_norm_eps, self.dtype)
        attended, cache = Attention(self.config, self.dtype, name="attention")(norm(name="input_norm")(x), per_layer, cache, context)
        x = layers.join(self, "attention_output", x, attended)
        x = layers.join(self, "mlp_output", x, MLP(self.config, self.dtype, name="mlp")(norm(name="post_attention_norm")(x)))
        return x, cache


class Llama(nn.Module):
    """A causal model of the Llama family, with the head of a task.

    Attributes:
      config: its shape.
      dtype: the compute type.
      remat: what the backward pass computes again: none, dots, offload, full.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config = self.config
        self.embed = layers.Embedding(config.vocab_size, config.hidden_size, self.dtype)
        self.layers = layers.Layers(Block, (config, self.dtype), config.num_hidden_layers, self.remat)
        self.norm = layers.RMSNorm(config.rms_norm_eps, self.dtype)
        self._make_head()

    def _make_head(self) -> None:
        config = self.config
        linear = functools.partial(layers.Linear, dtype=self.dtype, kernel_init=nn.initializers.normal(config.initializer_range))
        outputs = heads.outputs_of(self.task, config.labels)
        if self.task == heads.QUESTION_ANSWERING:
            self.qa_outputs = linear(outputs, use_bias=True)
        elif self.task in heads.CLASSIFYING:
            self.score = linear(outputs, use_bias=config.score_bias)
        elif not config.tie_word_embeddings:
            self.lm_head = linear(config.vocab_size)

    @property
    def task(self) -> str:
        """What the head is for."""
        return self.config.task

    @property
    def head(self) -> tuple[str, ...]:
        """Patterns of the task's own parameters, which train with any method."""
        if self.task in heads.CLASSIFYING:
            return ("score",)
        return ("qa_outputs",) if self.task == heads.QUESTION_ANSWERING else ()

    @property
    def pooling(self) -> str:
        """An example's last token, which has seen the others, stands for all of it."""
        return heads.LAST

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Returns the head's outputs, in the shape that its task has in transformers, and the hidden states of every token.

        Args:
          input_ids: (batch, length) int32.
          attention_mask: (batch, length), 0 at padding, which may be on either side.
          segment_ids: (batch, length) int32, for packed rows: 0 is padding, tokens attend within their number, -1 is seen by all.
          positions: (batch, length) int32, for packed rows.
          cache: keys and values so far, from `new_cache`; the new one is returned.
        """
        tokens = layers.token_places(input_ids.shape, attention_mask, segment_ids, positions, cache)
        hidden, cache, states = self._run(input_ids, tokens, cache, 0.0, None)
        return heads.output(self, hidden, tokens.segments, (*states, hidden), cache)

    def features(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        neftune_alpha: jax.Array | float = 0.0,
        embedding_offset: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what the output head reads, (batch, length, hidden_size); arguments as those of a call.

        With rngs={"noise": key}, embeddings get NEFTune's noise of strength `neftune_alpha`. `embedding_offset`, (batch, length,
        hidden_size), is added to the tokens' embeddings.
        """
        tokens = layers.token_places(input_ids.shape, attention_mask, segment_ids, positions, None)
        return self._run(input_ids, tokens, None, neftune_alpha, embedding_offset)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the head's outputs, (..., vocabulary or labels), of hidden (..., hidden_size): of any tokens, or of pooled ones."""
        return heads.on_rows(self._head, hidden)

    def _head(self, x: jax.Array) -> jax.Array:
        if self.task == heads.QUESTION_ANSWERING:
            return self.qa_outputs(x)
        if self.task in heads.CLASSIFYING:
            return self.score(dropped(x, self.config.classifier_dropout, layers.dropout_rng(self)))
        return self.embed.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)

    def new_cache(self, batch: int, size: int) -> Cache:
        """Returns an empty cache for `batch` rows of `size` tokens, grouped as the parameters' segments are.

        Virtual tokens of a prefix and of a prompt are in it, beside the room for `size` tokens.
        """
        prefix, prompt = layers.prefix(self, self.dtype), layers.prompt(self, self.dtype)
        before = 0 if prefix is None else prefix[0].shape[1]
        size += before + (0 if prompt is None else len(prompt))
        shape = (batch, size, self.config.num_key_value_heads, self.config.head_dim)
        cache: Any = layers.empty_cache(self.variables["params"], shape, self.dtype)
        if prefix is not None:
            cache = layers.filled(cache, prefix)
        if prompt is not None:
            tokens = layers.virtual_tokens(batch, len(prompt), before)
            cache = self._forward(jnp.broadcast_to(prompt, (batch, *prompt.shape)), tokens, cache)[1]
        return cache

    def _run(
        self,
        input_ids: jax.Array,
        tokens: attention.Tokens,
        cache: Cache | None,
        neftune_alpha: jax.Array | float,
        embedding_offset: jax.Array | None,
    ) -> tuple[jax.Array, Cache | None, list[jax.Array]]:
        x = self.embed(input_ids).astype(self.dtype)
        x = layers.perturbed(self, x, tokens, neftune_alpha, embedding_offset)
        prompt = layers.prompt(self, self.dtype) if cache is None else None  # a cache has it already
        if prompt is None:
            return self._forward(x, tokens, cache)
        count = len(prompt)
        x = jnp.concatenate([jnp.broadcast_to(prompt, (len(x), *prompt.shape)), x], axis=1)
        hidden, _, states = self._forward(x, layers.after_virtual_tokens(tokens, count), None)
        return hidden[:, count:], None, [state[:, count:] for state in states]

    def _forward(self, x: jax.Array, tokens: attention.Tokens, cache: Cache | None) -> tuple[jax.Array, Cache | None, list[jax.Array]]:
        """The layers on embeddings x (batch, length, hidden_size): what the head reads, the new cache, the states before it."""
        config = self.config
        prefix = layers.prefix(self, self.dtype) if cache is None else None  # a cache has it already
        index = None if cache is None else cache.index
        tokens, keys, cache = layers.entered(tokens, cache, prefix)
        cosine, sine = angles(config.rotary, config.head_dim, config.max_position_embeddings, tokens.positions)
        windows = None
        if config.windows:
            windows = jnp.asarray([_EVERYTHING if window is None else window for window in config.windows], jnp.int32)
        flat, new_layers, outputs = self.layers(
            x.reshape(-1, config.hidden_size), (windows, prefix), cache, Context(cosine, sine, tokens, keys, index)
        )
        states = [x, *[out.reshape(x.shape) for group in outputs for out in group][:-1]]
        if cache is not None:
            cache = dataclasses.replace(cache, layers=new_layers)
        return self.norm(flat).reshape(x.shape), cache, states
