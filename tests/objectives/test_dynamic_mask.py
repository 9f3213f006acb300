"""Dynamic masking: loss and gradient against torch, one program over all schedules, heads of words, methods, and what is refused."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from lenient_optax import lenient
from tiny_models import VOCABULARY, largest_difference, make_pair, make_reference

import jaxft
from jaxft import methods
from jaxft.config import DataConfig, Experiment, ModelConfig, TrainConfig
from jaxft.errors import UserError
from jaxft.hub.language_head import LanguageHead
from jaxft.objectives import UDA, DynamicMask, FixMatch, PseudoAnswers, SelfSupervised
from jaxft.objectives.base import OWN, Step
from jaxft.objectives.dynamic_mask import _told
from jaxft.objectives.restoration import language_model, reads
from jaxft.quant.blockwise import Format
from jaxft.tasks import SFT, MaskedLM, SequenceClassification, TokenClassification
from jaxft.train.state import new_state
from jaxft.train.step import make_step

TAGS = ("O", "B-DRUG", "I-DRUG", "B-DOSE")
LENGTH, MASK = 24, 4
EVERY = (("tokens", 0.2), ("words", 0.2), ("spans", 0.2), ("tags", 0.2), ("salience", 0.2), ("loss", 0.2))
ALL = DynamicMask(
    policy="mix",
    mix=EVERY,
    rate=0.3,
    final_rate=0.5,
    schedule="cosine",
    mask_token_id=MASK,
    restoration=0.7,
    head_chunk=16,  # of more slots: in chunks
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a tiny BERT of masked language modelling, and the model of transformers that they hold."""
    path, reference = tmp_path_factory.mktemp("bert"), make_reference("bert", "masked_lm")
    reference.save_pretrained(path)
    return path, reference


@pytest.fixture(scope="module")
def tagger(folder):
    """The same as a tagger: model, parameters with the head of words in the objective's branch."""
    model, params = jaxft.load_pretrained(str(folder[0]), task="token_classification", labels=TAGS)
    own, drawn = LanguageHead(str(folder[0]), "main", "float32", 0).read(model)
    assert not drawn
    params["classifier"] = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params["classifier"])
    return model, jax.device_put({**params, OWN: own}, jax.devices()[0])


def rows(count=6, seed=0):
    """Returns rows of words of one to three tokens between special ones, each with a tag at its first token."""
    random = np.random.default_rng(seed)
    shape = (count, LENGTH)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions", "words", "scored", "targets")}
    batch["weights"] = np.zeros(shape, np.float32)
    for i in range(count):
        sizes = random.integers(1, 4, 4 + i)
        words = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        end = len(words) + 2
        batch["tokens"][i, :end] = [2, *random.integers(5, VOCABULARY, len(words)), 3]
        batch["segment_ids"][i, :end], batch["positions"][i, :end] = 1, np.arange(end)
        batch["words"][i, 1 : end - 1] = words
        batch["scored"][i, : len(sizes)] = 1 + np.cumsum([0, *sizes[:-1]])
        batch["targets"][i, : len(sizes)] = random.integers(0, len(TAGS), len(sizes))
        batch["weights"][i, : len(sizes)] = 1
    return batch


def step_of(model, frozen, task, objective, batch, number=3, steps=9):
    """Returns what a micro-batch is given, without dropout."""
    shared = objective.shared({name: values[None] for name, values in batch.items()}, None, jnp.int32(number), steps)
    rngs = {"objective": jax.random.key(2 + number), "run": jax.random.key(4)}
    return Step(task, model, frozen, rngs, {}, jnp.int32(number), steps, shared)


@functools.partial(jax.jit, static_argnames=("model", "task", "objective"))
def ours(trainable, batch, model, task, objective):
    """Returns the mean loss, its gradient, what is logged, and the masked batch; all leaves train."""
    step = step_of(model, jax.tree.map(lambda _: None, trainable), task, objective, batch)

    def loss(trainable):
        sums, logged = objective.sums(step, trainable, batch, None)
        return sums.loss / sums.weight, logged

    (mean, logged), gradient = jax.value_and_grad(loss, has_aux=True)(trainable)
    return mean, gradient, logged, objective.mask(step, trainable, batch, None)


