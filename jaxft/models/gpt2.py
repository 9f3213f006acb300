"""The GPT-2 family: GPT-2 in all its sizes, and DistilGPT2.

Radford et al. 2019, "Language models are unsupervised multitask learners"; Sanh et al. 2019 (arXiv:1910.01108). The reference in the
tests is transformers.
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

_TASKS = (heads.SEQUENCE_CLASSIFICATION, heads.TOKEN_CLASSIFICATION, heads.QUESTION_ANSWERING)
_OTHERS = ("DoubleHeadsModel",)
ARCHITECTURES = {"GPT2LMHeadModel": Architecture("gpt2", heads.CAUSAL_LM, "transformer")} | heads.architectures(
    "GPT2", "gpt2", "transformer", _TASKS, _OTHERS
)

# (name in Hugging Face's files, path in ours, transform); {layer} is the layer's number, {base} the base's own name within a model
# with a head. Conv1D's weights are (in, out), as ours; the heads are linear layers, (out, in) there.
HF_NAMES = (
    ("{base}.wte.weight", "embed/embedding", ""),
    ("{base}.wpe.weight", "position_embed/embedding", ""),
    ("{base}.h.{layer}.ln_1.weight", "layers/{layer}/ln_1/scale", ""),
    ("{base}.h.{layer}.ln_1.bias", "layers/{layer}/ln_1/bias", ""),
    ("{base}.h.{layer}.attn.c_attn.weight", "layers/{layer}/attention/c_attn/kernel", ""),
    ("{base}.h.{layer}.attn.c_attn.bias", "layers/{layer}/attention/c_attn/bias", ""),
    ("{base}.h.{layer}.attn.c_proj.weight", "layers/{layer}/attention/c_proj/kernel", ""),
    ("{base}.h.{layer}.attn.c_proj.bias", "layers/{layer}/attention/c_proj/bias", ""),
    ("{base}.h.{layer}.ln_2.weight", "layers/{layer}/ln_2/scale", ""),
    ("{base}.h.{layer}.ln_2.bias", "layers/{layer}/ln_2/bias", ""),
    ("{base}.h.{layer}.mlp.c_fc.weight", "layers/{layer}/mlp/c_fc/kernel", ""),
    ("{base}.h.{layer}.mlp.c_fc.bias", "layers/{layer}/mlp/c_fc/bias", ""),
    ("{base}.h.{layer}.mlp.c_proj.weight", "layers/{layer}/mlp/c_proj/kernel", ""),
    ("{base}.h.{layer}.mlp.c_proj.bias", "layers/{layer}/mlp/c_proj/bias", ""),
    ("{base}.ln_f.weight", "ln_f/scale", ""),
    ("{base}.ln_f.bias", "ln_f/bias", ""),
    ("lm_head.weight", "lm_head/kernel", "transpose"),
    ("score.weight", "score/kernel", "transpose"),
    ("classifier.weight", "classifier/kernel", "transpose"),
    ("classifier.bias", "classifier/bias", ""),
    ("qa_outputs.weight", "qa_outputs/kernel", "transpose"),
    ("qa_outputs.bias", "qa_outputs/bias", ""),
)
ALSO_NAMED = {"{base}.wte.weight": "lm_head.weight"}  # a second name that a tied model's files may have for a tensor
OTHER_HEADS = (r"(lm_head|score)\.weight", r"(classifier|qa_outputs|multiple_choice_head)\..+")  # that another task's files may hold
HF_IGNORED = (r"(.*\.)?h\.\d+\.attn\.(bias|masked_bias)",)  # the causal mask in old files; computed, not a parameter

# (path pattern, placement of one layer's leaf on the mesh), first match wins; the mesh is (data, fsdp, tensor).
PLACEMENT = (
    ("embed/embedding", P("tensor", "fsdp")),
    ("position_embed/embedding", P(None, "fsdp")),
    ("(c_attn|c_fc)/kernel", P("fsdp", "tensor")),
    ("c_proj/kernel", P("tensor", "fsdp")),
    ("lm_head/kernel", P("fsdp", "tensor")),
    ("(score|classifier|qa_outputs)/kernel", P("fsdp", None)),
    ("(c_attn|c_fc)/bias", P("tensor")),
    ("(bias|scale)", P()),
)

_HEADS = {
    heads.SEQUENCE_CLASSIFICATION: ("score",),
    heads.TOKEN_CLASSIFICATION: ("classifier",),
    heads.QUESTION_ANSWERING: ("qa_outputs",),
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2."""

    learned_positions: ClassVar[bool] = True  # a text can't be longer than max_position_embeddings
    roles: ClassVar[layers.Roles] = layers.Roles(keys="c_attn", values="c_attn", mlp_output="mlp/c_proj")

    architecture: str = "GPT2LMHeadModel"
    task: str = heads.CAUSAL_LM  # what the head is for
    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True
    scale_by_width: bool = True  # scores over the root of head_dim
    scale_by_layer: bool = False  # and over the layer's number, counted from 1 (Mistral's GPT-2 of Stanford)
    embedding_dropout: float = 0.1
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.0  # before the head of token classification
    initializer_range: float = 0.02
    labels: tuple[str, ...] = ()  # names by class id
    problem_type: str = ""
    hf: str = "{}"  # the config.json it came from, as JSON

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "GPT2Config":
        """Reads a config.json, completed by transformers' config class (`PreTrainedConfig.to_dict()`).

        `reorder_and_upcast_attn` changes nothing: scores and softmax are in float32 always.
        """
        if hf["activation_function"] not in layers.ACTIVATIONS:
            raise unknown("activation (activation_function of config.json)", str(hf["activation_function"]), layers.ACTIVATIONS)
        heads.check_causal(hf)
        if hf.get("add_cross_attention"):
            raise UserError("config.json has add_cross_attention: jaxft's GPT-2 reads text alone. Set it to false, or pass another model.")
        if hf["n_embd"] % hf["n_head"]:
            raise UserError(f"config.json: n_embd {hf['n_embd']} isn't a multiple of n_head {hf['n_head']}.")
        architecture = ARCHITECTURES[hf["architectures"][0]]
        return cls(
            **heads.common_fields(hf, architecture),
            vocab_size=hf["vocab_size"],
            hidden_size=hf["n_embd"],
            intermediate_size=4 * hf["n_embd"] if hf.get("n_inner") is None else hf["n_inner"],
            num_hidden_layers=hf["n_layer"],
            num_attention_heads=hf["n_head"],
            hidden_act=hf["activation_function"],
            layer_norm_epsilon=hf["layer_norm_epsilon"],
            max_position_embeddings=hf["n_positions"],
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", True)) and architecture.task == heads.CAUSAL_LM,
            scale_by_width=bool(hf.get("scale_attn_weights", True)),
            scale_by_layer=bool(hf.get("scale_attn_by_inverse_layer_idx", False)),
            embedding_dropout=hf["embd_pdrop"],
            hidden_dropout=hf["resid_pdrop"],
            attention_dropout=hf["attn_pdrop"],
            classifier_dropout=heads.tagger_dropout(hf) if architecture.task == heads.TOKEN_CLASSIFICATION else 0.0,
            initializer_range=hf["initializer_range"],
        )

    @property
    def dropouts(self) -> dict[str, tuple[str, ...]]:
        """The fields that have the rate of each kind of dropout."""
        found = {"hidden_dropout": ("hidden_dropout", "embedding_dropout"), "attention_dropout": ("attention_dropout",)}
        return found | ({"classifier_dropout": ("classifier_dropout",)} if self.task == heads.TOKEN_CLASSIFICATION else {})

    @property
    def family(self) -> str:
        """transformers' model_type."""
        return ARCHITECTURES[self.architecture].model_type

    @property
    def num_key_value_heads(self) -> int:
        """Keys and values have a head for each of the queries'."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_attention_heads

    def query_scale(self, layer: int) -> float:
        """Returns what a layer's queries are multiplied with, beside the division of scores by the root of head_dim."""
        return (1.0 if self.scale_by_width else self.head_dim**0.5) / (layer + 1 if self.scale_by_layer else 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer gets: the places of queries and keys, and the cache's next index."""

    queries: attention.Tokens
    keys: attention.Tokens
    index: Any  # () int32, or None


class Attention(nn.Module):
    """Multi-head attention, queries, keys and values from one kernel (hidden_size, 3 * hidden_size)."""

    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, per_layer: Any, cache: Any, context: Context) -> tuple[jax.Array, Any]:
        config = self.config
        scale, prefix = per_layer
        linear = functools.partial(layers.Linear, use_bias=True, dtype=self.dtype)
        fused = linear(3 * config.hidden_size, name="c_attn")(x)
        shape = (*context.queries.segments.shape, config.num_attention_heads, config.head_dim)
        query, key, value = (part.reshape(shape) for part in jnp.split(fused, 3, axis=-1))
        if scale is not None:
            query = query * scale.astype(query.dtype)
        if cache is not None:
            key, value = cache = layers.appended(cache, (key, value), context.index)
        elif prefix is not None:
            key, value = (layers.after_prefix(part, own) for part, own in zip(prefix, (key, value), strict=True))
        before = 0 if prefix is None else len(prefix[0])
        rng = layers.dropout_rng(self) if drops(config.attention_dropout) else None

        def attend(value: jax.Array) -> jax.Array:
            return attention.attention(
                query, key, value, context.queries, context.keys, None, before, dropout=config.attention_dropout, rng=rng
            )

        layers.note_received(self, attend, value)
        out = linear(config.hidden_size, name="c_proj")(attend(value).reshape(x.shape))
        return dropped(out, config.hidden_dropout, layers.dropout_rng(self)), cache


