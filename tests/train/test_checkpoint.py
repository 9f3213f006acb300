"""What a run keeps: the newest checkpoints and the best one, whatever ties there are."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
import pytest
from full_disk import full_above

from jaxft.errors import UserError
from jaxft.train.checkpoint import Checkpoints, Progress, check_same, fingerprint, newest_step
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


def grown(step, size):
    """A state of as many numbers as it is said."""
    state = new_state({"layers": None, **{f"kernel_{number}": jnp.full(size, step, jnp.float32) for number in range(8)}}, optax.sgd(0.1))
    noise = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(step), leaf.shape), state.trainable)  # it can't be compressed
    return dataclasses.replace(state, step=jnp.int32(step), trainable=noise)


def save(checkpoints, state):
    """Saves, and waits for the threads of orbax that write."""
    checkpoints.save(state, PROGRESS)
    checkpoints.wait()


SAVES_FOR_EVER = """
import itertools, pathlib, sys
from test_checkpoint import Checkpoints, grown, save
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
for step in itertools.count((checkpoints.latest() or 0) + 1):
    save(checkpoints, grown(step, 300_000))
"""


@pytest.mark.slow
def test_killed_while_it_is_written_a_checkpoint_counts_for_nothing(tmp_path):
    """SIGKILL as soon as an unfinished checkpoint's folder is there, and a little later; the run goes on beside what is left of it."""
    folder, here = tmp_path / "checkpoints", pathlib.Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])}
    cut, newest = 0, 0
    for later in (0.0, 0.01, 0.05):
        with subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, str(folder)], env=environment) as process:
            while process.poll() is None and not ((newest_step(folder) or 0) > newest and list(folder.glob("*.orbax-checkpoint-tmp"))):
                time.sleep(0.001)
            time.sleep(later)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        cut += bool(list(folder.glob("*.orbax-checkpoint-tmp")))
        checkpoints = Checkpoints(folder)
        assert checkpoints.latest() == newest_step(folder) > newest
        newest = checkpoints.latest()
        expected = grown(newest, 300_000)
        restored = checkpoints.restore(newest, expected, jax.tree.map(lambda leaf: leaf.sharding, expected))
        checkpoints.close()
        assert jax.tree.all(jax.tree.map(lambda one, other: (one == other).all(), restored, expected))
    assert cut >= 2, "the writes were over before they were killed"


def test_a_full_disk_gives_one_message_and_leaves_the_whole_checkpoint(tmp_path, capfd):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    first = grown(1, 100)
    save(checkpoints, first)
    with full_above(100_000), pytest.raises(UserError, match="is full, or a quota is. The checkpoint of step 1 is whole; the same command"):
        save(checkpoints, grown(2, 100_000))
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.latest() == newest_step(tmp_path / "checkpoints") == 1
    restored = again.restore(1, first, jax.tree.map(lambda leaf: leaf.sharding, first))
    again.save(grown(2, 100_000), PROGRESS)
    again.close()
    assert jax.tree.all(jax.tree.map(lambda one, other: (one == other).all(), restored, first))
    assert newest_step(tmp_path / "checkpoints") == 2
    assert capfd.readouterr().err == ""


def test_a_disk_that_is_full_from_the_start_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with full_above(0), pytest.raises(UserError, match="No checkpoint was written"):
        save(checkpoints, grown(1, 100))
    assert newest_step(tmp_path / "checkpoints") is None


def not_json(step):
    (step / "progress" / "metadata").write_text("{bad")


