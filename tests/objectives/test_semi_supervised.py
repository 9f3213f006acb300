"""Losses on rows without labels against a second implementation in torch: values and gradients, and what must carry none."""

import dataclasses
import functools

import bag_model as bag
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as functional
from tiny_models import largest_difference

from jaxft.errors import UserError
from jaxft.objectives import SMART, UDA, VAT, FixMatch, FlexMatch, FreeLB, MeanTeacher, PseudoAnswers, SelfTraining
from jaxft.objectives.perturbation import features
from jaxft.objectives.unlabelled import dropout
from jaxft.objectives.views import View, strong
from jaxft.tasks import SequenceClassification
from jaxft.train.state import new_state
from jaxft.train.step import make_step

KEYS = {name: jax.random.key(number) for number, name in enumerate(("dropout", "mask", "objective"))}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32 against float64
SEEN = {"mask_token_id": bag.MASK, "special_token_ids": bag.SPECIAL}
FIX_MATCH = FixMatch(weight=0.7, threshold=0.8, masked=0.3, deleted=0.2, swapped=0.4, **SEEN)
TEACHER = MeanTeacher(weight=2.0, ramp_up=0.5)


@functools.cache  # one program an objective, whatever it is asked
def program(objective, words):
    """Returns taken(trainable, rows, state, number) -> ((loss, figures), gradient) of a micro-batch."""

    def taken(trainable, rows, state, number):
        shared = objective.shared(jax.tree.map(lambda leaf: leaf[None], rows), state, number, 10)
        given = bag.step(KEYS, shared, words, number)

        def loss(trainable):
            sums, logged = objective.sums(given, trainable, rows, state)
            return sums.loss, {name: above for name, (above, _) in logged.items()}

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    return jax.jit(taken)


def ours(objective, words=False, state=None, number=0, rows=None, trainable=bag.TRAINABLE):
    """Returns loss, gradient in the trainable leaves, and the figures."""
    rows = (bag.rows(words) if objective.unlabelled else bag.batch(1)) if rows is None else rows
    state = objective.init(None, bag.Bag(), bag.TRAINABLE) if state is None else state
    (value, logged), gradient = program(objective, words)(trainable, rows, state, jnp.int32(number))
    return value, gradient, {name: np.asarray(above) for name, above in logged.items()}


def supervised(params, rows, offset=None):
    targets, weights = (torch.tensor(np.asarray(rows[name])).reshape(-1) for name in ("targets", "weights"))
    return (functional.cross_entropy(bag.torch_logits(params, rows, offset), targets.long(), reduction="none") * weights).sum()


def weights_of(rows):
    return torch.tensor(np.asarray(rows["weights"]), dtype=torch.float64).reshape(-1)


def scale(rows):
    return float(rows["weights"].sum() / rows["unlabelled"]["weights"].sum())


def view(rows, words, objective):
    """Returns the strong view that the step draws, and which of its slots count."""
    drawn = View(objective.masked, objective.deleted, objective.swapped, bag.MASK, bag.SPECIAL, bag.VOCABULARY, not words)
    seen, kept = jax.jit(strong, static_argnums=2)(KEYS["objective"], rows["unlabelled"], drawn)
    return seen, torch.tensor(np.asarray(kept), dtype=torch.float64).reshape(-1) * weights_of(rows["unlabelled"])


def check(found, params, loss):
    """Compares a loss and its gradient with torch's."""
    loss.backward()
    np.testing.assert_allclose(found[0], loss.item(), **CLOSE)
    for name in ("kernel", "head"):
        np.testing.assert_allclose(found[1][name], params[name].grad, **CLOSE)
    assert found[1]["embed"] is None


