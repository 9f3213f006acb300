"""The bidirectional encoders: BERT and those that have its layers. A family's own file says what differs, and its files' names.

Devlin et al. 2018 (arXiv:1810.04805). The reference in the tests is transformers.
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
from jaxft.models.dropout import dropped
from jaxft.models.heads import Architecture
from jaxft.models.layers import Output

TASKS = (heads.MASKED_LM, heads.SEQUENCE_CLASSIFICATION, heads.TOKEN_CLASSIFICATION, heads.QUESTION_ANSWERING)

# (path pattern, placement of one layer's leaf on the mesh), first match wins; the mesh is (data, fsdp, tensor).
PLACEMENT = (
    ("(position_embed|token_type_embed)/embedding", P(None, "fsdp")),
    ("embed/embedding", P("tensor", "fsdp")),
    ("layers/[0-9]+/(attention/(query|key|value)|intermediate)/kernel", P("fsdp", "tensor")),
    ("layers/[0-9]+/(attention/output|output)/kernel", P("tensor", "fsdp")),
    ("layers/[0-9]+/(attention/(query|key|value)|intermediate)/bias", P("tensor")),
    ("lm_head/decoder/kernel", P("fsdp", "tensor")),
    ("kernel", P("fsdp", None)),
    ("(bias|scale)", P()),
)

POOLER, DENSE = "pooler", "dense"  # heads of sequence classification: pooler and classifier, or a classifier with a dense layer in it
_HEADS = {POOLER: ("pooler", "classifier"), DENSE: ("classifier",)}
DENSE_HEAD_NAMES = (  # of the second, in all families that have it
    ("classifier.dense.weight", "classifier/dense/kernel", "transpose"),
    ("classifier.dense.bias", "classifier/dense/bias", ""),
    ("classifier.out_proj.weight", "classifier/out_proj/kernel", "transpose"),
    ("classifier.out_proj.bias", "classifier/out_proj/bias", ""),
)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, under the names of BERT's config.json."""

    learned_positions: ClassVar[bool] = True  # a text can't be longer than max_position_embeddings
    roles: ClassVar[layers.Roles] = layers.Roles(keys="attention/key", values="attention/value", mlp_output="layers/[0-9]+/output")

    architecture: str
    family: str  # transformers' model_type
    task: str  # what the head is for
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int  # tokens that a text may have
    hf: str  # the config.json it came from, as JSON
    embedding_size: int  # another than hidden_size is projected to it
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    type_vocab_size: int = 0  # kinds of tokens; 0: none has one
    position_offset: int = 0  # rows of the table of positions before that of the first token
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    attention_output_dropout: float = 0.0
    classifier_dropout: float = 0.0
    tie_word_embeddings: bool = False  # the head of masked_lm multiplies with the embedding
    pooling_head: str = POOLER  # of sequence classification
    pooling_act: str = "tanh"
    lm_act: str = "gelu"
    labels: tuple[str, ...] = ()  # names by class id
    problem_type: str = ""
    new_head: bool = False  # the head of masked_lm was drawn, and is the task's own to train

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"config.json: hidden_size {self.hidden_size} isn't a multiple of num_attention_heads {self.num_attention_heads}."
            )

    @property
    def dropouts(self) -> dict[str, tuple[str, ...]]:
        """The fields that have the rate of each kind of dropout."""
        found = {"hidden_dropout": ("hidden_dropout", "attention_output_dropout"), "attention_dropout": ("attention_dropout",)}
        return found if self.task == heads.MASKED_LM else found | {"classifier_dropout": ("classifier_dropout",)}

    @property
    def num_key_value_heads(self) -> int:
        """As many as there are heads."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.hidden_size // self.num_attention_heads


def common_fields(hf: Mapping[str, Any], classes: Mapping[str, Architecture]) -> dict[str, Any]:
    """Returns the fields that BERT's, RoBERTa's and ELECTRA's config.json give alike; raises `UserError` for what isn't an encoder's."""
    architecture = classes[hf["architectures"][0]]
    if hf.get("is_decoder") or hf.get("add_cross_attention"):
        raise UserError(f"This {hf['architectures'][0]} is a decoder (is_decoder in config.json); jaxft has its family as encoders only.")
    if (kind := hf.get("position_embedding_type") or "absolute") != "absolute":
        raise UserError(f"config.json has position_embedding_type '{kind}'; jaxft's encoders have absolute positions.")
    hidden = hf["hidden_dropout_prob"]
    own = hf.get("classifier_dropout")
    return heads.common_fields(hf, architecture) | {
        "family": architecture.model_type,
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "embedding_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "hidden_act": activation(hf["hidden_act"]),
        "layer_norm_eps": hf["layer_norm_eps"],
        "initializer_range": hf["initializer_range"],
        "type_vocab_size": hf["type_vocab_size"],
        "hidden_dropout": hidden,
        "attention_dropout": hf["attention_probs_dropout_prob"],
        "attention_output_dropout": hidden,
        "classifier_dropout": (hidden if own is None else own) if architecture.task in heads.CLASSIFYING else 0.0,
        "tie_word_embeddings": is_tied(hf, architecture.task),
    }


