"""What the families share: parameters, linear layers, norms, the stack of layers, the key-value cache."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jaxft.errors import unknown
from jaxft.models import segments
from jaxft.models.attention import KEPT, PADDING, SHARED, Tokens, visible
from jaxft.models.mesh import by_rows
from jaxft.models.node import Node, dot, linear, take

Initializer = Callable[..., jax.Array]


def made_again(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an elementwise function whose backward pass keeps what it was given, and makes its parts again."""
    return jax.checkpoint(function, prevent_cse=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": made_again(nn.silu),
    "swish": made_again(nn.silu),
    "relu": nn.relu,
    "gelu": made_again(lambda x: nn.gelu(x, approximate=False)),
    "gelu_new": made_again(nn.gelu),
    "gelu_fast": made_again(nn.gelu),
    "gelu_pytorch_tanh": made_again(nn.gelu),
    "quick_gelu": made_again(lambda x: x * nn.sigmoid(1.702 * x)),
    "tanh": jnp.tanh,
}

HOST_MEMORY = "pinned_host"  # what jax calls the host's memory that devices read and write
REMAT: dict[str, Any] = {  # what the backward pass keeps of a layer
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[KEPT], offload_src="device", offload_dst=HOST_MEMORY
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Roles:
    """What a family calls the kernels that methods choose by their part in a layer, patterns; one kernel may have several parts."""

    keys: str
    values: str
    mlp_output: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far.

    `layers` maps each segment of layers to its keys and values, two (layers, batch, size, key_value_heads, head_dim) arrays.
    """

    layers: dict[str, tuple[jax.Array, jax.Array]]
    segments: jax.Array  # (batch, size) int32, PADDING where nothing stands yet
    positions: jax.Array  # (batch, size) int32
    index: jax.Array  # () int32, where the next token goes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a model returns.

    `logits` is (batch, length, vocabulary), of token classification (batch, length, labels), of sequence classification (batch, labels);
    question answering has `start_logits` and `end_logits`, (batch, length), in its place. `hidden_states` holds the embeddings and each
    layer's output, the last one after the final norm, layers + 1 arrays of (batch, length, hidden_size), as transformers orders them.
    Under `jax.jit` what isn't read isn't computed.
    """

    logits: Any
    hidden_states: tuple[jax.Array, ...]
    cache: Cache | None = None
    start_logits: Any = None
    end_logits: Any = None


def parameter(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns the module's parameter, as it is stored: an array, or whatever node a method or a number format put there."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, dtype)


def dropout_rng(module: nn.Module) -> jax.Array | None:
    """Returns a key where `apply` was given rngs={"dropout": key}; without one the model doesn't drop."""
    return module.make_rng("dropout") if module.has_rng("dropout") else None


class Linear(nn.Module):
    """x (tokens, in) -> (tokens, features), parameters `kernel` (in, features) and `bias` (features,)."""

    features: int
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.dtype) if self.use_bias else None
        return checkpoint_name(linear(x, kernel, bias, dropout_rng(self)), KEPT)


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467); parameter `scale`."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), self.dtype)

        @made_again
        def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
            wide = x.astype(jnp.float32)
            normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
            return normed.astype(x.dtype) * scale.astype(x.dtype)

        return norm(x, scale)


class LayerNorm(nn.Module):
    """Norm to mean 0 and variance 1 over the last axis, in float32 (Ba et al. 2016, arXiv:1607.06450); parameters `scale` and `bias`."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],), self.dtype)

        @made_again
        def norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
            wide = x.astype(jnp.float32)
            centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
            normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
            return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)

        return norm(x, scale, bias)


class Embedding(nn.Module):
    """ids (batch, length) int32 -> (batch, length, features); parameter `embedding` (vocabulary, features)."""

    vocabulary: int
    features: int
    dtype: Any = jnp.float32
    embedding_init: Initializer = nn.initializers.normal(0.02)

    def setup(self) -> None:
        self.embedding = parameter(self, "embedding", self.embedding_init, (self.vocabulary, self.features), self.dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return take(ids, self.embedding)

    def attend(self, x: jax.Array) -> jax.Array:
        """x (tokens, features) -> (tokens, vocabulary), for heads tied to the embedding.

        On CPU the logits are made as they are stored in the table, a row a word, and then turned: measured with 168 tokens and 49,152
        words, a third of the time of the product that XLA makes of it. The barrier keeps XLA from making that one.
        """
        table: Any = self.embedding
        while isinstance(table, Node):
            table = table.tied()
        if jax.default_backend() == "cpu":
            return jax.lax.optimization_barrier(dot(table, x.T)).T
        return dot(x, table.T)


def placed(table: Embedding, positions: jax.Array, count: int, offset: int = 0) -> jax.Array:
    """Returns the learned embeddings of positions (batch, length), (batch, length, features); NaN for those from `count` on.

    Args:
      table: has `offset` rows that no text uses before that of its first position.
      positions: within the text.
      count: of positions that a text may have.
      offset: of the first one's row.
    """
    return jnp.where((positions < count)[:, :, None], table(positions + offset), jnp.nan)


def join(
    module: nn.Module, name: str, residual: jax.Array, output: jax.Array, norm: Callable[[jax.Array], jax.Array] = lambda joined: joined
) -> jax.Array:
    """Returns norm(residual + output), (tokens, features), or of what the node at the module's site `name` makes of the sum."""
    if not module.has_variable("params", name):
        return norm(residual + output)
    found: Any = module.get_variable("params", name)
    return norm(found.join(residual, output, dropout_rng(module), norm))


