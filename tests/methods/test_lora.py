"""LoRA on a tiny model: what it starts as, what trains, what it merges to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, largest_difference, make_pair, moved, same_bits

import jaxft
from jaxft.errors import UserError
from jaxft.methods import LoRA, Method
from jaxft.methods.lora import LoRAKernel
from jaxft.models import segments
from jaxft.models.node import Node, is_node, node

# float32, logits of order 10: a product split in two is rounded otherwise
TOLERANCE = 1e-5
IDS = np.random.default_rng(0).integers(1, VOCABULARY, (2, 13)).astype(np.int32)


@functools.cache
def base():
    _, model, params = make_pair("llama", attention_bias=True)
    return model, params


@functools.cache
def program():
    model = base()[0]
    return jax.jit(lambda params: model.apply({"params": params}, IDS).logits)


def logits(params):
    return np.asarray(program()(params))


def kernels(params):
    """Returns each LoRA kernel by the name of its layer's kernel."""
    found = {}
    for leaf in segments.leaves(params, is_leaf=is_node):
        if isinstance(leaf.value, LoRAKernel):
            for index, name in enumerate(leaf.names):
                found[name] = leaf.value if leaf.layers is None else jax.tree.map(lambda part, i=index: part[i], leaf.value)
    return found


EVERY = {f"layers/{layer}/{part}/kernel" for layer in range(3) for part in (
    "attention/q_proj", "attention/k_proj", "attention/v_proj", "attention/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj",
)}  # fmt: skip


def test_lora_is_a_method():
    assert isinstance(LoRA(), Method)


def test_it_starts_as_the_base_exactly():
    model, params = base()
    assert np.array_equal(logits(LoRA(rank=4).init(jax.random.key(0), model, params)), logits(params))


def test_init_leaves_the_base_as_it_was():
    model, params = base()
    before = jax.tree.map(np.array, params)
    tuned = LoRA(rank=4).init(jax.random.key(0), model, params)
    assert same_bits(params, before)
    bases = jax.tree.map(lambda value: value.base if isinstance(value, LoRAKernel) else value, tuned, is_leaf=is_node)
    assert same_bits(bases, before)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("layers",), EVERY),
        (("q_proj", "v_proj"), {name for name in EVERY if "q_proj" in name or "v_proj" in name}),
        (("layers/[12]/mlp",), {name for name in EVERY if "mlp" in name and "layers/0" not in name}),
        (
            ("lm_head", "layers/0/attention/(q|k)_proj"),
            {"lm_head/kernel", "layers/0/attention/q_proj/kernel", "layers/0/attention/k_proj/kernel"},
        ),
    ],
    ids=["layers", "names", "numbers", "choice"],
)
def test_targets_choose_kernels_by_pattern(targets, expected):
    model, params = base()
    assert set(kernels(LoRA(rank=2, targets=targets).init(jax.random.key(0), model, params))) == expected


def test_the_mask_is_true_at_the_two_low_rank_leaves_and_nowhere_else():
    model, params = base()
    method = LoRA(rank=4, dropout=0.1, targets=("q_proj", "lm_head"))
    tuned = method.init(jax.random.key(0), model, params)
    mask = method.mask(tuned)
    assert jax.tree.structure(mask) == jax.tree.structure(tuned)
    trains = {leaf.title for leaf in segments.leaves(jaxft.partition(tuned, mask)[0])}
    assert trains == {
        f"{name}/{side}" for name in ("layers/0-2/attention/q_proj/kernel", "lm_head/kernel") for side in ("lora_a", "lora_b")
    }


def test_the_trainable_leaves_are_float32_on_a_bfloat16_base():
    model, params = base()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    method = LoRA(rank=4)
    tuned = method.init(jax.random.key(0), model, half)
    trainable, _ = jaxft.partition(tuned, method.mask(tuned))
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    bases = jax.tree.map(lambda value: value.base if isinstance(value, LoRAKernel) else value, tuned, is_leaf=is_node)
    assert same_bits(bases, half)


