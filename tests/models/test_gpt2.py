"""The GPT-2 family against transformers, and its own parts: a fused kernel, learned positions, dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, load, make_pair, make_reference, same_bits

from jaxft.errors import UserError
from jaxft.generation import Sampling, generate
from jaxft.models.layers import REMAT

# float32 on both sides, states of order 1 to 10: a wrong operation is off by far more, rounding by far less
TOLERANCE = 1e-4

MODELS = {
    "gpt2": {},
    "untied": {"tie_word_embeddings": False, "activation_function": "relu"},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": None},
    "not scaled": {"scale_attn_weights": False, "activation_function": "gelu"},
}


@functools.cache
def pair(name="gpt2"):
    return make_pair("gpt2", **MODELS[name])


def ragged(side):
    """Returns ids and mask (3, 14), rows of 14, 9 and 4 tokens padded on `side`."""
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (3, 14)).astype(np.int32)
    mask = (np.arange(14) < np.array([14, 9, 4])[:, None]).astype(np.int32)
    return ids, mask if side == "right" else mask[:, ::-1].copy()


def theirs(reference, ids, mask):
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return reference(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions), output_hidden_states=True)


@functools.cache
def program(name):
    model = pair(name)[1]
    return jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, attention_mask=mask))


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name):
    reference, _, params = pair(name)
    for side in ("right", "left"):
        ids, mask = ragged(side)
        ours = program(name)(params, ids, mask)
        with torch.no_grad():
            expected = theirs(reference, ids, mask)
        assert len(ours.hidden_states) == len(expected.hidden_states)
        for one, other in zip((*ours.hidden_states, ours.logits), (*expected.hidden_states, expected.logits), strict=True):
            assert np.abs(np.asarray(one) - other.numpy())[mask == 1].max() <= TOLERANCE


@pytest.mark.parametrize("activation", ["silu", "tanh", "gelu_fast", "quick_gelu", "gelu_pytorch_tanh"])
def test_activations_are_those_of_transformers(activation):
    reference, model, params = make_pair("gpt2", activation_function=activation, num_hidden_layers=1)
    ids, mask = ragged("right")
    with torch.no_grad():
        expected = theirs(reference, ids, mask).logits.numpy()
    ours = model.apply({"params": params}, ids, attention_mask=mask).logits
    assert np.abs(np.asarray(ours) - expected)[mask == 1].max() <= TOLERANCE


@functools.cache
def gradients(name, remat="none"):
    _, model, params = pair(name)
    model = model.clone(remat=remat)
    ids, mask = ragged("right")

    def loss(params):
        features = model.apply({"params": params}, ids, attention_mask=mask, method="features")
        words = jax.nn.log_softmax(model.apply({"params": params}, features[:, :-1], method="logits"))
        scores = jnp.take_along_axis(words, ids[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(mask[:, 1:], scores, 0.0))

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("name", ["gpt2", "scaled by layer"])
def test_gradients_are_those_of_transformers(name):
    reference = pair(name)[0]
    ids, mask = ragged("right")
    reference.zero_grad()
    words = theirs(reference, ids, mask).logits[:, :-1].log_softmax(-1)
    scores = words.gather(-1, torch.tensor(ids[:, 1:, None]).long())[..., 0]
    (-(scores * torch.tensor(mask[:, 1:])).sum()).backward()
    ours = gradients(name)
    names = dict(reference.named_parameters())
    stack = ours["layers"]["0-2"]
    found = {"wte.weight": ours["embed"]["embedding"], "wpe.weight": ours["position_embed"]["embedding"], "ln_f.bias": ours["ln_f"]["bias"]}
    for layer in range(3):
        for inner, part in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            leaves = stack[{"attn": "attention"}.get(inner, inner)][part]
            found[f"h.{layer}.{inner}.{part}.weight"] = leaves["kernel"][layer]
            found[f"h.{layer}.{inner}.{part}.bias"] = leaves["bias"][layer]
        found |= {f"h.{layer}.{norm}.weight": stack[norm]["scale"][layer] for norm in ("ln_1", "ln_2")}
    for key, gradient in found.items():
        expected = names[f"transformer.{key}"].grad.numpy()
        assert np.abs(np.asarray(gradient) - expected).max() <= TOLERANCE * np.abs(expected).max(), key


@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"none"}))
def test_remat_gives_the_same_gradients(remat):
    expected, found = gradients("gpt2"), gradients("gpt2", remat)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        # the same sums, fused differently by the compiler: float32 rounding of the largest entry
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6 * np.abs(one).max())


def test_no_token_depends_on_later_ones_or_on_another_example():
    """Each place of the row has a word of its own, so that a row of the embedding is the input of one place."""
    _, model, params = make_pair("gpt2", num_hidden_layers=2, tie_word_embeddings=False)
    ids = np.arange(10, dtype=np.int32)[None]
    segments = np.array([[-1, -1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 2, 3, 4, 0, 0]], np.int32)

    def logits(embedding):
        replaced = params | {"embed": {"embedding": embedding}}
        return model.apply({"params": replaced}, ids, segment_ids=segments, positions=positions).logits[0].sum(axis=-1)

    jacobian = np.asarray(jax.jit(jax.jacrev(logits))(params["embed"]["embedding"]))[:, :10]
    later = np.arange(10)[:, None] >= np.arange(10)
    own = segments[0][:, None] == segments[0]
    prefix = (segments[0] == -1) & (segments[0] != 0)[:, None]
    assert np.array_equal((jacobian != 0).any(axis=-1), later & (own | prefix))


def test_a_row_with_a_position_beyond_the_table_is_no_number():
    model, params = load(make_reference("gpt2", max_position_embeddings=8, num_hidden_layers=1))
    ids, mask = np.ones((2, 10), np.int32), np.ones((2, 10), np.int32)
    mask[0, 8:] = 0
    logits = np.asarray(model.apply({"params": params}, ids, attention_mask=mask).logits)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()


@pytest.mark.parametrize(("length", "new"), [(5, 4), (9, 1)])
def test_texts_longer_than_the_table_of_positions_are_refused(length, new):
    model, params = load(make_reference("gpt2", max_position_embeddings=8, num_hidden_layers=1))
    with pytest.raises(UserError, match=f"{length} tokens, and its answer may have {new}; the model has 8 positions"):
        generate(model, params, [np.ones(length, np.int32)], Sampling(max_new_tokens=new))


def dropping(**rates):
    """Returns a model with those dropout rates alone, and its parameters."""
    off = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    _, model, params = make_pair("gpt2", num_hidden_layers=2, **(off | rates))
    return model, params


@pytest.mark.parametrize("kind", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_is_drawn_from_its_key_and_off_without_one(kind):
    model, params = dropping(**{kind: 0.5})
    ids, _ = ragged("right")

    @jax.jit
    def logits(seed):
        return model.apply({"params": params}, ids, rngs={"dropout": jax.random.key(seed)}).logits

    plain = model.apply({"params": params}, ids).logits
    assert same_bits(plain, dropping()[0].apply({"params": params}, ids, rngs={"dropout": jax.random.key(0)}).logits)
    assert same_bits(logits(0), logits(0))
    assert np.abs(np.asarray(logits(0) - plain)).max() > 0.1
    assert np.abs(np.asarray(logits(0) - logits(1))).max() > 0.1


def test_embeddings_are_dropped_after_positions_are_added():
    model, params = dropping(embd_pdrop=0.25)
    ids, _ = ragged("right")
    plain = np.asarray(model.apply({"params": params}, ids).hidden_states[0])
    found = np.asarray(model.apply({"params": params}, ids, rngs={"dropout": jax.random.key(0)}).hidden_states[0])
    kept = found != 0
    np.testing.assert_allclose(found[kept], plain[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.05  # of 1344 numbers: four standard deviations


def test_what_the_sublayers_give_is_dropped_each_by_itself():
    """With kernels of zero a layer adds its biases; where one is dropped, nothing is added there."""
    model, params = dropping(resid_pdrop=0.25)
    zero = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * 0 if "kernel" in jax.tree_util.keystr(path) else leaf, params)
    ids, _ = ragged("right")
    states = model.apply({"params": zero}, ids, rngs={"dropout": jax.random.key(0)}).hidden_states
    stack = params["layers"]["0-1"]
    added = [stack[part]["c_proj"]["bias"][0] / 0.75 for part in ("attention", "mlp")]
    differences = np.asarray(states[1] - states[0])
    choices = np.stack([a * added[0] + b * added[1] for a in (0, 1) for b in (0, 1)])  # (choice, features)
    near = np.abs(differences[..., None, :] - choices) <= 1e-5
    assert near.any(axis=-2).all()
    shares = near.mean(axis=(0, 1, 3))  # none, the MLP's, attention's, both
    np.testing.assert_allclose(shares, [1 / 16, 3 / 16, 3 / 16, 9 / 16], atol=0.06)


def test_bfloat16_stays_near_float32():
    model, params = load(pair()[0], dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    ids, mask = ragged("right")

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, params):
        return model.apply({"params": params}, ids, attention_mask=mask).logits

    half = logits(model, params)
    assert half.dtype == jnp.bfloat16
    exact = logits(model.clone(dtype=jnp.float32), jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    error = np.abs(np.asarray(half, np.float32) - exact)[mask == 1]
    # 8 bits of mantissa: 2**-8 a rounding, some tens of them one after the other through three layers
    assert error.max() <= 0.05 * np.abs(exact).max()
    assert error.max() > 0  # it did compute in bfloat16