RECEIVED = "received"  # the collection of how much attention tokens get: `apply(..., mutable=[RECEIVED])` asks for it


def note_received(module: nn.Module, attend: Callable[[jax.Array], jax.Array], value: jax.Array) -> None:
    """Notes how much attention each key gets, where it is asked for: the sum over queries and the mean over heads of its weights.

    Attention is linear in the values, and what its sum's gradient in a value is are the weights that the value gets.

    Args:
      module: of one layer's attention.
      attend: values (batch, keys, key_value_heads, head_dim) -> outputs (batch, queries, heads, head_dim).
      value: the values.
    """
    if module.is_initializing() or not module.is_mutable_collection(RECEIVED):
        return
    out, back = jax.vjp(attend, value)
    weights = back(jnp.ones_like(out))[0].astype(jnp.float32)
    module.sow(RECEIVED, RECEIVED, jnp.sum(weights, axis=(2, 3)) / (out.shape[2] * out.shape[3]))


def received(collections: Any, length: int) -> jax.Array:
    """Returns the attention that each of a row's last `length` tokens gets, (batch, length) float32: the mean over layers and heads."""
    return jnp.mean(jnp.concatenate(jax.tree.leaves(collections[RECEIVED])), axis=0)[:, -length:]


class Layers(nn.Module):
    """The stack of layers, one scan a segment. How layers are grouped is read off the parameters; a new model has one group.

    `block(*settings)` is one layer, a module called as block(x, per_layer, cache, shared) -> (x, new cache).
    """

    block: type[nn.Module]
    settings: tuple[Any, ...]
    depth: int
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, per_layer: Any, cache: Cache | None, shared: Any) -> tuple[jax.Array, dict[str, Any], list[jax.Array]]:
        """Runs all layers.

        Args:
          x: (tokens, features).
          per_layer: a pytree whose leaves have a leading axis over all layers.
          cache: keys and values, or None.
          shared: what every layer gets.

        Returns:
          the last layer's output, the new cache's layers, and every layer's output, (layers, tokens, features) a segment.
        """
        if self.remat not in REMAT:
            raise unknown("remat policy", self.remat, REMAT)
        block = self.block(*self.settings, parent=None)
        groups = self._groups()
        if self.is_initializing():
            self._create(block, x, per_layer, shared)
        rng = dropout_rng(self)
        new_cache, outputs = {}, []
        for group in groups:
            name = segments.key(group)
            stored: Any = self.get_variable("params", name)
            chosen = jax.tree.map(lambda leaf, g=group: leaf[g[0] : g[-1] + 1], per_layer)
            scanned = (segments.own(stored), chosen, cache.layers[name] if cache else None, jnp.asarray(group))
            x, (new_cache[name], hidden, noted) = jax.lax.scan(self._body(block, stored, shared, rng), x, scanned)
            outputs.append(hidden)
            for per_layer_noted in jax.tree.leaves(noted):
                self.sow(RECEIVED, RECEIVED, per_layer_noted)
        return x, new_cache, outputs

    def _groups(self) -> list[range]:
        """The segments that are stored; every layer is in one of them."""
        stored = self.variables.get("params", {})
        groups = segments.spans({segments.LAYERS: stored}) if stored else [range(self.depth)]
        chex.assert_equal([layer for group in groups for layer in group], list(range(self.depth)))
        return groups

    def _create(self, block: nn.Module, x: jax.Array, per_layer: Any, shared: Any) -> None:
        """Draws the parameters of a new model: one segment of all layers."""
        first = jax.tree.map(lambda leaf: leaf[0], per_layer)

        def draw(rng: jax.Array) -> Any:
            return jax.vmap(lambda key: block.init(key, x, first, None, shared)["params"])(jax.random.split(rng, self.depth))

        self.param(segments.key(range(self.depth)), draw)

    def _body(self, block: nn.Module, stored: Any, shared: Any, rng: jax.Array | None) -> Any:
        """One layer as a step of the scan over a segment."""

        asked = [RECEIVED] if self.is_mutable_collection(RECEIVED) and not self.is_initializing() else []

        def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, tuple[Any, jax.Array, Any]]:
            own, chosen, cache, layer = scanned
            variables = {"params": segments.with_shared(own, stored)}
            rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, layer)}
            (x, cache), noted = block.apply(variables, by_rows(x), chosen, cache, shared, rngs=rngs, mutable=asked)
            x = by_rows(x)
            return x, (cache, x, noted)

        return body if self.remat == "none" else jax.checkpoint(body, prevent_cse=False, policy=REMAT[self.remat])


