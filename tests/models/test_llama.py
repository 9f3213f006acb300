"""The Llama family against transformers, and what a causal model promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, load, make_pair, make_reference, same_bits

from jaxft.models.layers import REMAT

# float32 on both sides, states of order 1 to 10: a wrong operation is off by far more, rounding by far less
TOLERANCE = 1e-4

MODELS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "some layers with a window": ("qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
}


@functools.cache
def pair(name):
    family, settings = MODELS[name]
    return make_pair(family, **settings)


def ragged(side):
    """Returns ids and mask (3, 14), rows of 14, 9 and 4 tokens padded on `side`."""
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (3, 14)).astype(np.int32)
    mask = (np.arange(14) < np.array([14, 9, 4])[:, None]).astype(np.int32)
    return ids, mask if side == "right" else mask[:, ::-1].copy()


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name):
    reference, model, params = pair(name)
    run = jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, attention_mask=mask))
    for side in ("right", "left"):
        ids, mask = ragged(side)
        ours = run(params, ids, mask)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        with torch.no_grad():
            theirs = reference(
                torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions), output_hidden_states=True
            )
        assert len(ours.hidden_states) == len(theirs.hidden_states)
        for one, other in zip((*ours.hidden_states, ours.logits), (*theirs.hidden_states, theirs.logits), strict=True):
            assert np.abs(np.asarray(one) - other.numpy())[mask == 1].max() <= TOLERANCE


@pytest.mark.parametrize("window", [None, 4])
def test_no_token_depends_on_later_ones(window):
    """Each position has a word of its own, so that a row of the embedding is the input of one position."""
    _, model, params = make_pair("llama" if window is None else "mistral", num_hidden_layers=1, sliding_window=window)
    ids = np.arange(10, dtype=np.int32)[None]

    def logits(embedding):
        return model.apply({"params": params | {"embed": {"embedding": embedding}}}, ids).logits[0].sum(axis=-1)

    jacobian = np.asarray(jax.jit(jax.jacrev(logits))(params["embed"]["embedding"]))[:, :10]  # (output, input, features)
    depends = (jacobian != 0).any(axis=-1)
    distance = np.arange(10)[:, None] - np.arange(10)
    assert np.array_equal(depends, (distance >= 0) & (distance < (window or 10)))


def test_no_token_depends_on_another_example_of_its_row():
    _, model, params = make_pair("llama", num_hidden_layers=2)
    ids = np.arange(10, dtype=np.int32)[None]
    segments = np.array([[-1, -1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 2, 3, 4, 0, 0]], np.int32)

    def logits(embedding):
        replaced = params | {"embed": {"embedding": embedding}}
        return model.apply({"params": replaced}, ids, segment_ids=segments, positions=positions).logits[0].sum(axis=-1)

    jacobian = np.asarray(jax.jit(jax.jacrev(logits))(params["embed"]["embedding"]))[:, :10]
    depends = (jacobian != 0).any(axis=-1)
    later = np.arange(10)[:, None] >= np.arange(10)
    own = segments[0][:, None] == segments[0]
    prefix = (segments[0] == -1) & (segments[0] != 0)[:, None]
    assert np.array_equal(depends, later & (own | prefix))


@pytest.fixture(scope="module")
def gradients():
    """Returns the gradient of all parameters under a remat policy."""
    _, model, params = pair("llama")
    ids, mask = ragged("right")

    @functools.cache
    def found(remat):
        remade = model.clone(remat=remat)

        def loss(params):
            return jnp.mean(jnp.square(remade.apply({"params": params}, ids, attention_mask=mask, method="features")))

        return jax.jit(jax.grad(loss))(params)

    return found


@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"none"}))
def test_remat_gives_the_same_gradients(remat, gradients):
    expected, found = gradients("none"), gradients(remat)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        # the same sums, fused differently by the compiler: float32 rounding of the largest entry
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6 * np.abs(one).max())


def test_full_remat_makes_products_again_and_dots_keeps_them():
    _, model, params = pair("llama")
    ids, _ = ragged("right")

    def products(remat):
        remade = model.clone(remat=remat)
        program = jax.make_jaxpr(jax.grad(lambda params: remade.apply({"params": params}, ids, method="features").sum()))(params)
        return str(program).count("dot_general")

    assert products("none") <= products("dots") < products("full")


def test_remat_is_one_of_the_policies():
    _, model, params = pair("llama")
    with pytest.raises(Exception, match="no remat policy 'ful'. Did you mean 'full'"):
        model.clone(remat="ful").apply({"params": params}, np.ones((1, 2), np.int32))


def test_bfloat16_stays_near_float32():
    family, settings = MODELS["qwen3"]
    model, params = load(make_reference(family, **settings), dtype="bfloat16")
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


def test_rows_alone_and_in_a_batch_have_the_same_logits():
    _, model, params = pair("llama")
    ids, _ = ragged("right")
    run = jax.jit(lambda ids: model.apply({"params": params}, ids).logits)
    together = np.asarray(run(ids))
    for row in range(len(ids)):
        assert np.abs(np.asarray(run(ids[row : row + 1])[0]) - together[row]).max() <= 1e-5  # the same products in another order


def test_new_parameters_are_drawn_from_the_key():
    model = pair("llama")[1]
    draw = jax.jit(lambda seed: model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"])
    one, again, other = draw(0), draw(0), draw(1)
    assert same_bits(one, again)
    kernel = one["layers"]["0-2"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernel, other["layers"]["0-2"]["mlp"]["up_proj"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1])  # each layer its own
