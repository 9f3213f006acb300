"""Runs with rows without labels: from hidden labels and from a file, resumed to the byte; answers that a causal model gives itself."""

import dataclasses
import json
import math
import os
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
from stopped_runs import stop_at

import experiments
from jaxft import overrides
from jaxft.config import DataConfig
from jaxft.data.sources import load_rows
from jaxft.data.unlabelled import hide
from jaxft.errors import UserError
from jaxft.generation import Sampling, generate
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.objectives.base import Step
from jaxft.objectives.pseudo_answers import answered
from jaxft.tasks import SFT, SequenceClassification
from jaxft.train import run, setup
from jaxft.train.data import load_training_data
from jaxft.train.logs import Logs
from jaxft.train.state import key_for

pytestmark = pytest.mark.usefixtures("as_launched")


def experiment(folder, *flags):
    given = experiments.load("full_bert_sentiment")
    fixed = (f"--config.model.source={folder / 'model'}", f"--config.data.train={folder / 'rows.jsonl'}", "--config.data.test=")
    sizes = ("--config.data.split=0.5,0.25,0.25", "--config.data.label=label", "--config.data.max_length=64", "--config.train.batch_size=4")
    steps = ("--config.optimizer.learning_rate=1e-2", "--config.train.steps=6", "--config.train.checkpoint_every=2")
    return overrides.parse_flags(given, [*fixed, *sizes, *steps, "--config.eval.gap=false", *flags])


FLEX = ("--config.objective=FlexMatch(threshold=0.4)", "--config.data.labelled_fraction=0.34", "--config.train.unlabelled_batch_size=2")


def lines(workdir):
    """Returns what metrics.jsonl holds, times aside."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


def exported(workdir):
    return (workdir / "export" / "hf" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(reviews, tmp_path_factory):
    """A run that nothing disturbed: its folder."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run.train(experiment(reviews, *FLEX), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_logs_what_it_made_of_rows_without_labels(whole):
    logged = [line for line in lines(whole) if "loss" in line]
    assert len(logged) == 6
    for line in logged:
        for name in ("unlabelled_used", "agreement", "pseudo_accuracy", "unlabelled_loss", "unlabelled_used/bad", "pseudo_accuracy/so"):
            assert math.isfinite(line[name])
        share = sum(line[f"unlabelled_used/{label}"] for label in ("bad", "good", "so"))
        np.testing.assert_allclose(line["unlabelled_used"], share, rtol=1e-5)
    assert any(line["unlabelled_used"] > 0 for line in logged)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bytes(reviews, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count = iter(range(1, 100))

        def advance(self, *arguments, original=Logs.advance):
            original(self, *arguments)
            if next(count) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Logs, "advance", advance)
        assert run.train(experiment(reviews, *FLEX), tmp_path / "run") == {}
    run.train(experiment(reviews, *FLEX), tmp_path / "run")
    assert exported(tmp_path / "run") == exported(whole)
    assert lines(tmp_path / "run") == lines(whole)


def test_hidden_labels_are_targets_for_figures_and_those_kept_are_of_each_class(reviews):
    data = loaded(experiment(reviews, *FLEX))
    assert len(data.rows["train"]) == 8
    assert set(data.rows["train"].dataset["label"]) == {"bad", "good", "so"}
    others = data.unlabelled.layout.examples
    assert len(others) == 16
    assert set(others.slots.targets.tolist()) <= {0, 1, 2}
    batch = data.unlabelled.batch(0)
    assert batch["tokens"].shape[:2] == (1, 2)


def loaded(given):
    """Returns a run's data, without its weights."""
    described, rows = setup.describe_run(given)
    return load_training_data(described.experiment, described.model, described.tokenizer, described.shapes, rows)