@pytest.mark.parametrize("words", [False, True])
def test_fixmatch_is_cross_entropy_of_the_strong_view_for_the_sure_labels_of_the_weak(words):
    limit = 0.6 if words else 0.8
    objective, rows = dataclasses.replace(FIX_MATCH, threshold=limit), bag.rows(words)
    params = bag.torch_params(bag.PARAMS)
    seen, weights = view(rows, words, objective)
    with torch.no_grad():
        sure, labels = bag.torch_logits(params, rows["unlabelled"]).softmax(-1).max(-1)
    used = (sure >= limit) * weights
    assert 0 < used.sum() < weights.sum()
    loss = (functional.cross_entropy(bag.torch_logits(params, seen), labels, reduction="none") * used).sum()
    found = ours(objective, words)
    check(found, params, supervised(params, rows) + 0.7 * scale(rows) * loss)
    targets = torch.tensor(np.asarray(rows["unlabelled"]["targets"])).reshape(-1)
    assert found[2]["unlabelled_used"] == used.sum().item()
    assert found[2]["pseudo_accuracy"] == (used * (targets == labels)).sum().item()
    for number, name in enumerate(bag.LABELS):
        assert found[2][f"unlabelled_used/{name}"] == (used * (labels == number)).sum()
        assert found[2][f"pseudo_accuracy/{name}"] == (used * (labels == number) * (targets == number)).sum()


def test_uda_is_the_divergence_from_the_sharpened_weak_view():
    objective, rows = UDA(threshold=0.5, temperature=0.4, masked=0.3, deleted=0.2, **SEEN), bag.rows()
    params = bag.torch_params(bag.PARAMS)
    seen, weights = view(rows, False, objective)
    with torch.no_grad():
        weak = bag.torch_logits(params, rows["unlabelled"])
    used = (weak.softmax(-1).max(-1).values >= 0.5) * weights
    far = functional.kl_div(bag.torch_logits(params, seen).log_softmax(-1), (weak / 0.4).softmax(-1), reduction="none").sum(-1)
    check(ours(objective), params, supervised(params, rows) + scale(rows) * (far * used).sum())


def test_flexmatch_has_a_threshold_for_each_class_and_remembers_each_slot():
    objective, rows = FlexMatch(threshold=0.7, masked=0.3, **SEEN), bag.rows(words=True)
    classes = np.int32([0] * 4 + [1] * 2 + [2] * 1 + [-1] * 3 + [0] * 6)
    state = {"used": jnp.float32(0), "classes": jnp.asarray(classes)}
    params = bag.torch_params(bag.PARAMS)
    seen, weights = view(rows, True, objective)
    with torch.no_grad():
        sure, labels = bag.torch_logits(params, rows["unlabelled"]).softmax(-1).max(-1)
    learned = np.float64([10, 2, 1]) / 10  # of the most frequent class, which has more slots than are unsure
    limits = torch.tensor(0.7 * learned / (2 - learned))[labels]
    used = (sure >= limits) * weights
    assert used.sum() > ((sure >= 0.7) * weights).sum()
    loss = (functional.cross_entropy(bag.torch_logits(params, seen), labels, reduction="none") * used).sum()
    found = ours(objective, True, state)
    check(found, params, supervised(params, rows) + scale(rows) * loss)
    logged = {name: (above, 1.0) for name, above in found[2].items()}
    after = objective.update(state, None, logged, jnp.int32(1))
    real = np.asarray(rows["unlabelled"]["weights"]).reshape(-1) > 0
    np.testing.assert_array_equal(after["classes"], np.where((sure.numpy() >= 0.7) & real, labels.numpy(), classes))
    assert len(objective.with_slots(state, 5)["classes"]) == 5


@pytest.mark.parametrize(("soft", "balanced"), [(False, True), (True, False)])
def test_self_training_is_cross_entropy_for_its_own_labels_balanced_by_class(soft, balanced):
    objective = SelfTraining(threshold=0.5, soft=soft, temperature=0.5 if soft else 1.0, balanced=balanced)
    rows, params = bag.rows(), bag.torch_params(bag.PARAMS)
    shares = np.float32([0.02, 0.5, 0.48])
    with torch.no_grad():
        own = bag.torch_logits(params, rows["unlabelled"])
    sure, labels = own.softmax(-1).max(-1)
    used = (sure >= 0.5) * weights_of(rows["unlabelled"])
    counts = torch.tensor(np.clip(1 / (3 * shares), 0.1, 10.0), dtype=torch.float64)[labels] if balanced else 1.0
    target = (own / 0.5).softmax(-1) if soft else labels
    loss = (functional.cross_entropy(bag.torch_logits(params, rows["unlabelled"]), target, reduction="none") * used * counts).sum()
    state = {"used": jnp.float32(0), "shares": jnp.asarray(shares)}
    found = ours(objective, False, state)
    check(found, params, supervised(params, rows) + scale(rows) * loss)
    after = objective.update(state, None, {name: (jnp.asarray(above), 1.0) for name, above in found[2].items()}, jnp.int32(1))
    now = torch.bincount(labels[used > 0], minlength=3) / (used > 0).sum()
    np.testing.assert_allclose(after["shares"], 0.99 * shares + 0.01 * now.numpy(), rtol=1e-5)