def divergence(one, other):
    """The mean of both Kullback-Leibler divergences of logits (slots, classes)."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) + (q.exp() * (q - p)).sum(-1)) / 2


def transposed(parameter):
    return parameter.grad.numpy().T


# ---------------------------------------------------------------- against torch


@pytest.fixture(scope="module")
def found(tagger):
    model, params = tagger
    return ours(params, rows(), model=model, task=TokenClassification(), objective=ALL)


def test_loss_and_gradient_of_a_tagger_are_those_of_torch(folder, tagger, found):
    reference, batch = folder[1], rows()
    mean, gradient, logged, masked = found
    head = {name: torch.tensor(np.asarray(leaf), requires_grad=True) for name, leaf in tagger[1]["classifier"].items()}
    at = np.nonzero(batch["weights"])
    read = batch["scored"][at]
    hidden = np.asarray(masked.groups) >= 0

    def states(tokens):
        attention = torch.tensor(batch["segment_ids"] > 0)
        return reference.bert(input_ids=torch.tensor(np.asarray(tokens)).long(), attention_mask=attention).last_hidden_state

    masked_states = states(masked.tokens)
    tags = masked_states[at[0], read] @ head["kernel"] + head["bias"]
    rate = 0.3 + (1 - np.cos(np.pi * 3 / 8)) / 2 * 0.2
    nll = torch.nn.functional.cross_entropy(tags, torch.tensor(batch["targets"][at]).long())
    told = reference.cls(masked_states[hidden])
    true = torch.tensor(batch["tokens"][hidden]).long()
    restoring = torch.nn.functional.cross_entropy(told, true, reduction="sum")
    loss = nll + 0.7 * restoring / (rate * (batch["words"] > 0).sum())
    reference.zero_grad()
    loss.backward()
    np.testing.assert_allclose(mean, loss.item(), rtol=1e-4)
    figures = {name: float(above / below) for name, (above, below) in logged.items()}
    np.testing.assert_allclose(figures["mask_rate"], rate, rtol=1e-5)
    np.testing.assert_allclose(figures["restoration_loss"], restoring.item() / hidden.sum(), rtol=1e-4)
    np.testing.assert_allclose(figures["restoration_accuracy"], (told.argmax(-1) == true).float().mean(), rtol=1e-6)
    np.testing.assert_allclose(figures["hidden"], hidden.sum() / (batch["words"] > 0).sum(), rtol=1e-6)
    layers = gradient["layers"]["0-2"]
    expected = {
        "classifier": (gradient["classifier"]["kernel"], head["kernel"].grad.numpy()),
        "embedding": (gradient["embed"]["embedding"], reference.bert.embeddings.word_embeddings.weight.grad.numpy()),
        "words": (gradient[OWN]["lm_head"]["dense"]["kernel"], transposed(reference.cls.predictions.transform.dense.weight)),
        "query": (layers["attention"]["query"]["kernel"][1], transposed(reference.bert.encoder.layer[1].attention.self.query.weight)),
    }
    for name, (one, other) in expected.items():
        assert np.linalg.norm(one - other) <= 1e-4 * np.linalg.norm(other), name


def test_shares_are_logged_by_the_kind_of_tag(found):
    batch, (_, _, logged, masked) = rows(), found
    hidden, kinds = np.asarray(masked.groups) >= 0, np.full((6, LENGTH), "", object)
    for i, slot in zip(*np.nonzero(batch["weights"]), strict=True):
        word = batch["words"][i, batch["scored"][i, slot]]
        kinds[i, batch["words"][i] == word] = TAGS[batch["targets"][i, slot]].rpartition("-")[2]
    for kind in ("O", "DRUG", "DOSE"):
        above, below = logged[f"hidden_{kind}"]
        assert (int(above), int(below)) == ((hidden & (kinds == kind)).sum(), (kinds == kind).sum())


def test_what_is_hidden_becomes_the_mask_token_a_random_one_or_stays(found):
    batch, masked = rows(), found[3]
    hidden, tokens = np.asarray(masked.groups) >= 0, np.asarray(masked.tokens)
    assert 0.2 < hidden[batch["words"] > 0].mean() < 0.8
    assert (tokens[~hidden] == batch["tokens"][~hidden]).all()
    assert 0.6 < (tokens[hidden] == MASK).mean() < 0.95


@pytest.mark.parametrize("policy", ["tokens", "words", "spans", "tags"])
def test_a_static_mask_is_a_rows_own_in_every_step_and_batch(tagger, policy):
    model, params = tagger
    batch, turned = rows(), {name: values[::-1] for name, values in rows().items()}

    def masks(static, batch):
        objective = dataclasses.replace(ALL, policy=policy, mix=(), static=static, consistency=0.0, schedule="constant", final_rate=-1.0)
        frozen = jax.tree.map(lambda _: None, params)
        steps = [step_of(model, frozen, TokenClassification(), objective, batch, number) for number in (0, 3, 8)]
        return [objective.mask(step, params, batch, None).tokens for step in steps]

    first, second, third = masks(True, batch)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    np.testing.assert_array_equal(first, masks(True, turned)[0][::-1])
    assert (first != batch["tokens"]).any()
    anew = masks(False, batch)
    assert any((one != other).any() for one, other in itertools.pairwise(anew))


def test_the_gradient_is_that_of_finite_differences(tagger, found):
    model, params = tagger
    random, h, losses = np.random.default_rng(0), 3e-2, []
    drawn = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape), params)
    size = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(drawn)))
    for way in (h, -h):
        moved = jax.tree.map(lambda leaf, part, way=way: np.float32(np.asarray(leaf) + way * part / size), params, drawn)
        moved = jax.device_put(moved, jax.devices()[0])
        mean, _, _, masked = ours(moved, rows(), model=model, task=TokenClassification(), objective=ALL)
        assert (np.asarray(masked.groups) == np.asarray(found[3].groups)).all()  # the same draw: the loss is smooth between
        losses.append(float(mean))
    slope = sum((np.asarray(leaf) * part / size).sum() for leaf, part in zip(*map(jax.tree.leaves, (found[1], drawn)), strict=True))
    np.testing.assert_allclose(slope, (losses[0] - losses[1]) / (2 * h), rtol=2e-2)  # float32: a loss of seven digits, a third derivative


def test_loss_and_gradient_of_a_causal_models_answers_are_those_of_torch():
    reference, model, params = make_pair("gpt2")
    batch, answer = rows(4, seed=3), np.arange(4)
    batch["scored"], batch["weights"] = np.zeros((4, 8), np.int32), np.zeros((4, 8), np.float32)
    batch["scored"][:, :4], batch["weights"][:, :4] = batch["segment_ids"].sum(axis=1, keepdims=True) - 6 + answer, 1
    batch["targets"] = np.take_along_axis(batch["tokens"], batch["scored"] + 1, axis=1)
    tokenizer = types.SimpleNamespace(mask_token_id=None)
    objective = DynamicMask("spans", rate=0.4, restoration=0.5, consistency=0.3).fitted(SFT(), model, tokenizer)
    assert (objective.masked, objective.random) == (0.0, 0.9)
    mean, gradient, logged, masked = ours(params, batch, model=model, task=SFT(), objective=objective)
    tokens, hidden = np.asarray(masked.tokens), np.asarray(masked.groups) >= 0
    assert (tokens[hidden] != batch["tokens"][hidden]).mean() > 0.5

    def logits(tokens):
        return reference(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(batch["segment_ids"] > 0)).logits

    at, (row, place) = np.nonzero(batch["weights"]), np.nonzero(hidden)
    told, read = logits(tokens), batch["scored"][at]
    with torch.no_grad():  # what the masked input is drawn to is no variable
        whole = logits(batch["tokens"])[at[0], read]
    nll = torch.nn.functional.cross_entropy(told[at[0], read], torch.tensor(batch["targets"][at]).long())
    apart = divergence(told[at[0], read], whole).mean()
    restoring = torch.nn.functional.cross_entropy(told[row, place - 1], torch.tensor(batch["tokens"][hidden]).long(), reduction="sum")
    expected = nll + 0.3 * apart + 0.5 * restoring / (0.4 * (batch["words"] > 0).sum())
    expected.backward()
    np.testing.assert_allclose(mean, expected.item(), rtol=1e-4)
    np.testing.assert_allclose(logged["consistency"][0] / logged["consistency"][1], apart.item(), rtol=1e-4)
    assert float(logged["restoration_loss"][1]) == hidden.sum()
    other = reference.transformer.wte.weight.grad.numpy()
    assert np.linalg.norm(gradient["embed"]["embedding"] - other) <= 1e-4 * np.linalg.norm(other)


def test_a_slot_read_in_a_shared_prefix_tells_the_first_token_of_its_own_example():
    batch = {
        "tokens": [[9, 8, 5, 6, 7, 4, 3], [9, 8, 5, 4, 3, 0, 0]],
        "segment_ids": [[-1, -1, 1, 1, 1, 2, 2], [-1, -1, 1, 2, 2, 0, 0]],
        "scored": [[0, 1, 2, 3, 1, 5], [1, 1, 3, 0, 0, 0]],
        "targets": [[8, 5, 6, 7, 4, 3], [5, 4, 3, 0, 0, 0]],
        "weights": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
    }
    told = _told({name: jnp.asarray(values) for name, values in batch.items()})
    assert told[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert told[1, :3].tolist() == [7, 3, 4]  # of an example of one token nothing says which one it is


def test_a_hidden_token_is_told_from_the_one_before_it_in_its_example():
    causal, encoder = (types.SimpleNamespace(pooling=pooling) for pooling in ("last", "first"))
    places = jnp.arange(7)[None]
    packed = jnp.asarray([[1, 1, 1, 2, 2, 0, 0]])
    read, can = reads(causal, packed, places)
    assert np.asarray(read)[np.asarray(can)].tolist() == [0, 1, 3, 5]
    assert np.flatnonzero(~np.asarray(can[0])).tolist() == [0, 3, 5]
    read, can = reads(causal, jnp.asarray([[-1, -1, 1, 1, 2, 2, 2]]), places)
    assert read[0, 2:].tolist() == [1, 2, 1, 4, 5]  # what begins an example follows the prefix
    assert can[0, 2:].all()
    read, can = reads(encoder, packed, places)
    assert read.tolist() == places.tolist()
    assert can.all()


# ---------------------------------------------------------------- in a step


@pytest.fixture(scope="module")
def stepping(tagger):
    """The jitted step of a run of nine, with dropout and two micro-batches, and its state; LoRA, the classifier and words' head train."""
    model, params = tagger
    objective = dataclasses.replace(ALL, policy="tags", mix=())
    method = methods.LoRA(rank=2, modules_to_save=("classifier",))
    whole = method.init(jax.random.key(0), model, {name: part for name, part in params.items() if name != OWN})
    mask = {**method.mask(whole), OWN: jax.tree.map(lambda _: True, params[OWN])}
    trainable, frozen = jaxft.partition({**whole, OWN: params[OWN]}, mask)
    optimizer = lenient(optax.adam(3e-3))
    step = jax.jit(make_step(model, TokenClassification(), optimizer, seed=0, objective=objective, steps=9))
    return step, jax.device_put(new_state(trainable, optimizer), jax.devices()[0]), frozen


