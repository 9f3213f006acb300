"""Language modelling beside a task: transformers' own loss of the same texts, by the head of words of the model's files."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import LABELS, VOCABULARY, make_reference

import jaxft
from jaxft.errors import UserError
from jaxft.hub.language_head import LanguageHead
from jaxft.methods import Full
from jaxft.methods.partition import partition
from jaxft.objectives import SelfSupervised
from jaxft.objectives.base import Step
from jaxft.tasks import SFT, SequenceClassification

KEYS = {name: jax.random.key(number) for number, name in enumerate(("dropout", "mask", "objective"))}
MASK, SPECIAL, LENGTH = 5, (0, 1, 2), 24
IDS = [*SPECIAL, MASK]
TOKENIZER = types.SimpleNamespace(mask_token_id=MASK, all_special_ids=IDS, all_special_tokens=list(map(str, IDS)), added_tokens_decoder={})


def batch(seed, lengths, scored):
    """Returns a row an example, the first token special; a slot each."""
    random = np.random.default_rng(seed)
    tokens = random.integers(6, VOCABULARY, (len(lengths), LENGTH)).astype(np.int32)
    tokens[:, 0] = 1
    segments = (np.arange(LENGTH) < np.asarray(lengths)[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    slots = {"scored": scored, "targets": np.zeros_like(scored), "weights": np.ones(scored.shape, np.float32)}
    made = {"tokens": tokens * segments, "segment_ids": segments, "positions": positions, **slots}
    return {name: jnp.asarray(value) for name, value in made.items()}


def taken(family, task, kind, tmp_path, **settings):
    """Returns the reference, the objective, what its loss is made with, the trainable leaves, the rows, and sums and figures."""
    reference = make_reference(family, "causal_lm" if family == "llama" else "masked_lm", **settings)
    reference.save_pretrained(tmp_path)
    options = {"labels": LABELS, "problem_type": "single_label_classification"} if kind == "sequence_classification" else {}
    model, params = jaxft.load_pretrained(tmp_path, task=kind, **options)
    objective = SelfSupervised(weight=0.5).fitted(task, model, TOKENIZER)
    own, trains = objective.leaves(model, LanguageHead(str(tmp_path), "main", "float32", 0).read)
    assert not any(jax.tree.leaves(trains))  # the files' own head stays as it is
    method = Full()
    params = method.init(jax.random.key(0), model, params)
    mask = method.mask(params) | ({"objective": trains} if own else {})
    trainable, frozen = partition(params | ({"objective": own} if own else {}), mask)
    scored = np.asarray([[0], [0]], np.int32)
    rows = batch(1, [20, 15], scored) | {"unlabelled": batch(2, [24, 11], scored)}
    shared = objective.shared(jax.tree.map(lambda leaf: leaf[None], rows), None, jnp.int32(0), 10)
    step = Step(task, model, frozen, KEYS, {}, jnp.int32(0), 10, shared)
    return reference, objective, step, trainable, rows


def supervised(step, trainable, rows):
    return step.supervised(trainable, {name: value for name, value in rows.items() if name != "unlabelled"}).loss


def test_an_encoder_tells_hidden_tokens_by_its_own_head(tmp_path):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    given = taken("bert", SequenceClassification(), "sequence_classification", tmp_path, **no_dropout)
    reference, objective, step, trainable, rows = given
    seen, targets, weights = objective._hidden(step, rows["unlabelled"])
    labels = np.full((2, LENGTH), -100)
    for row, (places, own, real) in enumerate(zip(*map(np.asarray, (seen["scored"], targets, weights)), strict=True)):
        labels[row, places[real > 0]] = own[real > 0]
    counts = (labels != -100).sum(axis=1)
    np.testing.assert_array_equal(counts, [round(0.15 * 23), round(0.15 * 10)])
    with torch.no_grad():
        texts = {"input_ids": torch.tensor(np.asarray(seen["tokens"])), "attention_mask": torch.tensor(np.asarray(seen["segment_ids"]))}
        mean = reference(**texts, labels=torch.tensor(labels)).loss.item()
    sums, logged = jax.jit(lambda leaves: objective.sums(step, leaves, rows, None))(trainable)
    np.testing.assert_allclose(sums.loss - supervised(step, trainable, rows), 0.5 * 2 * mean, rtol=1e-4)
    np.testing.assert_allclose(logged["unlabelled_loss"][0], mean * counts.sum(), rtol=1e-4)


def test_a_causal_model_tells_the_next_tokens_and_a_stage_has_one_loss_alone(tmp_path):
    given = taken("llama", SFT(), "causal_lm", tmp_path)
    reference, objective, step, trainable, rows = given
    tokens, segments = (torch.tensor(np.asarray(rows["unlabelled"][name])).long() for name in ("tokens", "segment_ids"))
    with torch.no_grad():
        mean = reference(input_ids=tokens, attention_mask=segments, labels=torch.where(segments > 0, tokens, -100)).loss.item()
    own = supervised(step, trainable, rows)
    weights = float(rows["weights"].sum())

    @jax.jit
    def losses(number):
        at = dataclasses.replace(step, number=number)
        staged = dataclasses.replace(objective, stage=0.3)
        return objective.sums(at, trainable, rows, None)[0].loss, staged.sums(at, trainable, rows, None)[0].loss

    np.testing.assert_allclose(losses(jnp.int32(0)), [own + 0.5 * weights * mean, 0.5 * weights * mean], rtol=1e-4)
    np.testing.assert_allclose(losses(jnp.int32(2))[1], 0.5 * weights * mean, rtol=1e-4)
    np.testing.assert_allclose(losses(jnp.int32(3))[1], own, rtol=1e-6)


def test_an_encoder_without_a_mask_token_can_not_have_it():
    model = types.SimpleNamespace(pooling="first", config=types.SimpleNamespace(vocab_size=97))
    with pytest.raises(UserError, match="The tokenizer has no mask token. Set it in its files, or give a token's number"):
        SelfSupervised().fitted(None, model, types.SimpleNamespace(mask_token_id=None))


@pytest.mark.parametrize(("stage", "steps", "learned"), [(0.9, 4, "texts"), (0.05, 9, "labels")])
def test_a_stage_of_all_steps_or_of_none_is_refused(stage, steps, learned):
    def given(steps):
        return types.SimpleNamespace(train=types.SimpleNamespace(steps=steps), task=SequenceClassification())

    with pytest.raises(UserError, match=f"the run would learn from {learned} alone"):
        SelfSupervised(stage=stage).check(given(steps))
    SelfSupervised(stage=stage).check(given(100))
    SelfSupervised(stage=stage).check(given(0))  # by epochs
