"""Virtual tokens in a model: those of a real text are the text itself, which says where every token stands and what it sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import largest_difference, make_pair, moved

from jaxft.generation import Sampling, generate
from jaxft.methods import Prefix, Prompt
from jaxft.models import segments

TOLERANCE = 1e-5  # float32 rounding of logits of order 1 to 10
FIRST, SECOND = (5, 81, 33, 7, 60), (12, 9, 44)
METHODS = {
    "prefix": Prefix(len(FIRST), start="text", tokens=FIRST),
    "prompt": Prompt(len(FIRST), start="text", tokens=FIRST),
    "both": Prefix(len(FIRST), start="text", tokens=FIRST) + Prompt(len(SECOND), start="text", tokens=SECOND),
}
BEFORE = {"prefix": FIRST, "prompt": FIRST, "both": FIRST + SECOND}
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 6}, "gpt2": {}}


@functools.cache
def base(family="llama"):
    _, model, params = make_pair(family, **FAMILIES[family])
    return model, params


@functools.cache
def with_text(name, family="llama"):
    model, params = base(family)
    return model, METHODS[name].init(jax.random.key(0), model, params)


@functools.cache
def random_tokens(name):
    """Virtual tokens that are no text's."""
    model, params = base()
    if name == "both":
        return model, moved(Prefix(4) + Prompt(3), model, params)
    return model, moved({"prefix": Prefix(4), "prompt": Prompt(3)}[name], model, params)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, ids, mask=None, segment_ids=None, positions=None):
    return model.apply({"params": params}, ids, attention_mask=mask, segment_ids=segment_ids, positions=positions).logits


def random_ids(*shape):
    return np.random.default_rng(1).integers(1, 97, shape).astype(np.int32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_texts_virtual_tokens_are_the_text(name, family):
    ids = random_ids(2, 140)  # longer than a block of queries
    text = np.broadcast_to(np.asarray(BEFORE[name], np.int32), (2, len(BEFORE[name])))
    expected = logits(*base(family), np.concatenate([text, ids], axis=1))[:, len(BEFORE[name]) :]
    assert largest_difference(logits(*with_text(name, family), ids), expected) <= TOLERANCE * np.abs(expected).max()
    assert largest_difference(logits(*base(family), ids), expected) > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_padding_changes_nothing(name, side):
    model, params = random_tokens(name)
    row = random_ids(1, 9)
    pad = ((0, 0), (4, 0) if side == "left" else (0, 4))
    padded = logits(model, params, np.pad(row, pad, constant_values=3), np.pad(np.ones_like(row), pad))
    assert largest_difference(padded[:, 4:] if side == "left" else padded[:, :9], logits(model, params, row)) <= TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_packed_rows_with_a_shared_start_are_separate_rows(name):
    model, params = random_tokens(name)
    start, one, two = (random_ids(1, 16)[:, part] for part in (slice(0, 4), slice(4, 9), slice(9, 16)))
    packed = np.concatenate([start, one, two, np.zeros((1, 2), np.int32)], axis=1)
    segment_ids = np.asarray([[-1] * 4 + [1] * 5 + [2] * 7 + [0] * 2], np.int32)
    positions = np.asarray([[*range(4), *range(4, 9), *range(4, 11), 0, 0]], np.int32)
    together = logits(model, params, packed, None, segment_ids, positions)
    for end, place in ((one, slice(4, 9)), (two, slice(9, 16))):
        alone = logits(model, params, np.concatenate([start, end], axis=1))
        assert largest_difference(together[:, place], alone[:, 4:]) <= TOLERANCE
        assert largest_difference(together[:, :4], alone[:, :4]) <= TOLERANCE


def steps(model, params, ids, mask, first):
    """Logits by way of a cache: `first` tokens at once, the rest one by one."""
    variables = {"params": params}
    cache = model.apply(variables, len(ids), ids.shape[1], method="new_cache")
    out = model.apply(variables, ids[:, :first], attention_mask=mask[:, :first], cache=cache)

    def step(cache, token):
        new = model.apply(variables, token[0][:, None], attention_mask=token[1][:, None], cache=cache)
        return new.cache, new.logits[:, 0]

    _, rest = jax.lax.scan(step, out.cache, (ids[:, first:].T, mask[:, first:].T))
    return jnp.concatenate([out.logits, rest.swapaxes(0, 1)], axis=1)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_cache_gives_the_same_logits_also_where_layers_lie_in_several_stacks(name, cut):
    model, params = random_tokens(name)
    ids, mask = random_ids(2, 12), np.ones((2, 12), np.int32)
    mask[1, :3] = 0
    expected = np.asarray(logits(model, params, ids, mask))
    if cut:
        params = segments.regroup(params, lambda layer: layer == 1)
        assert len(params["layers"]) == 3
        assert largest_difference(logits(model, params, ids, mask)[mask == 1], expected[mask == 1]) <= TOLERANCE
    found = np.asarray(jax.jit(functools.partial(steps, model, first=6))(params, ids, mask))
    assert largest_difference(found[mask == 1], expected[mask == 1]) <= TOLERANCE


def test_a_sliding_window_counts_virtual_tokens_in_a_cache_too():
    model, params = with_text("both", "mistral")
    ids, mask = random_ids(2, 12), np.ones((2, 12), np.int32)
    found = jax.jit(functools.partial(steps, model, first=4))(params, ids, mask)
    assert largest_difference(found, logits(model, params, ids)) <= TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_generation_goes_on_as_greedy_choice_of_uncached_logits_does(name):
    model, params = random_tokens(name)
    prompts = [random_ids(7), random_ids(11)[2:]]
    for prompt, new in zip(prompts, generate(model, params, prompts, Sampling(max_new_tokens=6), batch_size=2), strict=True):
        whole = np.concatenate([prompt, new])[None]
        assert new.tolist() == np.argmax(np.asarray(logits(model, params, whole))[0, len(prompt) - 1 : -1], axis=-1).tolist()


def test_remat_changes_neither_loss_nor_gradients():
    model, params = random_tokens("both")
    ids = random_ids(2, 12)
    found = {}
    for remat in ("none", "dots", "full"):
        copy = model.clone(remat=remat)

        def loss(sites, copy=copy):
            out = copy.apply({"params": params | sites}, ids).logits
            return jnp.mean(jax.nn.logsumexp(out, axis=-1))

        found[remat] = jax.jit(jax.value_and_grad(loss))({site: params[site] for site in ("prefix", "prompt")})
    assert largest_difference(found["none"], found["dots"]) <= TOLERANCE
    assert largest_difference(found["none"], found["full"]) <= TOLERANCE
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found["none"][1]))


def test_hidden_states_are_those_of_the_text_alone():
    model, params = random_tokens("both")
    out = jax.jit(lambda params: model.apply({"params": params}, random_ids(2, 8)))(params)
    assert [state.shape for state in out.hidden_states] == [(2, 8, 32)] * 4
    assert out.logits.shape == (2, 8, 97)