def test_labels_in_a_file_of_rows_without_any_are_ignored_and_said(reviews, capsys):
    path = reviews / "others.jsonl"
    path.write_text("".join(json.dumps({"text": f"w1 w{i}", "label": "no such label"}) + "\n" for i in range(5)))
    data = loaded(experiment(reviews, "--config.objective=VAT()", f"--config.data.unlabelled={path}"))
    assert f"{path}: its column 'label' is ignored: rows of config.data.unlabelled have no labels here." in capsys.readouterr().out
    assert data.unlabelled.layout.examples.slots.targets.tolist() == [-1] * 5
    plain = path.with_name("plain.jsonl")
    plain.write_text("".join(json.dumps({"text": f"w1 w{i}"}) + "\n" for i in range(5)))
    loaded(experiment(reviews, "--config.objective=VAT()", f"--config.data.unlabelled={plain}"))
    assert "is ignored" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config.objective=VAT()",), "VAT learns from rows without labels, and there are none"),
        (("--config.objective=FreeLB()", "--config.data.unlabelled=x.jsonl"), "FreeLB learns from labelled rows alone"),
        (
            (FLEX[1], "--config.objective=PseudoAnswers()"),
            "PseudoAnswers is for causal_lm, not for the task SequenceClassification. For",
        ),
        (("--config.objective=FixMatch(threshold=1.0)",), "objective.threshold is a probability from 0 up to, not including, 1"),
        ((FLEX[0], "--config.data.labelled_fraction=0.09"), "keeps 2 of 24 rows, none of them with the label 'so': there are 3 labels"),
        ((*FLEX[:2], "--config.task.problem_type=multi_label_classification"), "FlexMatch is for one class a text"),
    ],
)
def test_what_an_objective_can_not_have_is_refused(reviews, flags, message):
    with pytest.raises(UserError, match=message):
        setup.describe_run(experiment(reviews, *flags))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), (FLEX[1], "--config.objective=MeanTeacher()")], ids=["alone", "mean teacher"])
def test_adalora_trains_beside_a_classifiers_head(reviews, tmp_path, monkeypatch, flags):
    method = "AdaLoRA(init_rank=3, target_rank=2, tinit=1, tfinal=2, targets=('query', 'value'))"
    asked = experiment(reviews, f"--config.method={method}", *flags)
    run.train(asked, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run.train(asked, tmp_path / "stopped") == {}
    run.train(asked, tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    adapter = safetensors.numpy.load_file(tmp_path / "whole" / "export" / "peft" / "adapter_model.safetensors")
    assert sum(np.count_nonzero(leaf) for name, leaf in adapter.items() if "lora_E" in name) == 2 * 2  # pruned to the budget of two kernels
    assert any("classifier" in name for name in adapter)


@pytest.mark.parametrize(("problem", "given"), [("multi_label_classification", (["bad"], ["bad", "so"])), ("regression", (0.5, 2.0))])
def test_rows_without_labels_stand_beside_several_labels_and_numbers(reviews, tmp_path, problem, given):
    labelled, others = tmp_path / "labelled.jsonl", tmp_path / "others.jsonl"
    labelled.write_text("".join(json.dumps({"text": f"w1 w{i}", "label": given[i % 2]}) + "\n" for i in range(12)))
    others.write_text("".join(json.dumps({"text": f"w2 w{i}"}) + "\n" for i in range(5)))
    flags = [f"--config.data.train={labelled}", f"--config.data.unlabelled={others}", f"--config.task.problem_type={problem}"]
    data = loaded(experiment(reviews, *flags, "--config.objective=SelfSupervised(mask_token_id=1)"))
    assert len(data.unlabelled.layout.examples) == 5


@pytest.mark.parametrize("form", ["names", "switches"])
def test_of_several_labels_each_keeps_a_row(tmp_path, form):
    given = {"names": (["often"], ["often", "rare"]), "switches": ([1, 0], [1, 1])}[form]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"w1 w{i}", "label": given[i == 7]}) + "\n" for i in range(40)))
    rows = load_rows(str(path), "train")
    labels = SequenceClassification().row_labels(rows, DataConfig(label="label"))
    for seed in range(4):
        assert given[1] in list(hide(rows, 0.1, seed, labels)[0].dataset["label"])


def test_texts_without_labels_are_read_as_labelled_ones_whatever_stands_beside(material, tmp_path):
    tokenizer, found = load_tokenizer(str(material / "model")), []
    for others in ({}, {"id": 3}):
        path = tmp_path / f"{len(others)}.jsonl"
        path.write_text("".join(json.dumps({"text": f"number {i}", **others}) + "\n" for i in range(5)))
        rows, data = load_rows(str(path), "train"), DataConfig(loss="all", cache=False)
        labelled = SFT().examples(rows, tokenizer, data, None)
        found.append(SFT().unlabelled(rows, tokenizer, data, None, False))
        for i in range(5):
            np.testing.assert_array_equal(found[-1].tokens_of(i), labelled.tokens_of(i))