def test_a_merged_bfloat16_base_is_the_float32_sum_rounded_once():
    model, params = base()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    method = LoRA(rank=4, alpha=8.0, targets=("up_proj",))
    tuned = moved(method, model, half)
    merged = method.merge(model, tuned)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    made = tuned["layers"]["0-2"]["mlp"]["up_proj"]["kernel"]
    exact = np.asarray(made.base, np.float64) + 2.0 * np.asarray(made.lora_a, np.float64) @ np.asarray(made.lora_b, np.float64)
    found = np.asarray(merged["layers"]["0-2"]["mlp"]["up_proj"]["kernel"], np.float64)
    # rounding once to 8 bits of mantissa is half a unit of the last place; beside it float32's of sums of order 1
    np.testing.assert_array_less(np.abs(found - exact), 2.0**-8 * np.abs(exact) + 1e-6)


METHODS = {
    "all": LoRA(rank=4),
    "rslora": LoRA(rank=4, alpha=3.0, rslora=True),
    "patterns": LoRA(
        rank=4,
        rank_pattern=(("layers/0", 2), ("k_proj", 1)),
        alpha_pattern=(("up_proj", 3.0), ("layers/2/mlp", 5.0)),
        targets=("layers", "lm_head"),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_merged_is_unmerged(name):
    model, params = base()
    method = METHODS[name]
    tuned = moved(method, model, params, size=0.1)
    merged = method.merge(model, tuned)
    assert not any(map(is_node, jax.tree.leaves(merged, is_leaf=is_node)))
    found = logits(tuned)
    assert largest_difference(found, logits(merged)) <= TOLERANCE * max(1.0, np.abs(found).max())
    assert largest_difference(found, logits(params)) > 0.1  # it is a difference that shows


def test_merging_has_no_side_effect():
    model, params = base()
    method = METHODS["patterns"]
    tuned = moved(method, model, params)
    before = jax.tree.map(np.array, tuned)
    one, again = method.merge(model, tuned), method.merge(model, tuned)
    assert same_bits(tuned, before)
    assert same_bits(one, again)


def test_merging_what_was_never_trained_gives_the_base_bit_for_bit():
    model, params = base()
    method = LoRA(rank=4)
    assert same_bits(method.merge(model, method.init(jax.random.key(0), model, params)), params)


def test_ranks_alphas_and_scales_follow_the_patterns_first_match_first():
    model, params = base()
    method = METHODS["patterns"]
    found = kernels(method.init(jax.random.key(0), model, params))
    expected = {  # (rank, alpha)
        "layers/0/attention/k_proj/kernel": (2, 16.0),
        "layers/1/attention/k_proj/kernel": (1, 16.0),
        "layers/1/attention/q_proj/kernel": (4, 16.0),
        "layers/2/mlp/up_proj/kernel": (4, 3.0),
        "layers/2/mlp/down_proj/kernel": (4, 5.0),
        "layers/0/mlp/up_proj/kernel": (2, 3.0),
        "lm_head/kernel": (4, 16.0),
    }
    for name, (rank, alpha) in expected.items():
        assert found[name].lora_a.shape[-1] == found[name].lora_b.shape[-2] == rank == method.rank_of(name)
        np.testing.assert_allclose(found[name].scale, alpha / rank, rtol=1e-6)
    rooted = kernels(dataclasses.replace(method, rslora=True).init(jax.random.key(0), model, params))
    for name, (rank, alpha) in expected.items():
        np.testing.assert_allclose(rooted[name].scale, alpha / rank**0.5, rtol=1e-6)


def test_lora_a_is_uniform_in_one_over_the_root_of_its_inputs():
    model, params = base()
    found = kernels(LoRA(rank=8).init(jax.random.key(0), model, params))
    for name, kernel in found.items():
        drawn = np.asarray(kernel.lora_a) * kernel.lora_a.shape[0] ** 0.5
        assert np.abs(drawn).max() <= 1
        # 256 draws or more of variance 1/3: its standard deviation is 0.019 at most
        assert abs(drawn.var() - 1 / 3) <= 0.1, name
        assert not np.asarray(kernel.lora_b).any()


def test_what_is_drawn_depends_on_the_kernels_name_not_on_the_other_targets():
    model, params = base()
    alone = kernels(LoRA(rank=4, targets=("layers/1/mlp/up_proj",)).init(jax.random.key(0), model, params))
    every = kernels(LoRA(rank=4).init(jax.random.key(0), model, params))
    for name, kernel in alone.items():
        assert np.array_equal(kernel.lora_a, every[name].lora_a)
    draws = [kernel.lora_a for name, kernel in every.items() if "q_proj" in name]
    assert not np.array_equal(draws[0], draws[1])


# Dropout


@pytest.fixture(scope="module")
def dropping():
    """Returns run(seed) -> logits with dropout of 0.3, and the logits without."""
    model, params = base()
    tuned = moved(LoRA(rank=4, dropout=0.3, targets=("q_proj", "down_proj")), model, params, size=0.05)
    run = jax.jit(lambda key: model.apply({"params": tuned}, IDS, rngs={"dropout": key}).logits)
    return run, logits(tuned), tuned


def test_without_an_rng_nothing_is_dropped(dropping):
    _, plain, tuned = dropping
    off = jax.tree.map(lambda v: dataclasses.replace(v, dropout=None) if isinstance(v, LoRAKernel) else v, tuned, is_leaf=is_node)
    assert np.array_equal(plain, logits(off))


def test_the_key_decides_what_is_dropped(dropping):
    run, plain, _ = dropping
    one, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, plain)


def test_the_mean_over_keys_is_near_no_dropout():
    random = np.random.default_rng(0)
    x, kernel, a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((5, 16), (16, 6), (16, 4), (4, 6)))
    kernel_node = LoRAKernel(kernel, a, b, np.float32(0.5), jnp.float32(0.3))
    draws = np.asarray(jax.jit(jax.vmap(lambda key: kernel_node.dot(jnp.asarray(x), key)))(jax.random.split(jax.random.key(0), 4000)))
    plain = np.asarray(kernel_node.dot(jnp.asarray(x), None))
    spread = draws.std(axis=0)
    assert spread.min() > 0
    # a mean of 4000 has 1/63 of their deviation; 5 of those
    assert (np.abs(draws.mean(axis=0) - plain) <= 5 * spread / 4000**0.5).all()