def is_tied(hf: Mapping[str, Any], task: str) -> bool:
    """Returns whether the head of a task multiplies with the embedding."""
    return task == heads.MASKED_LM and bool(hf.get("tie_word_embeddings", True))


def activation(name: Any) -> str:
    """Returns a name of config.json; raises `UserError` for an activation that jaxft hasn't."""
    if name not in layers.ACTIVATIONS:
        raise unknown("activation (of config.json)", str(name), layers.ACTIVATIONS)
    return str(name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer gets: the places of queries and keys."""

    queries: attention.Tokens
    keys: attention.Tokens


class Attention(nn.Module):
    """Multi-head attention of every token to all of its example."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, prefix: Any, context: Context) -> jax.Array:
        config = self.config
        shape = (*context.queries.segments.shape, config.num_attention_heads, config.head_dim)
        linear = functools.partial(_linear, config, self.dtype, config.hidden_size)
        query, key, value = (linear(name=name)(x).reshape(shape) for name in ("query", "key", "value"))
        before = 0
        if prefix is not None:
            key, value = (layers.after_prefix(part, own) for part, own in zip(prefix, (key, value), strict=True))
            before = len(prefix[0])
        rng = layers.dropout_rng(self)

        def attend(value: jax.Array) -> jax.Array:
            return attention.attention(
                query, key, value, context.queries, context.keys, None, before, causal=False, dropout=config.attention_dropout, rng=rng
            )

        layers.note_received(self, attend, value)
        return linear(name="output")(attend(value).reshape(x.shape[0], -1))


class Block(nn.Module):
    """One layer: norm(x + attention(x)), then norm(x + output(act(intermediate(x)))), on (tokens, hidden_size)."""

    config: EncoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, prefix: Any, cache: None, context: Context) -> tuple[jax.Array, None]:
        config = self.config
        linear = functools.partial(_linear, config, self.dtype)
        norm = functools.partial(layers.LayerNorm, config.layer_norm_eps, self.dtype)
        attended = Attention(config, self.dtype, name="attention")(x, prefix, context)
        attended = dropped(attended, config.attention_output_dropout, layers.dropout_rng(self))
        x = layers.join(self, "attention_output", x, attended, norm(name="attention_norm"))
        inner = layers.ACTIVATIONS[config.hidden_act](linear(config.intermediate_size, name="intermediate")(x))
        fed = dropped(linear(config.hidden_size, name="output")(inner), config.hidden_dropout, layers.dropout_rng(self))
        return layers.join(self, "mlp_output", x, fed, norm(name="output_norm")), cache


def _linear(config: EncoderConfig, dtype: Any, features: int, name: str | None = None) -> layers.Linear:
    return layers.Linear(features, True, dtype, nn.initializers.normal(config.initializer_range), name=name)


