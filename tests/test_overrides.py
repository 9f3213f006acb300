"""Experiments as flags and as JSON."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft import overrides
from jaxft.config import DataConfig, Experiment, ModelConfig, TrainConfig
from jaxft.errors import UserError
from jaxft.methods import LoRA
from jaxft.tasks import SFT

EXPERIMENT = Experiment("example", ModelConfig(source="a/b"), DataConfig(train="a.jsonl"), LoRA(), SFT())


def field(path, *arguments):
    """Returns what a field is after these flags."""
    return overrides.fields_of(overrides.parse_flags(EXPERIMENT, arguments))[path][1]


def message(*arguments):
    """Returns the message that these flags get."""
    with pytest.raises(UserError) as caught:
        overrides.parse_flags(EXPERIMENT, arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("data.system", "Be short, please: a=b.", "Be short, please: a=b."),
        ("data.system", "", ""),
        ("data.system", "1", "1"),
        ("data.prompt", "Drug: {drug}\nReview: {text}", "Drug: {drug}\nReview: {text}"),
        ("train.steps", "20", 20),
        ("train.data_parallel", "-1", -1),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", "1", 1.0),
        ("data.packing", "false", False),
        ("data.packing", "True", True),
        ("data.split", "0.8,0.1,0.1", (0.8, 0.1, 0.1)),
        ("data.split", "(1, 0, 0)", (1.0, 0.0, 0.0)),
        ("method.rank", "4", 4),
        ("method.rslora", "true", True),
        ("method.targets", "q_proj", ("q_proj",)),
        ("method.targets", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("method.targets", "('q_proj', 'v_proj')", ("q_proj", "v_proj")),
        ("method.targets", "attention/(q|v)_proj,layers/[0-3]/mlp,x{1,2}", ("attention/(q|v)_proj", "layers/[0-3]/mlp", "x{1,2}")),
        ("method.rank_pattern", "q_proj:16,(?:k|v)_proj:4", (("q_proj", 16), ("(?:k|v)_proj", 4))),
        ("method.rank_pattern", "(('q_proj', 16),)", (("q_proj", 16),)),
        ("method.rank_pattern", "", ()),
        ("method.alpha_pattern", "q_proj:32", (("q_proj", 32.0),)),
        ("task.label_smoothing", "0.1", 0.1),
    ],
)
def test_a_flag_gives_a_field_in_its_type(path, text, value):
    found = field(path, f"--config.{path}={text}")
    assert found == value
    assert type(found) is type(value)


def test_a_switch_may_stand_alone():
    assert field("method.rslora", "--config.method.rslora") is True
    assert field("data.packing", "--noconfig.data.packing") is False


def test_a_value_may_stand_apart_from_its_flag():
    assert field("train.steps", "--config.train.steps", "7") == 7


def test_the_last_of_two_flags_holds():
    assert field("train.steps", "--config.train.steps=7", "--config.train.steps=8") == 8


def test_epochs_beside_the_experiments_own_steps_are_told():
    given = dataclasses.replace(EXPERIMENT, train=TrainConfig(steps=50))
    with pytest.raises(UserError, match=r"train.epochs has no effect: example has train.steps=50. Add --config.train.steps=0"):
        overrides.parse_flags(given, ["--config.train.epochs=3"])
    assert overrides.parse_flags(given, ["--config.train.epochs=3", "--config.train.steps=0"]).train.epochs == 3
    assert overrides.parse_flags(given, ["--config.train.steps=7"]).train.steps == 7


def test_other_fields_stay_and_the_experiment_is_not_changed():
    changed = overrides.parse_flags(EXPERIMENT, ["--config.method.rank=4"])
    assert changed == dataclasses.replace(EXPERIMENT, method=LoRA(rank=4))
    assert EXPERIMENT.method.rank == 8


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.train.steps=3.5", "config.train.steps: expected a whole number, found '3.5'."),
        ("--config.optimizer.learning_rate=fast", "config.optimizer.learning_rate: expected a number, found 'fast'."),
        ("--config.optimizer.learning_rate=nan", "config.optimizer.learning_rate: expected a number, found nan."),
        ("--config.data.packing=maybe", "config.data.packing: expected true or false, found 'maybe'."),
        ("--config.data.split=1,2", "config.data.split: expected 3 numbers, separated by commas, found '1,2'."),
        (
            "--config.method.rank_pattern=q_proj",
            "config.method.rank_pattern: expected pairs of text and a whole number, as NAME:VALUE, separated by commas, found 'q_proj'.",
        ),
    ],
)
def test_a_value_of_another_type_is_refused(argument, expected):
    assert message(argument) == expected


@pytest.mark.parametrize(
    ("argument", "name", "hint"),
    [
        ("--config.train.stpes=1", "config.train.stpes", "config.train.steps"),
        ("--config.trian.steps=1", "config.trian.steps", "config.train.steps"),
        ("--config.optimzer.rate=1", "config.optimzer.rate", "config.optimizer"),
        ("--config.train.learning_rate=1", "config.train.learning_rate", "config.optimizer.learning_rate"),
        ("--config.method.rnak=1", "config.method.rnak", "config.method.rank"),
    ],
)
def test_an_unknown_field_names_the_nearest(argument, name, hint):
    assert message(argument).startswith(f"There is no field '{name}'. Did you mean '{hint}'? Known: ")


def test_the_name_by_which_a_folder_is_opened_again_is_no_field_to_set():
    assert message("--config.name=mine").startswith("There is no field 'config.name'.")


def test_an_unknown_field_names_those_there():
    known = sorted(f"config.method.{field.name}" for field in dataclasses.fields(LoRA))
    assert message("--config.method.x=1").endswith(f"Known: {', '.join(known)}.")


def test_a_group_has_no_value():
    assert message("--config.eval=1").startswith("config.eval is a group of fields. Give one of them: config.eval.batch_size, ")
    assert message("--config=1").startswith("config is a group of fields. ")


def test_only_a_switch_has_a_negation():
    assert message("--noconfig.train.steps").startswith("config.train.steps is no switch")


def test_a_word_that_is_no_flag_is_refused():
    assert message("--config.data.system=Be", "short.").startswith("'short.' is no flag. ")


def test_a_class_still_refuses_what_makes_no_sense():
    assert message("--config.method.rank=0") == "method.rank: a LoRA's rank is at least 1, not 0."


@given(
    st.builds(
        Experiment,
        name=st.text(),
        model=st.builds(ModelConfig, source=st.text()),
        data=st.builds(DataConfig, system=st.text(), packing=st.booleans(), split=st.tuples(*[st.floats(0, 1)] * 3)),
        method=st.builds(
            LoRA,
            rank=st.integers(1, 1024),
            alpha=st.floats(0, exclude_min=True, allow_infinity=False),
            dropout=st.floats(0, 1, exclude_max=True),
            targets=st.lists(st.text()).map(tuple),
            rank_pattern=st.lists(st.tuples(st.text(), st.integers(1, 1024))).map(tuple),
            alpha_pattern=st.lists(st.tuples(st.text(), st.floats(0, exclude_min=True, allow_infinity=False))).map(tuple),
        ),
        task=st.builds(SFT, z_loss=st.floats(0, 1)),
        train=st.builds(TrainConfig, steps=st.integers()),
    )
)
def test_json_gives_back_the_same_experiment(experiment):
    written = overrides.to_dict(experiment)
    assert json.loads(json.dumps(written)) == written
    assert overrides.from_dict(json.loads(json.dumps(written))) == experiment


def test_json_names_the_classes():
    written = overrides.to_dict(EXPERIMENT)
    assert (written["method"]["class"], written["task"]["class"]) == ("LoRA", "SFT")


def test_a_missing_field_takes_its_default():
    written = overrides.to_dict(EXPERIMENT)
    del written["train"], written["data"]["limit"], written["method"]["dropout"]
    assert overrides.from_dict(written) == EXPERIMENT


def test_an_unknown_class_or_field_in_json_is_refused():
    written = overrides.to_dict(EXPERIMENT)
    with pytest.raises(UserError, match="There is no method 'LORA'. Did you mean 'LoRA'?"):
        overrides.from_dict(written | {"method": {"class": "LORA"}})
    with pytest.raises(UserError, match="There is no field 'config.task.smoothing'"):
        overrides.from_dict(written | {"task": {"class": "SFT", "smoothing": 0.1}})


def test_an_experiment_with_a_value_of_another_type_is_refused():
    wrong = dataclasses.replace(EXPERIMENT, method=LoRA(targets="q_proj"))
    with pytest.raises(UserError, match="config.method.targets: expected texts, separated by commas, found 'q_proj'"):
        overrides.checked(wrong)


def test_a_whole_number_becomes_a_float_where_one_stands():
    assert type(overrides.checked(dataclasses.replace(EXPERIMENT, method=LoRA(alpha=16))).method.alpha) is float