def test_only_the_low_rank_branch_is_dropped_and_what_stays_is_scaled():
    x = np.ones((2000, 3), np.float32)
    one, zero = np.eye(3, dtype=np.float32), np.zeros((3, 3), np.float32)
    kernel_node = LoRAKernel(zero, one, one, np.float32(1), jnp.float32(0.25))
    out = np.asarray(kernel_node.dot(jnp.asarray(x), jax.random.key(0)))
    assert np.allclose(np.unique(out), [0, 1 / 0.75])
    assert abs((out == 0).mean() - 0.25) <= 0.03  # 6000 draws, deviation 0.0056
    whole = dataclasses.replace(kernel_node, base=one)
    np.testing.assert_allclose(whole.dot(jnp.asarray(x), jax.random.key(0)), out + 1, rtol=1e-6)


@node
@dataclasses.dataclass(frozen=True)
class Drawn(Node):
    """A kernel whose product is noise drawn from the key it is given."""

    base: jax.Array

    def dot(self, x, rng):
        return jax.random.normal(rng, (x.shape[0], self.base.shape[-1]))

    def dense(self):
        return self.base

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)

    def placement(self, spec):
        return Drawn(spec)


def test_each_layer_and_each_kernel_gets_a_key_of_its_own():
    """Where o_proj and down_proj give noise, a layer adds the sum of two draws: independent of each other and of other layers'."""
    model, params = base()

    def drawn(leaf):
        chosen = leaf.path[-2:] in (("o_proj", "kernel"), ("down_proj", "kernel"))
        return Drawn(leaf.value) if chosen else leaf.value

    run = jax.jit(lambda params, key: model.apply({"params": params}, IDS, rngs={"dropout": key}).hidden_states[:3])
    states = run(segments.map_leaves(drawn, params), jax.random.key(3))
    first, second = (np.diff(np.stack(states), axis=0) - _bias(params)).reshape(2, -1)
    count = first.size  # 832: a variance of 2 is known to 2 sqrt(2 / n), 0.1
    for added in (first, second):
        assert abs(added.var() - 2) <= 0.5  # one key for both: 4
    assert abs(np.corrcoef(first, second)[0, 1]) <= 5 / count**0.5


