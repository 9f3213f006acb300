"""Partition, combine, and the one pattern language."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import same_bits

from jaxft.errors import UserError
from jaxft.methods import partition as parts
from jaxft.methods.lora import LoRAKernel

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from(["float32", "float16", "bfloat16", "int8", "uint32", "bool"]).map(jnp.dtype)
LEAVES = st.builds(lambda shape, dtype: np.arange(math.prod(shape)).reshape(shape).astype(dtype), SHAPES, DTYPES)
NODES = st.tuples(LEAVES, LEAVES, LEAVES, LEAVES).map(lambda fields: LoRAKernel(*fields, None))
TREES = st.recursive(
    LEAVES | NODES,
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, min_size=1, max_size=3) | st.tuples(inner, inner),
    max_leaves=12,
)


@st.composite
def masked_trees(draw):
    tree = draw(TREES)
    return tree, jax.tree.map(lambda _: draw(st.booleans()), tree)


@given(masked_trees())
def test_combine_joins_what_partition_split(masked):
    tree, mask = masked
    assert same_bits(parts.combine(*parts.partition(tree, mask)), tree)


@given(masked_trees())
def test_partition_puts_each_leaf_on_its_side(masked):
    tree, mask = masked
    trainable, frozen = parts.partition(tree, mask)
    chosen = [leaf for leaf, trains in zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True) if trains]
    rest = [leaf for leaf, trains in zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True) if not trains]
    assert [id(leaf) for leaf in jax.tree.leaves(trainable)] == [id(leaf) for leaf in chosen]
    assert [id(leaf) for leaf in jax.tree.leaves(frozen)] == [id(leaf) for leaf in rest]


WORD = st.text("abcd_0123456789", min_size=1, max_size=5)
NAME = st.lists(WORD, min_size=1, max_size=5)


@given(NAME, st.data())
def test_a_run_of_components_is_matched(name, data):
    first = data.draw(st.integers(0, len(name) - 1))
    last = data.draw(st.integers(first + 1, len(name)))
    assert parts.matches("/".join(name[first:last]), "/".join(name))


@given(NAME, WORD)
def test_a_word_matches_whole_components_only(name, word):
    assert parts.matches(word, "/".join(name)) == (word in name)


@given(NAME, st.lists(WORD, min_size=1, max_size=3))
def test_a_choice_matches_where_one_of_it_does(name, words):
    assert parts.matches("|".join(words), "/".join(name)) == any(word in name for word in words)


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_layers_number_is_matched_whole(layer, other):
    assert parts.matches(f"layers/{layer}", f"layers/{other}/mlp/up_proj/kernel") == (layer == other)


@given(NAME, st.lists(WORD, max_size=4))
def test_the_first_match_wins(name, patterns):
    found = parts.first_match(patterns, "/".join(name))
    hits = [number for number, pattern in enumerate(patterns) if pattern in name]
    assert found == (hits[0] if hits else None)


def test_a_pattern_that_matches_nothing_names_what_exists_and_the_nearest():
    names = [f"layers/{layer}/attention/{part}/kernel" for layer in range(3) for part in ("q_proj", "v_proj")]
    with pytest.raises(UserError) as error:
        parts.check_patterns(["v_proj", "q_prj"], names, "method.targets")
    message = str(error.value)
    assert message.startswith("method.targets: the pattern 'q_prj' matches nothing. Did you mean 'q_proj'?")
    assert "layers/N/attention/q_proj/kernel, layers/N/attention/v_proj/kernel" in message
    assert not re.search(r"layers/\d", message)


def test_a_broken_pattern_is_named():
    with pytest.raises(UserError, match=r"'\(q_proj' is not a pattern: .*unterminated"):
        parts.matches("(q_proj", "layers/0/attention/q_proj/kernel")


def test_a_mask_that_is_false_everywhere_is_refused():
    with pytest.raises(UserError, match="Nothing trains"):
        parts.trainable_leaves({"norm": {"scale": np.ones(3)}}, {"norm": {"scale": False}})


def test_the_listing_has_a_row_for_each_trainable_leaf():
    params = {
        "layers": {
            "0-2": {"mlp": {"kernel": np.zeros((3, 4, 5), np.float32)}},
            "3-3": {"mlp": {"kernel": np.zeros((1, 4, 5), np.float32)}},
        },
        "norm": {"scale": np.zeros(4, np.float16)},
        "embed": {"embedding": np.zeros((7, 4), np.float32)},
    }
    mask = jax.tree.map(lambda leaf: leaf.ndim != 2, params)
    assert parts.listing(params, mask) == [
        ("layers/0-2/mlp/kernel", "3 x (4x5)", "float32", 60, 240),
        ("layers/3-3/mlp/kernel", "1 x (4x5)", "float32", 20, 80),
        ("norm/scale", "4", "float16", 4, 8),
    ]
    assert parts.size(params) == 112
    assert parts.size_in_bytes(params) == 240 + 80 + 8 + 112
