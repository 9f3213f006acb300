"""Bottleneck adapters between jaxft and AdapterHub's library, both ways.

The library's answers are kept in tests/hub/adapterhub (make_adapterhub.py says how they are made). With JAXFT_ADAPTERS_PYTHON, an
interpreter that has the library, it also reads what jaxft writes.
"""

import functools
import json
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from conftest import TOLERANCE
from lenient_optax import lenient
from make_adapterhub import CASES, DECAY, ENCODERS, HERE, IDS, LABELS, NAME, RATE, base_model
from tiny_models import largest_difference, load, make_pair, moved, same_bits

import jaxft
from jaxft.errors import UserError
from jaxft.methods import Bottleneck, LoRA, Partial
from jaxft.methods.base import Compose

PYTHON = os.environ.get("JAXFT_ADAPTERS_PYTHON")


@functools.cache
def base(family):
    kind, _, task = family.partition(" ")
    return load(base_model(family), task or ("masked_lm" if kind in ENCODERS else "causal_lm"))


def adapted(case):
    model, params = base(CASES[case][0])
    return model, *jaxft.load_adapter(HERE / case, model, params)


@functools.cache
def answers(case):
    return safetensors.numpy.load_file(HERE / f"{case}.safetensors")


@functools.cache
def program(case):
    """Returns the logits, the loss and its gradients, of the trainable leaves."""
    model, params, method = adapted(case)
    method = alone(method)
    frozen = jaxft.partition(params, method.mask(params))[1]

    def loss(trainable):
        logits = model.apply({"params": jaxft.combine(trainable, frozen)}, IDS).logits
        if model.task == "sequence_classification":
            picked = jax.nn.log_softmax(logits)[np.arange(len(IDS)), IDS[:, 0] % len(LABELS)]
            return -np.float32(1.0) * picked.mean(), logits
        first = 0 if CASES[case][0] in ENCODERS else 1  # of the targets
        scored = jax.nn.log_softmax(logits[:, : IDS.shape[1] - first])
        return -np.float32(1.0) * jax.numpy.take_along_axis(scored, IDS[:, first:, None], axis=-1).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def alone(method):
    """Returns the bottleneck adapter of a method, without the head."""
    return method.methods[0] if isinstance(method, Compose) else method


def named(case, trainable, folder):
    """Returns the trainable leaves by their names in AdapterHub's file."""
    model, params, method = adapted(case)
    method = alone(method)
    jaxft.save_adapter(folder, model, jaxft.combine(trainable, jaxft.partition(params, method.mask(params))[1]), method, name=NAME)
    return safetensors.numpy.load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_the_library(case, tmp_path):
    _, params, method = adapted(case)
    trainable = jaxft.partition(params, alone(method).mask(params))[0]
    (_, logits), gradients = program(case)(trainable)
    assert largest_difference(logits, answers(case)["logits"]) <= TOLERANCE
    found = named(case, gradients, tmp_path / "gradients")
    expected = {name.removeprefix("gradient."): value for name, value in answers(case).items() if name.startswith("gradient.")}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.linalg.norm(gradient) > 0, name
        assert np.linalg.norm(found[name] - gradient) <= 1e-4 * np.linalg.norm(gradient), name


@pytest.mark.parametrize("case", ["double_seq_bn", "learned", "par_bn", "bert_seq_bn"])
def test_twenty_steps_have_the_losses_of_torch(case):
    _, params, method = adapted(case)
    trainable = jaxft.partition(params, method.mask(params))[0]
    optimizer = lenient(optax.adamw(RATE, weight_decay=DECAY))
    state, losses = optimizer.init(trainable), []
    update = jax.jit(optimizer.update)
    for _ in answers(case)["losses"]:
        (loss, _), gradients = program(case)(trainable)
        losses.append(float(loss))
        updates, state = update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert np.abs(losses - answers(case)["losses"]).max() <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_written_again_it_holds_the_same_bytes_and_settings(case, tmp_path):
    model, params, method = adapted(case)
    jaxft.save_adapter(tmp_path / "again", model, params, method, name=NAME)
    first, again = (safetensors.numpy.load_file(place / "adapter.safetensors") for place in (HERE / case, tmp_path / "again"))
    assert {key: value.tobytes() for key, value in first.items()} == {key: value.tobytes() for key, value in again.items()}
    first, again = (json.loads((place / "adapter_config.json").read_text()) for place in (HERE / case, tmp_path / "again"))
    if case == "channel":  # the same sums by other settings
        first["config"] |= {"original_ln_after": True, "residual_before_ln": True}
    assert first == again
    loaded, same = jaxft.load_adapter(tmp_path / "again", model, base(CASES[case][0])[1])
    assert same == method
    assert same_bits(loaded, params)