def test_one_program_serves_the_whole_schedule_and_learns(stepping):
    step, state, frozen = stepping
    batch = {name: values.reshape(2, 3, *values.shape[1:]) for name, values in rows().items()}
    lines = []
    for _ in range(9):
        state, metrics = step(state, frozen, batch)
        lines.append({name: float(value) for name, value in metrics.items()})
    assert step._cache_size() == 1
    rates = 0.3 + (1 - np.cos(np.pi * np.arange(9) / 8)) / 2 * 0.2
    np.testing.assert_allclose([line["mask_rate"] for line in lines], rates, rtol=1e-5)
    assert len({line["hidden"] for line in lines}) > 4  # drawn anew
    assert np.mean([line["loss"] for line in lines[-3:]]) < np.mean([line["loss"] for line in lines[:3]])
    assert all(line["finite"] for line in lines)


@pytest.mark.parametrize(
    "method",
    [
        methods.Full(),
        methods.Bottleneck(),
        methods.Prefix(virtual_tokens=3),
        methods.IA3(),
        methods.LoRA(rank=2) + methods.BitFit(),
    ],
    ids=lambda method: method.title,
)
def test_a_step_is_made_for_every_method(tagger, method):
    _traced(*tagger, method)


def test_and_for_a_base_in_four_bits(folder, tagger):
    model, params = jaxft.load_pretrained(
        str(folder[0]), task="token_classification", labels=TAGS, quantization=Format("nf4", 32), quantized=("attention/query",)
    )
    for salience in ("gradient", "attention"):
        _traced(model, {**params, OWN: tagger[1][OWN]}, methods.LoRA(rank=2), dataclasses.replace(ALL, salience=salience))