def token_places(
    shape: tuple[int, ...],
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    cache: Cache | None,
) -> Tokens:
    """Returns where each of (batch, length) tokens stands, from whichever of the three a caller gave.

    A row without segment ids is one segment, its padding (attention_mask 0) on either side; positions count the row's real tokens.
    """
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32) if attention_mask is None else (attention_mask != 0).astype(jnp.int32)
    chex.assert_shape(segment_ids, shape)
    if positions is None:
        counted = jnp.cumsum(segment_ids != PADDING, axis=1, dtype=jnp.int32) - 1
        if cache is not None:
            counted += jnp.sum(cache.segments != PADDING, axis=1, keepdims=True, dtype=jnp.int32)
        positions = jnp.maximum(counted, 0)
    chex.assert_shape(positions, shape)
    start = jnp.int32(0) if cache is None else cache.index
    return Tokens(segment_ids, positions, start + jnp.arange(shape[1], dtype=jnp.int32))


def extend(cache: Cache, tokens: Tokens) -> tuple[Cache, Tokens]:
    """Returns the cache with the new tokens' places entered (their keys and values come later), and the places of all its keys."""
    placed = dataclasses.replace(
        cache,
        segments=jax.lax.dynamic_update_slice_in_dim(cache.segments, tokens.segments, cache.index, axis=1),
        positions=jax.lax.dynamic_update_slice_in_dim(cache.positions, tokens.positions, cache.index, axis=1),
        index=cache.index + tokens.order.shape[0],
    )
    return placed, Tokens(placed.segments, placed.positions, jnp.arange(cache.segments.shape[1], dtype=jnp.int32))


def appended(held: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], index: Any) -> tuple[jax.Array, jax.Array]:
    """Returns one layer's cached keys and values, (batch, size, heads, head_dim), with the new tokens' from `index` on."""
    key, value = (
        jax.lax.dynamic_update_slice_in_dim(old, own.astype(old.dtype), index, axis=1) for old, own in zip(held, new, strict=True)
    )
    return key, value


def empty_cache(params: Any, shape: tuple[int, int, int, int], dtype: Any) -> Cache:
    """Returns a cache of (batch, size, key_value_heads, head_dim) a layer, grouped as the segments of `params` are."""
    held: Any = {
        segments.key(group): tuple(jnp.zeros((len(group), *shape), dtype) for _ in ("key", "value")) for group in segments.spans(params)
    }
    return Cache(held, jnp.zeros(shape[:2], jnp.int32), jnp.zeros(shape[:2], jnp.int32), jnp.int32(0))


def entered(tokens: Tokens, cache: Cache | None, prefix: tuple[jax.Array, jax.Array] | None) -> tuple[Tokens, Tokens, Cache | None]:
    """Returns the places of the queries and of all keys, behind a cache's tokens or a prefix's, and the cache with the places entered."""
    if cache is not None:
        cache, keys = extend(cache, tokens)
        return tokens, keys, cache
    if prefix is None:
        return tokens, tokens, None
    count = prefix[0].shape[1]
    return moved(tokens, count), after_virtual_tokens(tokens, count), None


def prefix(module: nn.Module, dtype: Any) -> tuple[jax.Array, jax.Array] | None:
    """Returns every layer's keys and values of the model's site `prefix`, or None."""
    found = _site(module, "prefix")
    if found is None:
        return None
    key, value = found.keys_values()
    return key.astype(dtype), value.astype(dtype)