@pytest.mark.parametrize("distance", ["square", "kl"])
def test_mean_teacher_is_the_distance_from_the_averaged_weights_on_a_ramp(distance):
    objective, rows = dataclasses.replace(TEACHER, distance=distance), bag.rows()
    params, teacher = bag.torch_params(bag.PARAMS), bag.torch_params(bag.OTHER | {"embed": bag.PARAMS["embed"]})
    with torch.no_grad():
        target = bag.torch_logits(teacher, rows["unlabelled"]).softmax(-1)
    student = bag.torch_logits(params, rows["unlabelled"])
    far = ((student.softmax(-1) - target) ** 2).mean(-1)
    if distance == "kl":
        far = functional.kl_div(student.log_softmax(-1), target, reduction="none").sum(-1)
    ramp = np.exp(-5 * (1 - 2 / 5) ** 2)
    loss = supervised(params, rows) + 2.0 * ramp * scale(rows) * (far * weights_of(rows["unlabelled"])).sum()
    check(ours(objective, state=bag.TEACHER, number=2), params, loss)
    after = objective.update(bag.TEACHER, bag.TRAINABLE, {}, jnp.int32(3))
    np.testing.assert_allclose(after["kernel"], 0.75 * bag.OTHER["kernel"] + 0.25 * bag.PARAMS["kernel"], rtol=1e-5)
    assert after["embed"] is None


def example_norms(change, rows, reduce):
    """Returns the norm of each token's example, (batch, length, 1)."""
    segments, found = np.asarray(rows["segment_ids"]), torch.ones(*change.shape[:2], 1, dtype=torch.float64)
    for row in range(len(segments)):
        for segment in (1, 2):
            own = torch.tensor(segments[row] == segment)
            found[row, own] = reduce(change[row, own])
    return found * torch.tensor(segments > 0)[:, :, None] + torch.tensor(segments == 0)[:, :, None]


def drawn(rows):
    shape = (*rows["tokens"].shape, features(bag.Bag()))
    return torch.tensor(np.asarray(jax.random.normal(KEYS["objective"], shape)), dtype=torch.float64)


def test_vat_is_the_divergence_at_the_worst_change_of_each_example():
    objective, rows = VAT(weight=0.5, epsilon=0.8, xi=0.1, iterations=2, entropy=0.3), bag.rows()
    others, params = rows["unlabelled"], bag.torch_params(bag.PARAMS)
    weights, real = weights_of(others), torch.tensor(np.asarray(others["segment_ids"]) > 0)[:, :, None]
    clean = bag.torch_logits(params, others)
    target = clean.detach().softmax(-1)

    def apart(change):
        far = functional.kl_div(bag.torch_logits(params, others, change).log_softmax(-1), target, reduction="none").sum(-1)
        return (far * weights).sum()

    way = drawn(others) * real
    way = way / example_norms(way, others, torch.norm)
    for _ in range(2):
        change = (0.1 * way).requires_grad_()
        way = torch.autograd.grad(apart(change), change)[0] * real
        way = way / example_norms(way, others, torch.norm)
    entropy = (-(clean.softmax(-1) * clean.log_softmax(-1)).sum(-1) * weights).sum()
    loss = supervised(params, rows) + 0.5 * scale(rows) * (apart(0.8 * way.detach()) + 0.3 * entropy)
    check(ours(objective), params, loss)