def _traced(model, params, method, objective=None):
    """Raises unless a step with every policy is made; by shapes."""
    objective = objective or dataclasses.replace(ALL, salience="attention")
    whole = method.init(jax.random.key(0), model, {name: part for name, part in params.items() if name != OWN})
    mask = {**method.mask(whole), OWN: jax.tree.map(lambda _: False, params[OWN])}
    trainable, frozen = jaxft.partition({**whole, OWN: params[OWN]}, mask)
    optimizer = lenient(optax.sgd(0.1))
    step = make_step(model, TokenClassification(), optimizer, seed=0, objective=objective, steps=9)
    state, metrics = jax.eval_shape(step, new_state(trainable, optimizer), frozen, {name: part[None] for name, part in rows(2).items()})
    assert jax.tree.structure(state.trainable) == jax.tree.structure(trainable)
    assert {"hidden", "hidden_DRUG", "restoration_accuracy"} <= metrics.keys()


def test_how_a_step_is_cut_changes_nothing(tagger):
    model, params = tagger
    objective, batch = DynamicMask(rate=1.0, masked=1.0, random=0.0, mask_token_id=MASK), rows()  # all is hidden: nothing is drawn
    whole = step_of(model, jax.tree.map(lambda _: None, params), TokenClassification(), objective, batch)

    @jax.jit
    def sums(params, part, shared):
        return objective.sums(dataclasses.replace(whole, shared=shared), params, part, None)

    one = sums(params, batch, whole.shared)
    halves = [sums(params, {name: values[half] for name, values in batch.items()}, whole.shared) for half in (slice(3), slice(3, 6))]
    both = jax.tree.map(lambda first, second: first + second, *halves)
    both[1]["mask_rate"] = one[1]["mask_rate"]
    assert jax.tree.structure(both) == jax.tree.structure(one)
    for found, expected in zip(jax.tree.leaves(both), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_schedule_by_validation_goes_on_where_the_loss_gets_no_better():
    objective = DynamicMask(rate=0.1, final_rate=0.5, schedule="validation", validation_move=0.5)
    state, rates = objective.init(None, None, None), []
    for loss in (0.9, 0.7, 0.8, 0.6, 0.65, 0.9):
        state = objective.evaluated(state, {"loss": loss})
        rates.append(float(objective._rate(state, jnp.int32(1), 10)))
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.3, 0.3, 0.5, 0.5], rtol=1e-6)


