"""Generation against transformers' greedy, and sampling against its definition."""

import functools

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from program_shapes import shapes_of
from tiny_models import ROTARY, VOCABULARY, make_pair, moved

import jaxft
from jaxft import generation
from jaxft.errors import UserError
from jaxft.generation import Sampling, choose, generate

NEW = 8
MODELS = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "qwen2": ("qwen2", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    **{name: ("llama", settings) for name, settings in ROTARY.items()},
}


@functools.cache
def pair(name):
    family, settings = MODELS[name]
    return make_pair(family, **settings)


def prompts(lengths=(9, 3, 17)):
    """Prompts of different lengths; up to 64 tokens go in rows of one width."""
    random = np.random.default_rng(4)
    return [random.integers(1, VOCABULARY, length).astype(np.int32) for length in lengths]


MIXED = (9, 3, 17, 70, 64)  # rows of two widths


def greedy(reference, prompt, new=NEW, **options):
    """transformers' greedy continuation of one prompt, without a cache: the plainest program there is."""
    ids = torch.tensor(prompt)[None].long()
    with torch.no_grad():
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=False, pad_token_id=0, **options
        )
    return out[0, len(prompt) :].numpy()


@pytest.mark.parametrize(("name", "lengths"), [("llama", MIXED), *((name, (9, 3, 17)) for name in MODELS if name != "llama")])
def test_greedy_is_that_of_transformers_token_by_token(name, lengths):
    reference, model, params = pair(name)
    made = generate(model, params, prompts(lengths), Sampling(max_new_tokens=NEW), batch_size=4)
    for prompt, text in zip(prompts(lengths), made, strict=True):
        assert text.tolist() == greedy(reference, prompt).tolist()


def test_an_end_token_ends_a_text_and_is_left_out():
    reference, model, params = pair("llama")
    free = [greedy(reference, prompt) for prompt in prompts()]
    ends = (int(free[0][2]), int(free[1][5]))  # the first text ends early
    sampling = Sampling(max_new_tokens=NEW, eos_token_ids=ends)
    for text, prompt in zip(generate(model, params, prompts(), sampling, batch_size=4), prompts(), strict=True):
        expected = greedy(reference, prompt, eos_token_id=list(ends))
        stops = np.flatnonzero(np.isin(expected, ends))
        assert text.tolist() == expected[: stops[0] if len(stops) else NEW].tolist()
    assert len(generate(model, params, prompts()[:1], sampling, batch_size=4)[0]) <= 2


def test_generation_goes_through_a_method():
    _, model, base = pair("llama")
    method = jaxft.methods.LoRA(rank=2)
    tuned = moved(method, model, base)
    sampling = Sampling(max_new_tokens=NEW)
    with_lora, merged, plain = (
        np.concatenate(generate(model, params, prompts(), sampling, batch_size=4)) for params in (tuned, method.merge(model, tuned), base)
    )
    assert np.array_equal(with_lora, merged)
    assert not np.array_equal(with_lora, plain)


def products_in_the_loop(model, params):
    """Returns how often a token's program makes an array of the shape of up_proj."""
    tokens, mask = np.ones((2, 64), np.int32), np.ones((2, 64), np.int32)
    run = functools.partial(generation._generate, model, Sampling(max_new_tokens=NEW))
    traced = jax.make_jaxpr(run)(params, tokens, mask, jax.random.key(0)).jaxpr
    (loop,) = [equation for equation in traced.eqns if equation.primitive.name == "while"]
    return sum(shape[-2:] == (32, 56) for shape in shapes_of(loop.params["body_jaxpr"].jaxpr))