OURS = {
    "double_seq_bn": ("double_seq_bn", Bottleneck(size=5, activation="gelu_new", leave_out=(0,), dropout=0.25)),
    "bert_classes": ("bert_classes", Bottleneck.seq_bn(reduction=4.0) + Partial(targets=("pooler", "classifier"))),
    "roberta_classes": ("roberta_classes", Bottleneck(reduction=4.0) + Partial(targets=("classifier",))),
    "bert": ("bert_seq_bn", Bottleneck.seq_bn(reduction=4.0, scaling=2.5)),
    "distilbert": ("distilbert_seq_bn", Bottleneck(size=5, dropout=0.25)),
    "roberta": ("roberta_par_bn", Bottleneck.par_bn(trained_scale="channel", scaling=1.0)),
    "gpt2": ("gpt2_double_seq_bn", Bottleneck.seq_bn(reduction=4.0)),
    "seq_bn": ("seq_bn", Bottleneck.seq_bn(reduction=4.0, scaling=2.5)),
    "par_bn": ("par_bn", Bottleneck.par_bn(trained_scale="channel", scaling=1.0, layer_reductions=((1, 8.0),))),
}


@pytest.fixture(scope="module")
def read_by_the_library(tmp_path_factory):
    """Returns where the folders of all of OURS lie, with what the library made of them, and the parameters of each."""
    place, tuned = tmp_path_factory.mktemp("ours"), {}
    for name, (case, method) in OURS.items():
        model, params = base(CASES[case][0])
        tuned[name] = model, moved(method, model, params)
        jaxft.save_adapter(place / name, *tuned[name], method)
    pairs = [argument for name, (case, _) in OURS.items() for argument in (case, place / name)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [PYTHON, pathlib.Path(HERE.parent, "make_adapterhub.py"), "read", *pairs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return place, tuned


@pytest.mark.skipif(not PYTHON, reason="JAXFT_ADAPTERS_PYTHON names no interpreter")
@pytest.mark.parametrize("name", OURS)
def test_the_library_gives_our_logits_and_writes_our_bytes(name, read_by_the_library):
    place, tuned = read_by_the_library
    model, params = tuned[name]
    logits = jax.jit(lambda params: model.apply({"params": params}, IDS).logits)(params)
    assert largest_difference(logits, np.load(place / f"{name}.npy")) <= TOLERANCE
    first, again = (safetensors.numpy.load_file(place / folder / "adapter.safetensors") for folder in (name, f"{name}.again"))
    assert {key: value.tobytes() for key, value in first.items()} == {key: value.tobytes() for key, value in again.items()}


def test_both_parts_of_a_sum_go_to_their_own_formats(tmp_path):
    model, params = base("llama")
    lora, bottleneck = LoRA(rank=2, alpha=3.0, targets=("q_proj",)), Bottleneck.par_bn()
    tuned = moved(lora + bottleneck, model, params)
    jaxft.save_adapter(tmp_path / "lora", model, tuned, lora)
    jaxft.save_adapter(tmp_path / "bottleneck", model, tuned, bottleneck)
    loaded = jaxft.load_adapter(tmp_path / "lora", model, params)[0]
    loaded = jaxft.load_adapter(tmp_path / "bottleneck", model, loaded)[0]
    assert same_bits(loaded, tuned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_after": True}, "ln_after is True"),
        ({"phm_layer": True}, "phm_layer"),
        ({"inv_adapter": "nice"}, "inv_adapter"),
        ({"original_ln_after": False}, "don't add the residual once"),
        ({"non_linearity": "softplus"}, "non_linearity is 'softplus'"),
        ({"scalling": 2.0}, "Did you mean 'scaling'"),
        ({"architecture": "prefix_tuning"}, "jaxft reads bottleneck adapters"),
        ({"reduction_factor": {"0": 2}}, "no 'default'"),
        ({"reduction_factor": 2}, "another reduction"),
        ({"output_adapter": False}, "no place for"),
        ({"scaling": "learned"}, "it lacks"),
    ],
)
def test_what_jaxft_has_not_is_refused(changes, message, tmp_path):
    shutil.copytree(HERE / "double_seq_bn", tmp_path / "copy")
    path = tmp_path / "copy" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"config": config["config"] | changes}))
    with pytest.raises(UserError, match=message):
        jaxft.load_adapter(tmp_path / "copy", *base("llama"))