class Encoder(nn.Module):
    """An encoder with the head of a task.

    Attributes:
      config: its shape.
      dtype: the compute type.
      remat: what the backward pass computes again: none, dots, offload, full.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self) -> None:
        config = self.config
        drawn = nn.initializers.normal(config.initializer_range)
        table = functools.partial(layers.Embedding, features=config.embedding_size, dtype=self.dtype, embedding_init=drawn)
        self.embed = table(config.vocab_size)
        self.position_embed = table(config.position_offset + config.max_position_embeddings)
        if config.type_vocab_size:
            self.token_type_embed = table(config.type_vocab_size)
        self.embed_norm = layers.LayerNorm(config.layer_norm_eps, self.dtype)
        if config.embedding_size != config.hidden_size:
            self.embed_projection = _linear(config, self.dtype, config.hidden_size)
        self.layers = layers.Layers(Block, (config, self.dtype), config.num_hidden_layers, self.remat)
        self._make_head(drawn)

    def _make_head(self, drawn: layers.Initializer) -> None:
        config = self.config
        outputs = heads.outputs_of(self.task, config.labels)
        if self.task == heads.MASKED_LM:
            act = layers.ACTIVATIONS[config.lm_act]
            tied, size = config.tie_word_embeddings, config.embedding_size
            self.lm_head = heads.MaskedLMHead(config.vocab_size, size, act, config.layer_norm_eps, tied, self.dtype, drawn)
        elif self.task == heads.QUESTION_ANSWERING:
            self.qa_outputs = _linear(config, self.dtype, outputs)
        elif self.task == heads.SEQUENCE_CLASSIFICATION and config.pooling_head == DENSE:
            act = layers.ACTIVATIONS[config.pooling_act]
            self.classifier: Any = heads.DenseHead(outputs, act, config.classifier_dropout, self.dtype, drawn)
        else:
            if self.task == heads.SEQUENCE_CLASSIFICATION:
                self.pooler = _linear(config, self.dtype, config.hidden_size)
            self.classifier = _linear(config, self.dtype, outputs)

    @property
    def task(self) -> str:
        """What the head is for."""
        return self.config.task

    @property
    def head(self) -> tuple[str, ...]:
        """Patterns of the task's own parameters, which train with any method."""
        if self.task == heads.SEQUENCE_CLASSIFICATION:
            return _HEADS[self.config.pooling_head]
        if self.config.new_head:
            return ("lm_head",)
        return {heads.TOKEN_CLASSIFICATION: ("classifier",), heads.QUESTION_ANSWERING: ("qa_outputs",)}.get(self.task, ())

    @property
    def pooling(self) -> str:
        """An example's first token stands for all of it."""
        return heads.FIRST

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
    ) -> Output:
        """Returns the head's outputs, in the shape that its task has in transformers, and the hidden states of every token.

        A text with a position beyond max_position_embeddings has none that are numbers.

        Args:
          input_ids: (batch, length) int32.
          attention_mask: (batch, length), 0 at padding, which may be on either side.
          segment_ids: (batch, length) int32, for packed rows: 0 is padding, tokens attend within their number. Where the model has a
            prompt, each example of such rows begins with a place for each of its virtual tokens; without segment_ids they are put there.
          positions: (batch, length) int32, for packed rows.
          token_type_ids: (batch, length) int32, the kind of each token; None is 0.
        """
        before, input_ids, tokens, token_type_ids = self._placed(input_ids, attention_mask, segment_ids, positions, token_type_ids)
        hidden, states = self._run(input_ids, tokens, token_type_ids, 0.0, None)
        read = 0 if self.task == heads.SEQUENCE_CLASSIFICATION else before  # pooled is the first token, virtual or not, as in peft
        return heads.output(self, hidden[:, read:], tokens.segments[:, read:], tuple(state[:, before:] for state in (*states, hidden)))

    def features(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        neftune_alpha: jax.Array | float = 0.0,
        embedding_offset: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what the head reads, (batch, length, hidden_size), virtual tokens too; arguments as those of a call.

        With rngs={"noise": key}, embeddings get NEFTune's noise of strength `neftune_alpha`. `embedding_offset`, (batch, length,
        embedding_size), is added to the tokens' embeddings.
        """
        before, input_ids, tokens, token_type_ids = self._placed(input_ids, attention_mask, segment_ids, positions, token_type_ids)
        if embedding_offset is not None:
            embedding_offset = layers.with_room(embedding_offset, before)
        return self._run(input_ids, tokens, token_type_ids, neftune_alpha, embedding_offset)[0]

    def _placed(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        token_type_ids: jax.Array | None,
    ) -> tuple[int, jax.Array, attention.Tokens, jax.Array | None]:
        """How many places were put before each row for a prompt, and then the tokens, their places and their kinds (virtual ones': 0)."""
        prompt = layers.prompt(self, self.dtype)
        before = 0 if prompt is None or segment_ids is not None else len(prompt)
        if before:
            mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
            input_ids, attention_mask = layers.with_room(input_ids, before), layers.with_room(mask, before, 1)
            token_type_ids = None if token_type_ids is None else layers.with_room(token_type_ids, before)
            if positions is not None:
                order = jnp.broadcast_to(jnp.arange(before, dtype=jnp.int32), (len(positions), before))
                positions = jnp.concatenate([order, positions + before], axis=1)
        tokens = layers.token_places(input_ids.shape, attention_mask, segment_ids, positions, None)
        return before, input_ids, tokens, token_type_ids

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the head's outputs, (..., labels or vocabulary), of hidden (..., hidden_size): of any tokens, or of pooled ones."""
        return heads.on_rows(self._head, hidden)

    def _head(self, x: jax.Array) -> jax.Array:
        config = self.config
        if self.task == heads.MASKED_LM:
            return self.lm_head(x, self.embed.attend)
        if self.task == heads.QUESTION_ANSWERING:
            return self.qa_outputs(dropped(x, config.classifier_dropout, layers.dropout_rng(self)))
        if self.task == heads.SEQUENCE_CLASSIFICATION:
            if config.pooling_head == DENSE:
                return self.classifier(x)
            x = layers.ACTIVATIONS[config.pooling_act](self.pooler(x))
        return self.classifier(dropped(x, config.classifier_dropout, layers.dropout_rng(self)))

    def _run(
        self,
        input_ids: jax.Array,
        tokens: attention.Tokens,
        token_type_ids: jax.Array | None,
        neftune_alpha: jax.Array | float,
        embedding_offset: jax.Array | None,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The last layer's output, (batch, length, hidden_size), and the states before it."""
        prefix, prompt = layers.prefix(self, self.dtype), layers.prompt(self, self.dtype)
        words = layers.perturbed(self, self.embed(input_ids).astype(self.dtype), tokens, neftune_alpha, embedding_offset)
        if prompt is not None:
            words = layers.in_room(prompt, words, tokens)
        tokens, keys, _ = layers.entered(tokens, None, prefix)
        x = self._embedded(words, tokens, token_type_ids)
        flat, _, outputs = self.layers(x.reshape(-1, self.config.hidden_size), prefix, None, Context(tokens, keys))
        return flat.reshape(x.shape), [x, *[out.reshape(x.shape) for group in outputs for out in group][:-1]]

    def _embedded(self, x: jax.Array, tokens: attention.Tokens, token_type_ids: jax.Array | None) -> jax.Array:
        """The first layer's input, (batch, length, hidden_size), of the words' embeddings x (batch, length, embedding_size)."""
        config = self.config
        positions = layers.placed(self.position_embed, tokens.positions, config.max_position_embeddings, config.position_offset)
        x += positions.astype(self.dtype)
        if config.type_vocab_size:
            kinds = jnp.zeros_like(tokens.segments) if token_type_ids is None else token_type_ids
            x += self.token_type_embed(kinds).astype(self.dtype)
        x = dropped(self.embed_norm(x), config.hidden_dropout, layers.dropout_rng(self))
        if config.embedding_size != config.hidden_size:
            x = heads.on_rows(self.embed_projection, x)
        return x