def test_freelb_is_the_mean_over_steps_up_the_loss():
    objective, rows = FreeLB(ascents=3, rate=0.5, epsilon=0.6), bag.batch(1)
    params, change = bag.torch_params(bag.PARAMS), torch.zeros(2, 12, 5, dtype=torch.float64)
    total = 0
    for _ in range(3):
        change.requires_grad_()
        loss = supervised(params, rows, change)
        uphill = torch.autograd.grad(loss, change, retain_graph=True)[0]
        change = change.detach() + 0.5 * uphill / example_norms(uphill, rows, torch.norm)
        change = change * (0.6 / example_norms(change, rows, torch.norm)).clamp(max=1)
        total = total + loss / 3
    check(ours(objective, rows=rows), params, total)


def test_freelb_tells_the_change_of_its_last_pass_and_is_refused_where_none_is_moved():
    step = bag.step(KEYS)
    logged = FreeLB(ascents=2, rate=0.5).sums(step, bag.PARAMS, bag.batch(1), None)[1]
    np.testing.assert_allclose(logged["perturbation"][0] / logged["perturbation"][1], 0.5, rtol=1e-5)  # one step, before the second pass
    for settings in ({"ascents": 1}, {"rate": 0.0}):
        with pytest.raises(UserError, match="FreeLB has no effect"):
            FreeLB(**settings)
        FreeLB(**settings, start=0.1)


def test_freelbs_random_start_has_its_length_on_average_and_none_on_padding():
    rows = bag.batch(1)
    start = FreeLB(start=0.3)._start(bag.step(KEYS), rows)
    lengths = np.float32([5] * 5 + [4] * 4)
    assert (np.abs(start[:, :9]) <= 0.3 / np.sqrt(lengths * 5)[None, :, None] + 1e-7).all()
    assert not np.asarray(start[:, 9:]).any()
    drawn = [np.asarray(FreeLB(start=0.3)._start(bag.step({"objective": jax.random.key(number)}), rows)) for number in range(200)]
    for example in (slice(5), slice(5, 9)):
        squares = [(one[0, example] ** 2).sum() for one in drawn]
        np.testing.assert_allclose(np.mean(squares), 0.3**2 / 3, rtol=0.1)  # of a uniform number a third of its bound's square


def test_smart_is_the_divergence_at_the_worst_change_within_a_cube_and_from_the_averaged_weights():
    objective = SMART(weight=0.7, epsilon=0.15, start=0.1, rate=0.1, ascents=2, proximal=0.4)
    rows = bag.batch(1)
    params, teacher = bag.torch_params(bag.PARAMS), bag.torch_params(bag.OTHER | {"embed": bag.PARAMS["embed"]})
    weights, real = weights_of(rows), torch.tensor(np.asarray(rows["segment_ids"]) > 0)[:, :, None]

    def apart(one, other):
        logs = [values.log_softmax(-1) for values in (one, other)]
        first, second = (functional.kl_div(*pair, reduction="none", log_target=True) for pair in (logs, logs[::-1]))
        return ((first + second).sum(-1) / 2 * weights).sum()

    clean = bag.torch_logits(params, rows)
    change = 0.1 * drawn(rows) * real
    for _ in range(2):
        change.requires_grad_()
        uphill = torch.autograd.grad(apart(clean.detach(), bag.torch_logits(params, rows, change)), change)[0] * real
        change = change.detach() + 0.1 * uphill / example_norms(uphill, rows, lambda values: values.abs().max())
        change = change.clamp(-0.15, 0.15)
    before = bag.torch_logits(teacher, rows).detach()
    loss = supervised(params, rows) + 0.7 * apart(clean, bag.torch_logits(params, rows, change)) + 0.4 * apart(before, clean)
    check(ours(objective, state=bag.TEACHER, rows=rows), params, loss)
    assert objective.update(bag.TEACHER, bag.TRAINABLE, {}, jnp.int32(1))["head"].shape == (6, 3)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize(("objective", "state", "number"), [(FIX_MATCH, None, 0), (TEACHER, bag.TEACHER, 2)])