class MLP(nn.Module):
    """c_proj(act(c_fc(x)))."""

    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = functools.partial(layers.Linear, use_bias=True, dtype=self.dtype)
        hidden = layers.ACTIVATIONS[self.config.hidden_act](linear(self.config.intermediate_size, name="c_fc")(x))
        out = linear(self.config.hidden_size, name="c_proj")(hidden)
        return dropped(out, self.config.hidden_dropout, layers.dropout_rng(self))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), on (tokens, hidden_size)."""

    config: GPT2Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, per_layer: Any, cache: Any, context: Context) -> tuple[jax.Array, Any]:
        norm = functools.partial(layers.LayerNorm, self.config.layer_norm_epsilon, self.dtype)
        attended, cache = Attention(self.config, self.dtype, name="attention")(norm(name="ln_1")(x), per_layer, cache, context)
        x = layers.join(self, "attention_output", x, attended)
        x = layers.join(self, "mlp_output", x, MLP(self.config, self.dtype, name="mlp")(norm(name="ln_2")(x)))
        return x, cache


class GPT2(nn.Module):
    """A causal model of the GPT-2 family, with the head of a task.

    Attributes:
      config: its shape.
      dtype: the compute type.
      remat: what the backward pass computes again: none, dots, offload, full.
    """

    config: GPT2Config
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config = self.config
        self.embed = layers.Embedding(config.vocab_size, config.hidden_size, self.dtype)
        self.position_embed = layers.Embedding(config.max_position_embeddings, config.hidden_size, self.dtype)
        self.layers = layers.Layers(Block, (config, self.dtype), config.num_hidden_layers, self.remat)
        self.ln_f = layers.LayerNorm(config.layer_norm_epsilon, self.dtype)
        self._make_head()

    def _make_head(self) -> None:
        config = self.config
        linear = functools.partial(layers.Linear, dtype=self.dtype, kernel_init=nn.initializers.normal(config.initializer_range))
        outputs = heads.outputs_of(self.task, config.labels)
        if self.task == heads.QUESTION_ANSWERING:
            self.qa_outputs = linear(outputs, use_bias=True)
        elif self.task == heads.TOKEN_CLASSIFICATION:
            self.classifier = linear(outputs, use_bias=True)
        elif self.task == heads.SEQUENCE_CLASSIFICATION:
            self.score = linear(outputs)
        elif not config.tie_word_embeddings:
            self.lm_head = linear(config.vocab_size)

    @property
    def task(self) -> str:
        """What the head is for."""
        return self.config.task

    @property
    def head(self) -> tuple[str, ...]:
        """Patterns of the task's own parameters, which train with any method."""
        return _HEADS.get(self.task, ())

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

        A row with a position beyond max_position_embeddings has none that are numbers.

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
        """Returns what the head reads, (batch, length, hidden_size); arguments as those of a call.

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
        if self.task == heads.TOKEN_CLASSIFICATION:
            return self.classifier(dropped(x, self.config.classifier_dropout, layers.dropout_rng(self)))
        if self.task == heads.SEQUENCE_CLASSIFICATION:
            return self.score(x)
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
        x += layers.placed(self.position_embed, tokens.positions, config.max_position_embeddings).astype(self.dtype)
        x = dropped(x, config.embedding_dropout, layers.dropout_rng(self))
        scales = None
        if config.scale_by_layer or not config.scale_by_width:
            scales = jnp.asarray([config.query_scale(layer) for layer in range(config.num_hidden_layers)], jnp.float32)
        flat, new_layers, outputs = self.layers(x.reshape(-1, config.hidden_size), (scales, prefix), cache, Context(tokens, keys, index))
        states = [x, *[out.reshape(x.shape) for group in outputs for out in group][:-1]]
        if cache is not None:
            cache = dataclasses.replace(cache, layers=new_layers)
        return self.ln_f(flat).reshape(x.shape), cache, states
