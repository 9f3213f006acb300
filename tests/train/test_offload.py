"""What lies in the host's memory.

On CPU that is the devices' own: these tests see where arrays are said to lie, and what an accelerator's program is told.
"""

import dataclasses
import types

import jax
import pytest

import experiments
from jaxft.config import DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxft.errors import UserError
from jaxft.methods import LoRA
from jaxft.train import estimate, placement, setup
from jaxft.train.checkpoint import Checkpoints, Progress
from jaxft.train.loop import jitted_step

HOST = "pinned_host"


@pytest.fixture(autouse=True)
def lenient():
    """optax's updates mix integers and floats, which the suite's strict type promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def experiment(material, offload, remat):
    return dataclasses.replace(
        experiments.load("lora_llama2"),
        model=ModelConfig(source=str(material / "model")),
        data=DataConfig(train=str(material / "rows.jsonl"), split=(0.8, 0.1, 0.1), max_length=64, cache=False),
        method=LoRA(rank=3),
        train=TrainConfig(steps=3, batch_size=2, data_parallel=1, fsdp_parallel=2, remat=remat),
        optimizer=OptimizerConfig(learning_rate=1e-2, offload=offload),
        eval=EvalConfig(split="validation"),
    )


def kinds(optimizer):
    """Returns the memories that the optimizer's arrays lie in, and its numbers."""
    leaves = jax.tree.leaves(optimizer)
    return {leaf.sharding.memory_kind for leaf in leaves if leaf.ndim}, {leaf.sharding.memory_kind for leaf in leaves if not leaf.ndim}


def trained(asked):
    """Returns the run, its state after three steps, their losses, and its step, not compiled."""
    run = setup.set_up(asked)
    step = jitted_step(asked, run.model, run.optimizer, run.state_sharding, run.steps)
    batches = [placement.place_batch(run.batches.batch(index), run.mesh, placement.BATCH) for index in range(3)]
    traced, state, losses = step.trace(run.state, run.frozen, batches[0], run.start), run.state, []
    compiled = traced.lower().compile()
    for batch in batches:
        state, metrics = compiled(state, run.frozen, batch, run.start)
        losses.append(float(metrics["loss"]))
    return run, state, losses, traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(scope="module")
def runs(material):
    """The same three steps, everything on the devices, and what can be in the host's memory."""
    with jax.numpy_dtype_promotion("standard"):
        return trained(experiment(material, False, "dots")), trained(experiment(material, True, "offload"))


def test_it_changes_no_number(runs):
    (_, plain, losses, _), (_, offloaded, found, _) = runs
    assert found == losses
    assert jax.tree.all(jax.tree.map(lambda one, other: (one == jax.device_put(other, one.sharding)).all(), plain, offloaded))


def test_the_optimizers_arrays_stay_in_the_hosts_memory_from_step_to_step(runs, tmp_path):
    (_, plain, _, _), (run, state, _, _) = runs
    assert kinds(plain.optimizer) == ({"device"}, {"device"})
    assert kinds(state.optimizer) == ({HOST}, {"device"})
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.trainable)} == {"device"}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, Progress({}, "", {}))
    checkpoints.wait()
    again = checkpoints.restore(3, state, run.state_sharding)
    checkpoints.close()
    assert kinds(again.optimizer) == ({HOST}, {"device"})
    assert jax.tree.all(jax.tree.map(lambda one, other: (one == other).all(), again, state))


def test_an_accelerators_program_fetches_the_state_and_sends_products_away_and_back(runs):
    (_, _, _, plain), (_, state, _, told) = runs
    assert "annotate_device_placement" not in plain
    moments = sum(leaf.ndim > 0 for leaf in jax.tree.leaves(state.optimizer))
    lines = [line for line in told.splitlines() if "annotate_device_placement" in line]
    assert sum(f'"{HOST}"' in line for line in lines) > moments  # products too
    assert sum('"device"' in line for line in lines) > moments
    assert told.count(f'mhlo.memory_kind = "{HOST}"') == 2 * moments  # as the step takes them, and gives them


def test_the_plan_tells_the_hosts_memory_from_the_devices(material):
    asked = [experiment(material, False, "dots"), experiment(material, True, "offload")]
    plain, found = (estimate.of_step(*reversed(estimate.prepare(one, None, False))) for one in asked)
    moved = {"optimizer": plain.memory["optimizer"] - found.memory["optimizer"]}
    moved["activations"] = plain.memory["activations"] - found.memory["activations"]
    assert found.host == moved
    assert plain.host == {}
    assert min(moved.values()) > 0


@pytest.mark.parametrize(("offload", "remat", "field"), [(True, "none", "optimizer.offload"), (False, "offload", "train.remat=offload")])
def test_devices_that_can_not_use_the_hosts_memory_are_named(material, monkeypatch, offload, remat, field):
    memory = types.SimpleNamespace(kind="device")
    device = types.SimpleNamespace(device_kind="Toy 1", platform="toy", addressable_memories=lambda: [memory])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(UserError, match=rf"^{field}: Toy 1 \(toy\) can't hold arrays in its host's memory. Leave it out.$"):
        setup.check(experiment(material, offload, remat))