# ---------------------------------------------------------------- heads of words


def test_an_encoder_without_a_head_of_words_gets_a_new_one_that_trains(folder, tmp_path):
    folder[1].bert.save_pretrained(tmp_path)
    model, _ = jaxft.load_pretrained(str(tmp_path), task="sequence_classification", labels=("a", "b"))
    head = LanguageHead(str(tmp_path), "main", "float32", 0)
    own, trains = DynamicMask().leaves(model, head.read)
    assert all(jax.tree.leaves(trains))
    shapes, _ = DynamicMask().leaves(model, head.shapes)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert own["lm_head"]["dense"]["kernel"].std() > 0
    kept = LanguageHead(str(folder[0]), "main", "float32", 0)
    assert not any(jax.tree.leaves(DynamicMask().leaves(model, kept.read)[1]))
    assert DynamicMask(restoration=0.0).leaves(model, kept.read) == ({}, {})


def test_a_causal_classifier_takes_the_head_of_its_files(tmp_path):
    for tied in (False, True):
        reference = make_reference("llama", tie_word_embeddings=tied)
        reference.save_pretrained(tmp_path / str(tied))
        model, params = jaxft.load_pretrained(str(tmp_path / str(tied)), task="sequence_classification", labels=("a", "b"))
        own, trains = DynamicMask().leaves(model, LanguageHead(str(tmp_path / str(tied)), "main", "float32", 0).read)
        assert not any(jax.tree.leaves(trains))
        words, whole = language_model(model, {**params, OWN: own} if own else params)
        hidden = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
        made = words.apply({"params": whole}, hidden, method="logits")
        assert largest_difference(made, reference.lm_head(torch.tensor(hidden)).detach().numpy()) <= 1e-4
    make_reference("llama", "sequence_classification").save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="its files have sequence_classification, and none for causal_lm"):
        DynamicMask().leaves(model, LanguageHead(str(tmp_path / "classifier"), "main", "float32", 0).read)