def test_gradients_are_those_of_finite_differences_and_hidden_labels_change_nothing(objective, state, number):
    _, gradient, _ = ours(objective, state=state, number=number)
    way = {name: None if leaf is None else jax.random.normal(jax.random.key(7), leaf.shape) for name, leaf in bag.TRAINABLE.items()}
    size = 1e-2  # float32: larger than its rounding, smaller than what changes a label

    def value(size):
        moved = jax.tree.map(lambda leaf, own: leaf + size * own, bag.TRAINABLE, way)
        return float(ours(objective, state=state, number=number, trainable=moved)[0])

    slope = sum(float(jnp.vdot(one, other)) for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose((value(size) - value(-size)) / (2 * size), slope, rtol=1e-2)
    rows = bag.rows()
    hidden = rows | {"unlabelled": rows["unlabelled"] | {"targets": jnp.full_like(rows["unlabelled"]["targets"], -1)}}
    np.testing.assert_array_equal(ours(objective, state=state, number=number, rows=hidden)[1]["head"], gradient["head"])


def test_without_a_ramp_the_teacher_counts_whole_from_the_first_step():
    assert float(MeanTeacher(ramp_up=0.0).ramp(bag.step(KEYS))) == 1.0


def test_a_teacher_carries_no_gradient():
    given = bag.step(KEYS, jnp.float32(1), number=2)
    loss = jax.jit(jax.grad(lambda teacher: TEACHER.sums(given, bag.TRAINABLE, bag.rows(), teacher)[0].loss))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(loss(bag.TEACHER)))


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("objective", [SelfTraining(threshold=0.5, balanced=True), MeanTeacher(ramp_up=0.5)])
def test_how_a_step_is_cut_changes_nothing_and_steps_compile_once(objective):
    def taken(shape):
        rows = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), bag.rows())
        sgd = optax.sgd(0.1)
        state = new_state(jax.tree.map(jnp.copy, bag.TRAINABLE), sgd)
        own = objective.with_slots(objective.init(None, bag.Bag(), state.trainable), 8)
        state = dataclasses.replace(state, objective=own)
        step = jax.jit(make_step(bag.Bag(), SequenceClassification(), sgd, seed=0, objective=objective, steps=6), donate_argnums=0)
        for _ in range(3):
            state, metrics = step(state, bag.FROZEN, rows)
        assert step._cache_size() == 1
        return state, metrics

    with jax.numpy_dtype_promotion("standard"):
        assert largest_difference(taken((1, 2)), taken((2, 1))) <= 1e-5  # float32 of numbers of order 1


def test_a_step_without_dropout_has_none_on_other_rows_either():
    assert dropout(bag.step({"objective": KEYS["objective"]}), 0) == {}
    assert dropout(bag.step(KEYS), 0)["dropout"] != dropout(bag.step(KEYS), 1)["dropout"] != KEYS["dropout"]


def test_a_threshold_that_nothing_passes_is_said_once_and_early():
    objective = FixMatch(threshold=0.9)
    none, some = {"used": jnp.float32(0)}, {"used": jnp.float32(3)}
    said = [number for number in range(1, 101) if objective.warning(none, number, 100)]
    assert said == [10]
    assert "in 10 steps the model was never as sure of an unlabelled row as config.objective.threshold=0.9" in objective.warning(
        none, 10, 100
    )
    assert objective.warning(some, 10, 100) == ""
    assert "within config.objective.answer_tokens=16 and was as likely" in PseudoAnswers().warning(none, 10, 100)
    assert objective.warning(none, 4, 4) != ""
    flex = FlexMatch(threshold=0.9)  # whose thresholds of classes begin at 0: all labels are used
    assert "it learns whatever it says itself" in flex.warning({"used": jnp.float32(40), "classes": jnp.full(5, -1)}, 10, 100)
    assert flex.warning({"used": jnp.float32(40), "classes": jnp.asarray([-1, 2])}, 10, 100) == ""
    assert dataclasses.replace(objective, threshold=0.5).update(none, None, {"unlabelled_used": (2.0, 4.0)}, 1) == {"used": 2.0}
