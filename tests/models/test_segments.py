"""How layers are stacked is storage only."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, make_pair, same_bits

from jaxft.models import registry, segments

DEPTH = 4


@functools.cache
def whole():
    _, model, params = make_pair("mistral", num_hidden_layers=DEPTH, sliding_window=6)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (2, 11)).astype(np.int32)
    return model, params, jax.jit(lambda params: model.apply({"params": params}, ids).logits)


CUTS = st.sets(st.integers(1, DEPTH - 1))


def cut(params, cuts):
    return segments.regroup(params, lambda layer: sum(point <= layer for point in cuts))


@settings(deadline=None, max_examples=4)
@given(CUTS)
def test_cutting_changes_no_logit(cuts):
    _, params, logits = whole()
    parts = cut(params, cuts)
    assert [layers[0] for layers in segments.spans(parts)] == [0, *sorted(cuts)]
    # the same operations on the same numbers, scanned otherwise
    np.testing.assert_allclose(logits(parts), logits(params), atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(CUTS, CUTS)
def test_cutting_again_and_joining_gives_the_first_bits(first, second):
    params = whole()[1]
    again = cut(cut(cut(params, first), second), ())
    assert list(again["layers"]) == [f"0-{DEPTH - 1}"]
    assert same_bits(again, params)


@settings(deadline=None, max_examples=10)
@given(CUTS)
def test_names_never_tell_how_layers_are_stacked(cuts):
    params = whole()[1]
    names = [name for leaf in segments.leaves(params) for name in leaf.names]
    assert sorted(name for leaf in segments.leaves(cut(params, cuts)) for name in leaf.names) == sorted(names)
    assert "layers/3/attention/q_proj/kernel" in names


def test_layers_of_different_structure_are_never_stacked():
    params = whole()[1]
    parts = cut(params, {2})
    lower = parts["layers"]["0-1"]
    wider = jax.tree.map(lambda leaf: leaf, lower) | {"extra": np.zeros((2, 3), np.float32)}
    joined = cut(parts | {"layers": parts["layers"] | {"0-1": wider}}, ())
    assert list(joined["layers"]) == ["0-1", "2-3"]


def test_a_segment_that_stays_keeps_its_arrays():
    parts = cut(whole()[1], {1})
    again = cut(parts, {1, 3})
    assert again["layers"]["0-0"] is parts["layers"]["0-0"]


@pytest.mark.parametrize("layer", range(DEPTH))
def test_one_layer_is_found_in_any_segment(layer):
    params = whole()[1]
    found = segments.one_layer(cut(params, {1, 3}), layer)
    assert same_bits(found, jax.tree.map(lambda leaf: leaf[layer], params["layers"][f"0-{DEPTH - 1}"]))


def test_a_leaf_has_the_title_and_the_shape_of_one_layer():
    leaf = next(leaf for leaf in segments.leaves(whole()[1]) if leaf.path[-2] == "q_proj")
    assert (leaf.title, leaf.shape, leaf.layers) == ("layers/0-3/attention/q_proj/kernel", (32, 32), range(4))


def test_an_architecture_that_jaxft_has_not_is_answered_with_those_it_has():
    with pytest.raises(Exception, match="no architecture 'LlamaForCausalML'. Did you mean 'LlamaForCausalLM'.*It has: .*Qwen3ForCausalLM"):
        registry.family_of("LlamaForCausalML")
