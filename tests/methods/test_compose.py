"""Sums of methods: order, overlaps, and the ways to write them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from method_checks import base, check_merge, check_start, check_what_moves
from tiny_models import largest_difference

import experiments
import jaxft
from jaxft import overrides
from jaxft.errors import UserError
from jaxft.methods import IA3, AdaLoRA, BitFit, Bottleneck, Compose, Full, LoRA, NormTuning, Partial, Prefix, PTuning, SparseMask, VeRA
from jaxft.models import segments

SUM = LoRA(rank=2, targets=("q_proj", "layers/1/mlp")) + BitFit()


def trains(method, family="qwen2"):
    model, params = base(family)
    params = method.init(jax.random.key(0), model, params)
    return {name for leaf in segments.leaves(jaxft.partition(params, method.mask(params))[0]) for name in leaf.names}


def test_masks_unite():
    assert trains(SUM) == trains(SUM.methods[0]) | trains(BitFit())
    assert trains(BitFit() + SUM.methods[0]) == trains(SUM)


def test_its_title_names_its_parts():
    assert (SUM.title, BitFit().title) == ("LoRA + BitFit", "BitFit")


def test_it_starts_as_the_base_and_differs_once_moved():
    check_start(SUM, "qwen2")


def test_both_parts_move_and_nothing_else():
    check_what_moves(SUM, "qwen2")


def test_merged_is_unmerged():
    check_merge(SUM, "qwen2")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=2, targets=("q_proj",)) + LoRA(rank=2, targets=("layers",)), "LoRA and LoRA both train layers/0-2/attention/q_proj"),
        (NormTuning() + Partial(last=1), "NormTuning and Partial both train layers/2-2/input_norm/scale. Leave one of them out"),
        (Full() + BitFit(), "Full and BitFit both train layers/0-2/attention/k_proj/bias"),
        (Full() + LoRA(rank=2), "Full trains layers/0-2/attention/k_proj/kernel, and LoRA what stands around it. Leave one of them out"),
        (SparseMask() + Full(), "Full trains layers/0-2/attention/k_proj/kernel, and SparseMask what stands around it"),
        (IA3() + Partial(last=1), "Partial trains layers/2-2/attention/k_proj/kernel, and IA3 what stands around it"),
    ],
)
def test_what_two_methods_would_train_is_refused(method, message):
    model, params = base("qwen2")
    with pytest.raises(UserError, match=message):
        method.init(jax.random.key(0), model, params)


def test_methods_of_other_layers_go_together():
    found = trains(Partial(last=1) + LoRA(rank=2, targets=("layers/[01]/mlp",)))
    assert {name for name in found if "layers/2/" in name} == trains(Partial(last=1))
    assert all("lora_" in name for name in found if "layers/2/" not in name)


def test_gradual_unfreezing_leaves_other_methods_alone():
    model, params = base("qwen2")
    method = Partial(layers=(1, 2), unfreeze_every=2) + LoRA(rank=2, targets=("layers/0/mlp",))
    params = method.init(jax.random.key(0), model, params)
    trainable, _ = jaxft.partition(params, method.mask(params))
    optimizer = method.optimizer(optax.scale(-1.0), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trainable), optimizer.init(trainable), trainable)
    moves = {layer: {bool(leaf.any()) for leaf in jax.tree.leaves(segments.one_layer(updates, layer))} for layer in range(3)}
    assert moves == {0: {True}, 1: {False}, 2: {True}}


def test_the_parts_of_a_sum_draw_from_keys_of_their_own():
    model, params = base()
    one, other = LoRA(rank=2, targets=("q_proj",)), LoRA(rank=2, targets=("o_proj",))
    both = (one + other).init(jax.random.key(0), model, params)["layers"]["0-2"]["attention"]
    assert largest_difference(both["q_proj"]["kernel"].lora_a, both["o_proj"]["kernel"].lora_a) > 0


@pytest.mark.parametrize("method", [SUM, SUM + NormTuning(targets=("input_norm",)), Partial(layers=(0, 2), targets=("norm",))], ids=repr)
def test_json_gives_back_the_same_sum(method):
    experiment = dataclasses.replace(experiments.load("lora_llama2"), method=method)
    written = json.loads(json.dumps(overrides.to_dict(experiment)))
    assert overrides.from_dict(written) == experiment


def flag(text, *more):
    return overrides.parse_flags(experiments.load("lora_llama2"), [f"--config.method={text}", *more]).method


def test_the_command_line_takes_sums():
    assert flag("LoRA(rank=2, targets=('q_proj', 'layers/1/mlp')) + BitFit()") == SUM
    assert flag("LoRA(rank=4)+NormTuning()+BitFit") == Compose((LoRA(rank=4), NormTuning(), BitFit()))
    assert flag("Partial(last=2)") == Partial(last=2)
    assert len(flag("+".join(["BitFit()"] * 800)).methods) == 800
    assert flag("LoRA(alpha=8)", "--config.method.rank=2") == LoRA(alpha=8.0, rank=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LoRA(rank=4", "is no method. Write NAME"),
        ("LoRA(4)", "is no method. Write NAME"),
        ("LoRA(rank=4)-BitFit()", "is no method. Write NAME"),
        ("LoRA(rank=x)", "is no method. Write NAME"),
        ("LoRAA()", "There is no method 'LoRAA'. Did you mean 'LoRA'"),
        ("LoRA(rnk=4)", "Did you mean 'config.method.rank'"),
        ("LoRA(rank=4.5)", "config.method.rank: expected a whole number, found 4.5"),
        ("LoRA(rank=0)", "at least 1, not 0"),
        ("LoRA(rank=4, rank=8)", "config.method.rank is given twice"),
        ("LoRA(**{'rank': 4})", "is no method. Write NAME"),
        ("LoRA(**{})", "is no method. Write NAME"),
        ("Compose()", r"A sum of no methods trains nothing. Write one as LoRA\(rank=8\) \+ BitFit\(\)"),
        ("Compose", "A sum of no methods"),
        ("Compose(foo=1)", "config.method.foo: a sum of methods has its methods alone"),
        ("Compose(methods=3)", "config.method.methods: a sum of methods has its methods alone"),
        ("+".join(["BitFit()"] * 100_000), r"'BitFit\(\)\+.{60,90}\.\.\.' is no method. Write NAME"),
        ("(" * 100_000, "is no method. Write NAME"),
    ],
)
def test_an_expression_that_is_none_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        flag(text)


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(UserError, match="A sum of no methods"):
        Compose()


@pytest.mark.parametrize("kind", [LoRA, AdaLoRA, VeRA, SparseMask, BitFit, NormTuning])  # IA3 takes its family's own
def test_no_target_is_told(kind):
    model, params = base("qwen2")
    with pytest.raises(UserError, match="^method.targets is empty: nothing is chosen. Give it a pattern, as one of .*layers/N/"):
        kind(targets=()).init(jax.random.key(0), model, params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(layers=(1, 0, 1)), "method.layers names layer 1 twice"),
        (lambda: Partial(layers=(2, 2)), "method.layers names layer 2 twice"),
        (lambda: Bottleneck(leave_out=(0, 0)), "method.leave_out names layer 0 twice"),
        (lambda: Bottleneck(layer_reductions=((1, 2.0), (1, 4.0))), "method.layer_reductions names layer 1 twice"),
        (lambda: Bottleneck(scaling=0.0), "method.scaling is 0: what is added would be nothing"),
        (lambda: SparseMask(rank=4, density=0.1), "method.density, 0.1, stands in the place of method.rank, 4: set one of them"),
    ],
)
def test_settings_without_an_effect_are_refused(make, message):
    model, params = base("qwen2")
    with pytest.raises(UserError, match=message):
        make().init(jax.random.key(0), model, params)


def test_a_lora_leaves_the_cuts_of_another_method():
    found = trains(Partial(last=1) + LoRA(rank=2, targets=("layers/0/attention/q_proj",)))
    low_rank = {f"layers/0/attention/q_proj/kernel/{side}" for side in ("lora_a", "lora_b")}
    assert found == trains(Partial(last=1)) | low_rank


BASE_LEAVES = {
    "biases beside bottlenecks": (Bottleneck(size=2), BitFit()),
    "biases beside a projected prefix": (Prefix(virtual_tokens=2, projection=True), BitFit()),
    "biases beside an encoder": (PTuning(virtual_tokens=2), BitFit()),
    "a lora's biases beside bottlenecks": (LoRA(rank=2, targets=("q_proj",), bias="all", lora_plus_ratio=4.0), Bottleneck(size=2)),
    "a layer beside bottlenecks": (Bottleneck(size=2), Partial(last=1)),
    "a layer beside a lora": (Partial(last=1), LoRA(rank=2, layers=(0, 1))),
    "a head beside vectors": (Partial(targets=("lm_head",)), IA3(targets=("q_proj",), feedforward=())),
    "biases of some layers": (Partial(layers=(1,)), BitFit(targets=("layers/[02]/.*bias",))),
}


@pytest.mark.parametrize("name", BASE_LEAVES)
def test_patterns_choose_among_the_leaves_of_the_base_whatever_stands_there(name):
    first, second = BASE_LEAVES[name]
    for method in (first + second, second + first):
        assert trains(method) == trains(first) | trains(second)


def test_a_decay_by_layer_reaches_what_full_trains_alone():
    model, params = base("qwen2")
    method = Full(exclude=("norm", "input_norm", "post_attention_norm"), layer_decay=0.5) + NormTuning()
    params = method.init(jax.random.key(0), model, params)
    trainable, _ = jaxft.partition(params, method.mask(params))
    optimizer = method.optimizer(optax.scale(-1.0), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trainable), optimizer.init(trainable), trainable)
    found = {leaf.title: {float(value) for value in leaf.value.ravel()} for leaf in segments.leaves(updates)}
    assert found["layers/0-2/input_norm/scale"] == {-1.0}
    assert found["layers/0-2/attention/q_proj/bias"] == {-1.0, -0.5, -0.25}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bottleneck(scaling=float("nan")), "method.scaling is a finite number, not nan"),
        (lambda: Bottleneck(reduction=float("inf")), "method.reduction is a finite number, not inf"),
        (lambda: Bottleneck(layer_reductions=((0, float("inf")),)), "method.reduction is a finite factor above 0, not inf"),
        (lambda: AdaLoRA(orthogonality=float("nan")), "method.orthogonality is a finite number"),
        (lambda: LoRA(rank=2.5), "method.rank is a whole number, not 2.5"),
        (lambda: LoRA(alpha_pattern=(("q_proj", float("inf")),)), "alpha is a finite number above 0, not inf"),
        (lambda: Partial(targets=("norm",), unfreeze_every=3), "method.unfreeze_every is for layers, and none is chosen"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_what_is_no_method_is_not_added():
    with pytest.raises(TypeError, match="unsupported operand"):
        LoRA() + 3


@pytest.mark.parametrize("method", [LoRA(bias="all"), LoRA(bias="lora_only"), AdaLoRA(bias="all"), VeRA(bias="vera_only")], ids=repr)
def test_biases_that_are_not_there_do_not_train(method):
    model, params = base("llama")
    with pytest.raises(UserError, match=f"method.bias is {method.bias}, and the model has no such bias"):
        method.init(jax.random.key(0), model, params)


@pytest.mark.parametrize(
    "method", [LoRA(bias="all", lora_plus_ratio=4.0), Full(layer_decay=0.5), Partial(last=3, unfreeze_every=5)], ids=repr
)
def test_rates_of_the_base_leave_the_leaves_of_other_methods_alone(method):
    model, params = base("qwen2")
    params = (method + Bottleneck(size=2)).init(jax.random.key(0), model, params)
    trainable, _ = jaxft.partition(params, (method + Bottleneck(size=2)).mask(params))
    optimizer = method.optimizer(optax.scale(-1.0), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, trainable), optimizer.init(trainable), trainable)
    found = {float(leaf.value.max()) for leaf in segments.leaves(updates) if "mlp_output" in leaf.path}
    others = {float(leaf.value.max()) for leaf in segments.leaves(updates) if "mlp_output" not in leaf.path}
    assert found == {-1.0} != others
