"""The plan of a run, against the run itself."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest

import experiments
import launch
from jaxft.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from jaxft.errors import UserError
from jaxft.methods import LoRA, VeRA
from jaxft.train import setup
from jaxft.train.loop import jitted_step
from jaxft.train.placement import BATCH, place_batch
from jaxft.train.plan import plan
from jaxft.train.programs import operations


@pytest.fixture(autouse=True)
def lenient():
    """optax's updates mix integers and floats, which the suite's strict type promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def experiment(material, method, **train):
    recipe = experiments.load("lora_llama2")
    data = DataConfig(train=str(material / "rows.jsonl"), split=(0.8, 0.1, 0.1), max_length=128, cache=False)
    train = TrainConfig(**{"steps": 2, "batch_size": 2, "data_parallel": 1, "fsdp_parallel": 2} | train)
    return dataclasses.replace(
        recipe,
        model=ModelConfig(source=str(material / "model")),
        data=data,
        method=method,
        train=train,
        eval=EvalConfig(split="validation"),
    )


def on_first_device(tree):
    """Bytes that the first device holds of these arrays, each one counted once."""
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(next(iter(array.addressable_shards)).data.nbytes for array in arrays)


@pytest.mark.parametrize("method", [LoRA(rank=3), VeRA(rank=5)], ids=["lora", "vera"])
def test_it_is_the_memory_of_the_run_itself(material, method):
    asked = experiment(material, method)
    found = plan(asked)
    run = setup.set_up(asked)
    assert found.memory["frozen weights"] == on_first_device(run.frozen)
    assert found.memory["trainable weights"] == on_first_device(run.state.trainable)
    assert found.memory["optimizer"] == on_first_device(run.state.optimizer)
    batch = place_batch(run.batches.batch(0), run.mesh, BATCH)
    assert found.memory["batch"] == on_first_device(batch)
    compiled = jitted_step(asked, run.model, run.optimizer, run.state_sharding, run.steps).lower(run.state, run.frozen, batch).compile()
    used = compiled.memory_analysis()
    rest = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    assert found.memory["activations"] + found.memory["workspace"] == rest
    assert 0 < found.memory["activations"] < rest


def test_an_average_and_the_weights_before_training_are_two_more_copies_of_what_trains(material):
    held = plan(experiment(material, LoRA(rank=3), average="ema", mixout=0.1)).memory
    assert held["average of the weights"] == held["weights before training"] == held["trainable weights"]


def test_no_weight_is_read(material, tmp_path):
    shutil.copytree(material / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    asked = dataclasses.replace(experiment(material, LoRA(rank=3)), model=ModelConfig(source=str(tmp_path / "model")))
    assert plan(asked).memory == plan(experiment(material, LoRA(rank=3))).memory


def test_remat_keeps_fewer_activations_and_computes_more(material):
    whole = plan(experiment(material, LoRA(rank=3)))
    again = plan(experiment(material, LoRA(rank=3), remat="full"))
    assert again.memory["activations"] < 0.5 * whole.memory["activations"]
    assert again.operations > 1.1 * whole.operations


def test_operations_are_counted_by_hand():
    def loss(kernel, x):
        y, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ kernel), None), x, length=5)
        return jax.lax.cond(y[0, 0] > 0, lambda y: y @ kernel, lambda y: y, y).sum()

    kernel, x = jnp.ones((6, 6)), jnp.ones((4, 6))
    one = 2 * 4 * 6 * 6
    assert operations(jax.make_jaxpr(loss)(kernel, x).jaxpr) == 6 * one
    assert operations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(kernel, x).jaxpr) == 3 * 6 * one


def test_what_does_not_fit_is_told_without_a_weight(material):
    with pytest.raises(UserError, match="matches nothing"):
        plan(experiment(material, LoRA(targets=("q_projection",))))


def test_from_the_command_line(material, tmp_path, capsys):
    source = f"--config.model.source={material / 'model'}"
    data = [f"--config.data.train={material / 'rows.jsonl'}", "--config.data.test=", "--config.data.split=0.8,0.1,0.1"]
    plain = [
        "--config.data.system=",
        "--config.data.prompt=",
        "--config.data.completion=",
        "--config.data.max_length=128",
        "--config.train.batch_size=2",
    ]
    workdir = tmp_path / "run"
    launch.main(["launch.py", "--experiment=lora_llama2", "--mode=plan", f"--workdir={workdir}", source, *data, *plain])
    said = capsys.readouterr().out
    for part in ("What trains", "Memory of a step", "GFLOP"):
        assert part in said
    assert not workdir.exists()