def _bias(params):
    """o_proj's bias, which the first two layers add beside the noise."""
    return np.asarray(params["layers"]["0-2"]["attention"]["o_proj"]["bias"])[:2, None, None]


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_prj",)}, "targets: the pattern 'q_prj' matches nothing. Did you mean 'q_proj'.*layers/N/attention/q_proj/kernel"),
        ({"targets": ("layers/7",)}, "method.targets: the pattern 'layers/7' matches nothing"),
        ({"targets": ("q_proj",), "rank_pattern": (("v_proj", 2),)}, "method.rank_pattern: the pattern 'v_proj' matches nothing"),
        ({"targets": ("q_proj",), "alpha_pattern": (("mlp", 2.0),)}, "method.alpha_pattern: the pattern 'mlp' matches nothing"),
        ({"rank": 33, "start": "pissa"}, "a rank of 33 is above that of any such matrix, 16"),
        ({"targets": ("norm",)}, "matches nothing"),
    ],
    ids=str,
)
def test_targets_that_are_not_there_are_named(settings, message):
    model, params = base()
    with pytest.raises(UserError, match=message):
        LoRA(**settings).init(jax.random.key(0), model, params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "at least 1, not 0"),
        ({"rank_pattern": (("q_proj", -1),)}, "not -1"),
        ({"dropout": 1.0}, "not 1.0"),
        ({"dropout": -0.1}, "not -0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LoRA(**settings)


# The node


def test_a_lora_around_a_lora_multiplies_and_merges_as_both():
    random = np.random.default_rng(0)
    x, kernel, a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((5, 16), (16, 6), (16, 4), (4, 6)))
    inner = LoRAKernel(kernel, a, b, np.float32(0.5), None)
    outer = LoRAKernel(inner, 2 * a, b, np.float32(0.25), None)
    expected = x.astype(np.float64) @ (kernel + a @ b)
    np.testing.assert_allclose(outer.dot(jnp.asarray(x), None), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outer.dense(), kernel + a @ b, rtol=1e-5, atol=1e-5)
    assert outer.shape == (16, 6)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.floats(0.1, 9.0), st.sampled_from(["float32", "bfloat16"]))
def test_a_lora_of_any_shape_and_rank_multiplies_as_its_whole_kernel(rows, columns, rank, scale, dtype):
    random = np.random.default_rng(rows + 10 * columns + 100 * rank)
    base, lora_a, lora_b, x = (random.normal(size=size) for size in ((rows, columns), (rows, rank), (rank, columns), (5, rows)))
    kernel = LoRAKernel(jnp.asarray(base, dtype), jnp.float32(lora_a), jnp.float32(lora_b), jnp.float32(scale), None)
    whole = np.asarray(kernel.base, np.float64) + np.float64(np.float32(scale)) * np.float32(lora_a) @ np.float64(np.float32(lora_b))
    assert (kernel.shape, kernel.dtype, kernel.dense().dtype) == ((rows, columns), jnp.dtype(dtype), jnp.float32)
    np.testing.assert_allclose(kernel.dense(), whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
    if dtype == "float32":
        found = kernel.dot(jnp.float32(x), None)
        np.testing.assert_allclose(found, np.float32(x) @ whole, rtol=1e-4, atol=1e-4 * scale * rank)