def test_the_norms_of_dora_are_made_once_a_batch_and_change_no_text(monkeypatch):
    _, model, base = pair("llama")
    # in a stack, outside of it, and under another method's node
    method = jaxft.methods.LoRA(rank=2, dora=True, targets=("up_proj", "q_proj", "embed"))
    method += jaxft.methods.IA3(targets=("up_proj",), feedforward=())
    tuned = moved(method, model, base)
    assert products_in_the_loop(model, tuned) == 0
    found = generate(model, tuned, prompts(), Sampling(max_new_tokens=NEW), batch_size=4)
    monkeypatch.setattr(generation, "prepared", lambda params: params)
    assert products_in_the_loop(model, tuned) > 0
    generation._program.cache_clear()
    plain = generate(model, tuned, prompts(), Sampling(max_new_tokens=NEW), batch_size=4)
    generation._program.cache_clear()
    assert [text.tolist() for text in found] == [text.tolist() for text in plain]


def test_prompts_of_one_width_share_one_compilation():
    _, model, params = pair("llama")
    sampling = Sampling(max_new_tokens=NEW, temperature=0.7, top_k=40, top_p=0.95)
    for lengths in ((3, 9), (17, 64, 1), (5,)):
        made = [np.arange(1, length + 1, dtype=np.int32) for length in lengths]
        generate(model, params, made, sampling, seed=len(lengths), batch_size=4)
    assert generation._program(model, sampling)._cache_size() == 1


def test_the_seed_decides_the_text():
    _, model, params = pair("llama")
    sampling = Sampling(max_new_tokens=NEW, temperature=0.7, top_k=40, top_p=0.95)
    one, again, other = (np.concatenate(generate(model, params, prompts(), sampling, seed, batch_size=4)) for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_each_answered_prompt_is_counted():
    _, model, params = pair("llama")
    counts = []
    generate(model, params, prompts(MIXED), Sampling(max_new_tokens=NEW), batch_size=4, done=counts.append)
    assert counts == [4, 1]


def distribution(logits, sampling):
    """The probabilities of the next token, from the definition, in float64."""
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0
    weights /= weights.sum()
    if sampling.top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= sampling.top_p]] = 0
        weights /= weights.sum()
    return weights


WORDS, DRAWS = 12, 4000
SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.5, top_k=5, top_p=0.8),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=2.0, top_p=0.05),
]
draw = jax.jit(jax.vmap(choose, in_axes=(None, 0, None)), static_argnums=2)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@settings(deadline=None, max_examples=5)
@given(
    # distinct words, a good way from each other, so that which of them are allowed doesn't hang on rounding
    ranks=st.permutations(range(WORDS)),
    steps=arrays(np.float32, WORDS, elements=st.floats(0.0625, 1.0, width=32)),
    seed=st.integers(0, 1000),
)
def test_words_are_drawn_from_the_distribution_that_the_settings_define(sampling, ranks, steps, seed):
    logits = np.cumsum(steps, dtype=np.float32)[list(ranks)]
    expected = distribution(logits, sampling)
    words = np.asarray(draw(logits[None], jax.random.split(jax.random.key(seed), DRAWS), sampling))
    shares = np.bincount(words.ravel(), minlength=WORDS) / DRAWS
    cumulated = np.sort(expected)[::-1].cumsum()
    if sampling.top_p == 1 or np.abs(cumulated - sampling.top_p).min() > 1e-4:
        assert not shares[expected == 0].any()
    # the shares of 4000 draws have a standard deviation of 0.008 at most; 6 of them almost never
    assert np.abs(shares - expected).max() <= 0.048


def test_of_equal_logits_top_k_keeps_all():
    logits = np.array([[2.0, 1.0, 1.0, 0.0]], np.float32)
    words = draw(logits, jax.random.split(jax.random.key(0), 500), Sampling(temperature=1.0, top_k=2))
    assert set(np.asarray(words).ravel().tolist()) == {0, 1, 2}


def test_greedy_takes_the_likeliest():
    logits = np.random.default_rng(0).standard_normal((5, 30)).astype(np.float32)
    assert np.array_equal(choose(logits, jax.random.key(0), Sampling()), logits.argmax(axis=-1))


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match="Sampling needs"):
        Sampling(**wrong)