def test_words_without_tags_have_a_slot_each(reviews):
    rows = [{"tokens": ["w1", "w2", "w3"], "tags": ["O", "B-X", "I-X"]}, {"tokens": ["w4", "w5"], "tags": ["O", "O"]}] * 10
    (reviews / "tags.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = experiments.load("lora_bert_tags")
    data = dataclasses.replace(given.data, train=str(reviews / "tags.jsonl"), validation="", test="", split=(0.8, 0.1, 0.1), max_length=64)
    given = dataclasses.replace(given, data=data, model=dataclasses.replace(given.model, source=str(reviews / "model")))
    hidden = overrides.parse_flags(given, ["--config.objective=UDA()", "--config.data.labelled_fraction=0.25"])
    found = loaded(hidden).unlabelled.layout.examples
    assert len(found) == 12
    assert set(found.slots.targets.tolist()) == {0, 1, 2}
    words = reviews / "words.jsonl"
    words.write_text("".join(json.dumps({"tokens": ["w1", "w2"], "tags": None}) + "\n" for _ in range(4)))
    others = overrides.parse_flags(given, ["--config.objective=UDA()", f"--config.data.unlabelled={words}"])
    assert loaded(others).unlabelled.layout.examples.slots.targets.tolist() == [-1] * 8


# ---------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def answering(material):
    """A tiny Llama, ready to learn its own answers, of which any is sure enough."""
    given = experiments.load("lora_llama2")
    flags = [f"--config.model.source={material / 'model'}", f"--config.data.train={material / 'rows.jsonl'}", "--config.data.test="]
    flags += ["--config.data.split=0.8,0.1,0.1", "--config.data.system=", "--config.data.prompt=", "--config.data.completion="]
    flags += [
        "--config.data.max_length=128",
        "--config.train.steps=2",
        "--config.train.batch_size=2",
        "--config.data.labelled_fraction=0.5",
    ]
    flags += ["--config.objective=PseudoAnswers(threshold=0.0, answer_tokens=6)"]
    return setup.set_up(overrides.parse_flags(given, flags))


@pytest.fixture(scope="module")
def made(answering):
    """The rows without answers of the first step, what the model makes of them, and a token that ends answers: one that it says."""
    ready = answering
    batch = {name: jax.numpy.asarray(value[0]) for name, value in ready.unlabelled.batch(0).items() if name != "numbers"}
    step, params = Step(ready.experiment.task, ready.model, None, {}, {}, 0, 2), ready.params(ready.state)
    program = jax.jit(lambda end: answered(step, params, batch, 6, end))
    end = int(program(jax.numpy.int32(-1)).answers[0, 0, 2])
    return batch, jax.device_get(program(jax.numpy.int32(end))), end


def test_answers_in_the_step_are_those_of_generation(answering, made):
    ready, (batch, found, end) = answering, made
    examples = ready.unlabelled.layout.examples
    numbers = [i for row in ready.unlabelled._rows_of(0) for i in ready.unlabelled.layout.rows[row]]
    assert len(numbers) > 1
    prompts = [examples.tokens_of(i)[:-6] for i in numbers]
    reference = generate(ready.model, ready.params(ready.state), prompts, Sampling(6, eos_token_ids=(end,)))
    assert any(len(own) < 6 for own in reference)
    real = np.asarray(batch["weights"])[:, : found.answers.shape[1] * 6 : 6] > 0
    for answer, ended, own in zip(found.answers[real], found.ended[real], reference, strict=True):
        np.testing.assert_array_equal(answer[: len(own)], own)
        assert ended == (len(own) < 6)
    assert not found.counted[~real].any()
    at = int(batch["scored"][0, 0]) + 1
    np.testing.assert_array_equal(found.tokens[0, at : at + len(reference[0])], reference[0])


def test_the_loss_of_pseudo_answers_is_their_mean_likelihood_over_prompts(answering, made):
    ready, (others, found, end) = answering, made
    objective, task = dataclasses.replace(ready.experiment.objective, end_token_id=end), ready.experiment.task
    batch = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf[0]), dict(ready.batch(0)))
    rows = {name: value for name, value in batch.items() if name != "unlabelled"}
    rngs = {name: key_for(0, name) for name in ("mask", "objective", "dropout")}
    shared = objective.shared(jax.tree.map(lambda leaf: leaf[None], batch), None, 0, 2)
    step = Step(task, ready.model, ready.frozen, rngs, {}, 0, 2, shared)

    @jax.jit
    def losses(trainable):
        return objective.sums(step, trainable, batch, {"used": np.float32(0)}), step.supervised(trainable, rows).loss

    (sums, logged), labelled = losses(ready.state.trainable)
    prompts = float(others["weights"].sum()) / 6
    np.testing.assert_allclose(logged["unlabelled_loss"][1], prompts)
    np.testing.assert_allclose(logged["unlabelled_loss"][0] * shared, sums.loss - labelled, rtol=1e-3)
    assert 0 < float(logged["unlabelled_used"][0]) == found.ended.sum()
    assert float(logged["unlabelled_used"][1]) == prompts
    own = -np.log(found.likelihood[found.ended]).sum()  # the model has no dropout: its loss on an answer is how likely it found it
    np.testing.assert_allclose(sums.loss, labelled + float(batch["weights"].sum()) / prompts * own, rtol=1e-4)