def cut(step):
    for file in (path for path in (step / "state").rglob("*") if path.is_file()):
        file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize(
    ("damaged", "remedy"),
    [
        ((3,), "Delete 3 in that folder; the same command then goes on from step 2"),
        ((3, 2), "Delete 2, 3 in that folder; the same command then goes on from step 1"),
        ((1,), "Delete 1, 2, 3 in that folder; the same command then begins anew"),
    ],
)
@pytest.mark.parametrize("damage", [not_json, cut])
def test_a_damaged_checkpoint_is_told_with_the_older_one_to_go_on_from(tmp_path, damage, damaged, remedy):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for state in states(3):
        checkpoints.save(state, dataclasses.replace(PROGRESS, best_step=1))
    checkpoints.close()
    damage(tmp_path / "checkpoints" / str(damaged[0]))
    for step in damaged[1:]:
        not_json(tmp_path / "checkpoints" / str(step))
    again = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=rf"step {damaged[0]} in {tmp_path}/checkpoints can't be read .*{remedy}"):
        again.restore(damaged[0], state, jax.tree.map(lambda leaf: leaf.sharding, state)) if damage is cut else again.progress(damaged[0])


def config(split, **sources):
    """A configuration of which the sets alone matter."""
    return {"data": {"train": "a.jsonl", "validation": "", "test": "", "split": split} | sources, "eval": {"limit": 0}}


@pytest.mark.parametrize("before", ["", "b.jsonl"])
def test_a_run_goes_on_with_another_test_set_unless_that_changes_its_training_rows(tmp_path, before):
    uncut, cut = (0.9, 0.1, 0.0), (0.8, 0.1, 0.1)
    check_same(config(uncut, test=before), config(uncut, test="c.jsonl"), tmp_path)
    check_same(config(cut, test="b.jsonl"), config(cut, test="c.jsonl"), tmp_path)
    for one, other in ((config(cut), config(cut, test="c.jsonl")), (config(cut, test="c.jsonl"), config(cut))):
        with pytest.raises(UserError, match="data.test was"):
            check_same(one, other, tmp_path)
        check_same(one, other, tmp_path, trains=False)  # measured alone: its training rows stay those that it was trained on


@pytest.mark.parametrize("split", [(0.9, 0.1, 0.0), (1.0, 0.0, 0.0)])
def test_no_run_goes_on_with_another_validation_set(tmp_path, split):
    with pytest.raises(UserError, match="data.validation was '' and is 'b.jsonl'"):
        check_same(config(split), config(split, validation="b.jsonl"), tmp_path)


SIGN = jnp.uint32(2**31)
CHANGES = {
    "one bit": lambda array: array.at[1, 2].set(array[1, 2] ^ 1),
    "one sign": lambda array: array.at[1, 2].set(array[1, 2] ^ SIGN),
    "two signs": lambda array: array.at[1, 2].set(array[1, 2] ^ SIGN).at[3, 3].set(array[3, 3] ^ SIGN),
    "all signs": lambda array: array ^ SIGN,
    "two rows": lambda array: array[jnp.array([1, 0, 2, 3])],
    "two columns": lambda array: array[:, jnp.array([0, 3, 2, 1])],
    "turned": lambda array: array.T,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_base_is_told_from_one_that_differs_in(change, dtype):
    values = jax.random.normal(jax.random.key(0), (4, 4), jnp.float32).astype(dtype)
    bits = jax.lax.bitcast_convert_type(values, {4: jnp.uint32, 2: jnp.uint16}[dtype.dtype.itemsize]).astype(jnp.uint32)
    changed = change(bits << 16 if dtype == jnp.bfloat16 else bits)
    changed = jax.lax.bitcast_convert_type(changed, jnp.float32).astype(dtype)  # the upper half of a float32 is a bfloat16
    if jnp.array_equal(values, changed):
        assert dtype == jnp.bfloat16  # the bit that it hasn't
        return
    own = fingerprint({"embed": {"embedding": values}})
    assert fingerprint({"embed": {"embedding": jnp.copy(values)}}) == own
    assert fingerprint({"embed": {"embedding": changed}}) != own


def test_a_base_is_told_by_names_shapes_and_types_too():
    zeros = jnp.zeros((2, 8))
    trees = ({"a": zeros}, {"b": zeros}, {"a": zeros.reshape(4, 4)}, {"a": zeros.astype(jnp.bfloat16)}, {"a": zeros, "b": zeros})
    assert len(set(map(fingerprint, trees))) == len(trees)
