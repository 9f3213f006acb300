"""What a run finds out of a method before the model is loaded, by shapes alone."""

import resource

import jax
import pytest
from method_checks import base

from jaxft.errors import UserError
from jaxft.methods import IA3, AdaLoRA, BitFit, Bottleneck, LoRA, Partial, Prefix, Prompt, SparseMask, VeRA
from jaxft.models.node import virtual_tokens
from jaxft.train.fit import check_method

LOOK = [SparseMask(rank=1, choice=choice, targets=("q_proj",)) for choice in ("random", "magnitude", "gradient", "fisher")]


def check(method, name="qwen2"):
    model, params = base(name)
    return virtual_tokens(check_method(method, model, jax.eval_shape(lambda: params), seed=0))


@pytest.mark.parametrize("method", LOOK, ids=repr)
def test_virtual_tokens_are_counted_beside_what_looks_at_weights(method):
    assert check(method) == 0
    assert check(Prefix(virtual_tokens=7) + method) == 7
    assert check(method + Prompt(virtual_tokens=4) + Prefix(virtual_tokens=7)) == 11


@pytest.mark.parametrize("method", LOOK, ids=repr)
def test_what_could_be_written_nowhere_is_refused_beside_what_looks_at_weights(method):
    with pytest.raises(UserError, match="could be written nowhere"):
        check(method + BitFit() + Prompt(virtual_tokens=4))


HEAD = Partial(targets=("pooler", "classifier"))


@pytest.mark.parametrize("method", [Bottleneck(), Prefix(virtual_tokens=4)], ids=lambda method: method.title)
def test_what_cannot_be_merged_is_written_with_the_tasks_head_and_with_nothing_else(method):
    check(method + HEAD, "bert sequence_classification")
    with pytest.raises(UserError, match="could be written nowhere"):
        check(method + HEAD + BitFit(targets=("embed_norm",)), "bert sequence_classification")


@pytest.mark.parametrize("choice", ["gradient", "fisher"])
@pytest.mark.parametrize("other", [LoRA(rank=2), IA3(), AdaLoRA(init_rank=3, target_rank=2)], ids=repr)
def test_kernels_that_another_method_wraps_are_scored_as_what_they_act_as(other, choice):
    assert check(other + SparseMask(rank=1, choice=choice)) == 0


def test_a_method_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="method.last is 4; the model has 3 layers"):
        check(LOOK[1] + Partial(last=4))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=17), "method.rank: layers/0/attention/k_proj/kernel is 32 x 16; a rank of 17 is above that of any such matrix, 16"),
        (LoRA(rank=4, rank_pattern=(("q_proj", 10**9),)), "layers/0/attention/q_proj/kernel is 32 x 32; a rank of 1000000000"),
        (LoRA(rank=33, targets=("embed",)), "embed/embedding is 97 x 32; a rank of 33"),
        (LoRA(rank=10**12, targets=("q_proj",), start="pissa"), "a rank of 1000000000000 is above"),
        (AdaLoRA(init_rank=10**9), "method.init_rank: layers/0/attention/k_proj/kernel is 32 x 16; a rank of 1000000000"),
        (VeRA(rank=10**9), "method.rank is 1000000000; the largest target is 56 x 56, with fewer weights"),
        (SparseMask(rank=10**9), "a rank of 1000000000 asks for"),
    ],
    ids=lambda found: getattr(found, "title", ""),
)
def test_a_rank_above_the_matrix_is_refused(method, message):
    with pytest.raises(UserError, match=message):
        check(method)


def test_the_check_of_a_large_method_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check(VeRA(rank=3000) + Prefix(virtual_tokens=10**8))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; the prefix alone would take 36 GiB