def test_pickle_is_refused_with_the_remedy(tmp_path):
    shutil.copytree(HERE / "double_seq_bn", tmp_path / "copy")
    (tmp_path / "copy" / "adapter.safetensors").unlink()
    torch.save({}, tmp_path / "copy" / "pytorch_adapter.bin")
    with pytest.raises(UserError, match="use_safetensors=True"):
        jaxft.load_adapter(tmp_path / "copy", *base("llama"))


def test_an_adapter_of_another_base_is_refused():
    with pytest.raises(UserError, match="another base model"):
        jaxft.load_adapter(HERE / "seq_bn", *base("llama"))
    with pytest.raises(UserError, match="hidden_size"):
        jaxft.load_adapter(HERE / "double_seq_bn", *make_pair("llama")[1:])


def test_another_methods_parameters_are_refused(tmp_path):
    model, params = base("llama")
    with pytest.raises(UserError, match="hold no bottleneck"):
        jaxft.save_adapter(tmp_path / "a", model, params, Bottleneck())
    tuned = Bottleneck().init(jax.random.key(0), model, params)
    for other in (Bottleneck(size=3), Bottleneck(leave_out=(1,)), Bottleneck(activation="relu"), Bottleneck(scaling=2.0)):
        with pytest.raises(UserError, match="Pass the method"):
            jaxft.save_adapter(tmp_path / "a", model, tuned, other)


def heads_of(folder):
    return safetensors.numpy.load_file(folder / "model_head.safetensors")


@pytest.mark.parametrize("case", ["bert_classes", "roberta_classes"])
def test_a_head_comes_with_its_adapter_and_is_written_as_the_library_does(case, tmp_path):
    model, params, method = adapted(case)
    assert method.methods[1] == Partial(targets=("classifier",))
    jaxft.save_adapter(tmp_path / "again", model, params, method, name=NAME)
    assert {key: value.tobytes() for key, value in heads_of(HERE / case).items()} == {
        key: value.tobytes() for key, value in heads_of(tmp_path / "again").items()
    }
    first, again = (json.loads((place / "head_config.json").read_text()) for place in (HERE / case, tmp_path / "again"))
    assert first == again
    loaded, same = jaxft.load_adapter(tmp_path / "again", model, base(CASES[case][0])[1])
    assert same == method
    assert same_bits(loaded, params)


def test_a_pooler_is_written_with_the_head(tmp_path):
    model, params = base("bert sequence_classification")
    method = Bottleneck.seq_bn(reduction=4.0) + Partial(targets=("pooler", "classifier"))
    tuned = moved(method, model, params)
    jaxft.save_adapter(tmp_path / "a", model, tuned, method)
    assert "bert.pooler.dense.weight" in heads_of(tmp_path / "a")
    loaded, same = jaxft.load_adapter(tmp_path / "a", model, params)
    assert same == method
    assert same_bits(loaded, tuned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label2id": {"no": 0, "yes": 1, "maybe": 2}}, "has the labels no, yes, maybe; this model's are no, maybe, yes"),
        ({"model_class": "BertForTokenClassification"}, "is of a BertForTokenClassification, this model is a BertForSequenceCl"),
        ({"config": {"head_type": "classification"}}, "is a head of AdapterHub's own kind"),
    ],
)
def test_a_head_of_another_kind_is_refused(changes, message, tmp_path):
    shutil.copytree(HERE / "bert_classes", tmp_path / "copy")
    path = tmp_path / "copy" / "head_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        jaxft.load_adapter(tmp_path / "copy", *base("bert sequence_classification"))


def test_what_is_no_head_cannot_be_written_beside_an_adapter(tmp_path):
    model, params = base("bert sequence_classification")
    method = Bottleneck.seq_bn() + Partial(targets=("classifier", "embed_norm"))
    with pytest.raises(UserError, match="embed_norm/bias trains whole, and AdapterHub's files hold a task's head alone"):
        jaxft.save_adapter(tmp_path / "a", model, moved(method, model, params), method)