# ---------------------------------------------------------------- what is refused


def experiment(objective, task, data, **train):
    return Experiment("example", ModelConfig(), data, methods.LoRA(), task, TrainConfig(**train), objective=objective)


RISING = DynamicMask(schedule="validation", final_rate=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.0}, "objective.rate is a share above 0 and up to 1, not 0.0"),
        ({"entity_rate": 1.5}, "objective.entity_rate is a share"),
        ({"salience": "atention"}, "Did you mean 'attention'"),
        ({"schedule": "linaer", "final_rate": 0.1}, "Did you mean 'linear'"),
        ({"schedule": "linear"}, "give both, or neither"),
        ({"final_rate": 0.3}, "give both, or neither"),
        ({"schedule": "linear", "final_rate": 2.0}, "objective.final_rate is a share from 0 to 1"),
        ({"masked": 0.8, "random": 0.3}, "a sum of 1 or less"),
        ({"restoration": -1.0}, "objective.restoration is a weight of 0 or more"),
        ({"mask_token_id": -5}, "objective.mask_token_id is a token's number"),
        ({"head_chunk": 0}, "objective.head_chunk is a number of tokens"),
        ({"policy": "spans", "span_p": 1.0}, "objective.span_p is a probability between 0 and 1"),
        ({"span_max": 0}, "objective.span_max is a number of words"),
        ({"policy": "mix"}, "objective.mix has the shares"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DynamicMask(**fields)


@pytest.mark.parametrize(
    ("objective", "task", "train", "message"),
    [
        (DynamicMask(), MaskedLM(), {}, "not for MaskedLM"),
        (DynamicMask("tags"), SFT(), {}, "by their tags, which the rows of SFT have not"),
        (DynamicMask(), SequenceClassification(), {"r_drop": 1.0}, "leave train.r_drop out"),
        (RISING, SFT(), {}, "set train.eval_every too"),
        (RISING, SFT(), {"eval_every": 5}, "needs a validation set"),
        (RISING, SFT(), {"eval_every": 5, "steps": 5}, "there is none before the end"),
    ],
)
def test_what_it_can_not_be_joined_with_is_refused(objective, task, train, message):
    with pytest.raises(UserError, match=message):
        objective.check(experiment(objective, task, DataConfig(split=(1.0, 0.0, 0.0)), **train))


def test_models_and_rows_that_it_can_not_have_are_refused(tagger):
    model, nothing = tagger[0], types.SimpleNamespace(mask_token_id=None)
    with pytest.raises(UserError, match="The tokenizer has no mask token"):
        DynamicMask().fitted(TokenClassification(), model, nothing)
    assert DynamicMask(mask_token_id=7).fitted(TokenClassification(), model, nothing).mask_token_id == 7
    with pytest.raises(UserError, match="the model has 97 tokens"):
        DynamicMask(mask_token_id=97).fitted(TokenClassification(), model, nothing)
    for objective in (FixMatch(mask_token_id=97), UDA(mask_token_id=-7), SelfSupervised(mask_token_id=97), PseudoAnswers(end_token_id=97)):
        with pytest.raises(UserError, match="the model has 97 tokens, from 0"):
            objective.fitted(TokenClassification(), model, nothing)
    plain = model.clone(config=dataclasses.replace(model.config, labels=("NOUN", "VERB")))
    with pytest.raises(UserError, match="these tags mark none"):
        DynamicMask("tags").fitted(TokenClassification(), plain, nothing)
