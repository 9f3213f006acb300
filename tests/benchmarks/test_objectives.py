"""What the benchmark of objectives makes of its steps, and the steps themselves on a tiny model."""

import importlib.util
import json
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def objectives():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        spec = importlib.util.spec_from_file_location("objectives", FOLDER / "objectives.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    sys.modules.pop("machine", None)


def test_a_ratio_is_taken_within_its_round(objectives):
    plain, other = {"seconds": [1.0, 10.0, 1.0, 1.0, 1.0]}, {"seconds": [3.0, 30.0, 3.0, 2.0, 4.0]}
    assert objectives.ratios(other, plain) == (3.0, 3.0, 3.0)
    assert objectives.ratios({"seconds": [2.0]}, {"seconds": [4.0]}) == (0.5, 0.5, 0.5)


def test_the_record_is_the_report(objectives):
    results = FOLDER / "results"
    found = json.loads((results / "objectives.json").read_text())
    assert objectives.render(found) == (results / "objectives.md").read_text()
    for rows in (group["rows"] for group in found.values()):
        assert rows[0]["objective"] == objectives.PLAIN
        assert all(row["operations"] >= rows[0]["operations"] for row in rows)


@pytest.mark.parametrize("group", ["labels", "tags", "answers"])
def test_its_objectives_are_ones_that_their_experiments_can_have(objectives, group):
    import experiments
    from jaxft import overrides
    from jaxft.objectives.base import objective_of

    named, _, every = objectives.GROUPS[group]
    for objective in every:
        found = overrides.parse_flags(experiments.load(named), [f"--config.objective={objective}"])
        objective_of(found).check(found)