def prompt(module: nn.Module, dtype: Any) -> jax.Array | None:
    """Returns the embeddings of the model's site `prompt`, (virtual_tokens, hidden_size), or None."""
    found = _site(module, "prompt")
    return None if found is None else found.embeddings().astype(dtype)


def _site(module: nn.Module, name: str) -> Any:
    return module.variables["params"].get(name) if "params" in module.variables else None


def virtual_tokens(batch: int, count: int, first: int = 0) -> Tokens:
    """Returns the places of virtual tokens that stand before the text, seen by all its examples; `first` is the first one's position."""
    order = jnp.arange(first, first + count, dtype=jnp.int32)
    return Tokens(jnp.full((batch, count), SHARED, jnp.int32), jnp.broadcast_to(order, (batch, count)), order)


def with_room(values: jax.Array, count: int, value: int = 0) -> jax.Array:
    """Returns (batch, length, ...) with `count` places of a value before each row."""
    return jnp.pad(values, [(0, 0), (count, 0), *[(0, 0)] * (values.ndim - 2)], constant_values=value)


def in_room(prompt: jax.Array, x: jax.Array, tokens: Tokens) -> jax.Array:
    """Returns embeddings x (batch, length, features) with a prompt, (count, features), in the first places of each example."""
    count = len(prompt)
    there = (tokens.segments != PADDING) & (tokens.positions < count)
    return jnp.where(there[:, :, None], prompt[jnp.minimum(tokens.positions, count - 1)], x)


def moved(tokens: Tokens, count: int) -> Tokens:
    """Returns the places of tokens that `count` virtual ones come before."""
    return Tokens(tokens.segments, tokens.positions + count, tokens.order + count)


def after_virtual_tokens(tokens: Tokens, count: int) -> Tokens:
    """Returns the places of `count` virtual tokens and of `tokens` after them."""
    first, rest = virtual_tokens(len(tokens.segments), count), moved(tokens, count)
    return Tokens(
        jnp.concatenate([first.segments, rest.segments], axis=1),
        jnp.concatenate([first.positions, rest.positions], axis=1),
        jnp.concatenate([first.order, rest.order]),
    )


def after_prefix(prefix: jax.Array, own: jax.Array) -> jax.Array:
    """Returns one layer's keys or values of a prefix, (count, heads, head_dim), before each row's own, (batch, length, heads, head_dim)."""
    return jnp.concatenate([jnp.broadcast_to(prefix, (len(own), *prefix.shape)).astype(own.dtype), own], axis=1)


def filled(cache: Cache, prefix: tuple[jax.Array, jax.Array]) -> Cache:
    """Returns an empty cache with a prefix in it: keys and values, (layers, count, heads, head_dim) each."""
    batch, count = len(cache.segments), prefix[0].shape[1]
    tokens = virtual_tokens(batch, count)
    held: Any = {
        name: tuple(empty.at[:, :, :count].set(part[group[0] : group[-1] + 1, None]) for empty, part in zip(pair, prefix, strict=True))
        for name, pair in cache.layers.items()
        for group in [segments.span(name)]
    }
    return dataclasses.replace(extend(cache, tokens)[0], layers=held)


def embedding_noise(rng: jax.Array, alpha: jax.Array | float, tokens: Tokens, features: int) -> jax.Array:
    """Returns NEFTune's noise, (batch, length, features): uniform in +-alpha / sqrt(length of the example * features).

    Jain et al. 2023, arXiv:2310.05914; the length is that of the example, a shared prefix included, so that packing and padding change
    nothing. The prefix's own tokens know of no example and count themselves only: train with noise on rows that share none.
    """
    length = jnp.sum(visible(tokens, tokens, None, causal=False), axis=-1, dtype=jnp.float32)
    noise = jax.random.uniform(rng, (*tokens.segments.shape, features), minval=-1.0, maxval=1.0)
    return noise * (alpha / jnp.sqrt(length * features))[:, :, None]


def perturbed(module: nn.Module, x: jax.Array, tokens: Tokens, alpha: jax.Array | float, offset: jax.Array | None) -> jax.Array:
    """Returns embeddings x (batch, length, features) with NEFTune's noise where the module has the key `noise`, and with `offset` added.

    Args:
      module: of it the keys.
      x: of the tokens alone, without positions.
      tokens: their places.
      alpha: strength of the noise.
      offset: (batch, length, features), or None; its gradient is that of the tokens' embeddings.
    """
    if module.has_rng("noise"):
        x += embedding_noise(module.make_rng("noise"), alpha, tokens, x.shape[-1]).astype(x.dtype)
    return x if offset is None else x + offset.astype(x.dtype)
