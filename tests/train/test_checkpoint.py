"""What a run keeps: the newest checkpoints and the best one, whatever ties there are."""

import dataclasses

import jax.numpy as jnp
import optax
import pytest

from jaxft.train.checkpoint import Checkpoints, Progress, newest_step
from jaxft.train.state import new_state

PROGRESS = Progress(config={}, base="", before={})


def states(count):
    """Yields the states after each of `count` steps."""
    first = new_state({"layers": None, "kernel": jnp.ones(3)}, optax.sgd(0.1))
    for step in range(1, count + 1):
        yield dataclasses.replace(first, step=jnp.int32(step))


@pytest.mark.parametrize(("keep", "expected"), [(1, [2, 6]), (2, [2, 5, 6]), (3, [2, 4, 5, 6])])
def test_the_newest_and_the_best_are_kept(tmp_path, keep, expected):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep)
    for state in states(6):
        best = min(int(state.step), 2)  # later steps tie with step 2, or are worse
        checkpoints.save(state, dataclasses.replace(PROGRESS, best_step=best))
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == expected
    assert newest_step(tmp_path / "checkpoints") == 6


def test_a_run_that_measures_nothing_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for state in states(4):
        checkpoints.save(state, PROGRESS)
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 4]


def test_no_folder_has_no_newest_step(tmp_path):
    assert newest_step(tmp_path / "checkpoints") is None
