"""The plan of a run, against the run itself."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

import experiments
import launch
from jaxft import overrides
from jaxft.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from jaxft.errors import UserError
from jaxft.methods import LoRA, VeRA
from jaxft.train import advice, devices, estimate, roofline, setup
from jaxft.train.loop import jitted_step
from jaxft.train.placement import BATCH, place_batch
from jaxft.train.plan import Asked, plan
from jaxft.train.programs import operations
from jaxft.train.work import Work, work


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


def planned(asked):
    """Returns a plan of this machine's step, without what `plan` says of time, cost and other settings."""
    material, run = estimate.prepare(asked, None, False)
    return estimate.of_step(run, material)


def on_first_device(tree):
    """Bytes that the first device holds of these arrays, each one counted once."""
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(next(iter(array.addressable_shards)).data.nbytes for array in arrays)


@pytest.mark.parametrize("method", [LoRA(rank=3), VeRA(rank=5)], ids=["lora", "vera"])
def test_it_is_the_memory_of_the_run_itself(material, method):
    asked = experiment(material, method)
    found = planned(asked)
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
    held = planned(experiment(material, LoRA(rank=3), average="ema", mixout=0.1)).memory
    assert held["average of the weights"] == held["weights before training"] == held["trainable weights"]


def test_no_weight_is_read(material, tmp_path):
    shutil.copytree(material / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    asked = dataclasses.replace(experiment(material, LoRA(rank=3)), model=ModelConfig(source=str(tmp_path / "model")))
    assert planned(asked).memory == planned(experiment(material, LoRA(rank=3))).memory


def test_remat_keeps_fewer_activations_and_computes_more(material):
    whole, again = (planned(experiment(material, LoRA(rank=3), remat=remat)) for remat in ("none", "full"))
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
        planned(experiment(material, LoRA(targets=("q_projection",))))


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
    asked = ["--plan.device=h100,v5e", "--plan.count=2", "--plan.price=2.5", "--config.train.remat=dots"]
    launch.main(["launch.py", "--experiment=lora_llama2", "--mode=plan", f"--workdir={workdir}", source, *data, *plain, *asked])
    said = capsys.readouterr().out
    for part in ("What trains", "Memory of a step on each of 2 devices", "GFLOP", "2 x h100", "2 x v5e", "US dollars"):
        assert part in said
    assert f"python launch.py --experiment=lora_llama2 {source} " in said
    assert "--config.train.remat=full" in said
    assert not workdir.exists()


def test_what_helps_needs_less_than_the_plan_says(material, monkeypatch):
    said = []
    monkeypatch.setattr(advice, "say", lambda found, before, *_: said.append((found, before)))
    whole = plan(experiment(material, LoRA()))
    ((found, before),) = said
    assert before.memory_bytes == whole.memory_bytes
    assert found
    assert all(one.plan.memory_bytes < whole.memory_bytes for one in found)


def test_what_a_step_makes_is_told_from_the_program_as_the_compiler_tells_it(material):
    """Within a tenth of XLA's memory for methods that train little; full tuning's update is one more copy of the gradient there."""
    asked = experiment(material, LoRA(rank=3), data_parallel=1, fsdp_parallel=1, tensor_parallel=2, batch_size=8)
    shared, run = estimate.prepare(asked, None, False)
    compiled, told = estimate.of_step(run, shared), estimate.estimate(run, shared)
    assert told.memory["activations"] == compiled.memory["activations"]
    assert told.memory["frozen weights"] == compiled.memory["frozen weights"]
    assert told.operations == compiled.operations
    assert told.process == 0 < compiled.process


def full_rows(tmp_path, **train):
    """A plan of Llama-2-70B's shapes: nothing but its config.json."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    asked = experiments.load("lora_llama2", "70b")
    return dataclasses.replace(
        asked, model=dataclasses.replace(asked.model, source=str(tmp_path)), train=dataclasses.replace(asked.train, **train)
    )


def test_llama_2_70b_is_planned_from_its_configuration_alone(tmp_path):
    material, run = estimate.prepare(full_rows(tmp_path), 8, full_rows=True)
    found = estimate.estimate(run, material)
    weights = 2 * (found.total_parameters - found.trainable_parameters)
    assert found.total_parameters - found.trainable_parameters == 68_976_648_192 + 80 * 7  # and the scale of each kernel's LoRA
    assert weights / 8 <= found.memory["frozen weights"] < 1.01 * weights / 8  # norms are whole everywhere
    assert found.tokens == 16 * 2048
    assert 6 * 0.9 < found.operations / found.tokens / 68_976_648_192 < 6 * 1.1  # forward, again, and the inputs' gradients: 2 each
    layers = 80 * 2 * (8 // 2) * 2048 * 8192  # each layer's input, in bfloat16, of a device's rows
    assert found.memory["activations"] == pytest.approx(layers, rel=0.1)


def test_without_rows_it_says_how_to_do_without_them(tmp_path):
    with pytest.raises(UserError, match=r"--plan.full_rows .* `hf download OWNER/NAME config.json"):
        estimate.prepare(dataclasses.replace(full_rows(tmp_path), data=DataConfig(train="nobody/nothing:train")), 8, full_rows=False)


def test_a_product_is_as_long_as_its_operations_or_its_bytes_take():
    device = devices.Device("tried", "gpu", 10**9, {"float32": 1e9}, 1e8, 1e7, 0.0)
    a, b = jax.ShapeDtypeStruct((100, 1000), "float32"), jax.ShapeDtypeStruct((1000, 10), "float32")
    few = work(lambda a, b: a @ b, a, b)
    moved = 4 * (100 * 1000 + 1000 * 10 + 100 * 10)
    assert few.bytes == moved
    assert roofline.pace(few, device).seconds == pytest.approx(max(2e6 / 1e9, moved / 1e8))
    assert roofline.pace(few, device, sent=10**6).seconds == pytest.approx(0.1)


def test_an_earlier_runs_rate_is_used_where_its_steps_are_the_same(tmp_path):
    asked = experiments.load("lora_llama2")
    device = {"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu", "count": 1, "cpus": 8}
    (tmp_path / "config.json").write_text(json.dumps({"config": overrides.to_dict(asked), "device": device}), encoding="utf-8")
    lines = [json.dumps({"step": step, "tokens_per_second": rate}) + "\n" for step, rate in enumerate((1.0, 90.0, 100.0, 110.0), start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    assert roofline.measured(tmp_path, asked) == roofline.Measured(100.0, 3, "NVIDIA H100 80GB HBM3", "gpu", 1)
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.train.steps=9"])) is not None
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.train.remat=full"])) is None
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.optimizer.offload"])) is None
    assert roofline.measured(tmp_path / "none", asked) is None


def test_what_fits_comes_first_then_what_computes_the_same():
    device = devices.Device("tried", "gpu", 1000, {"float32": 1.0}, 1.0, 1.0, 0.0)

    def of(change):
        memory = {("rank",): 500, ("again",): 600, ("fewer",): 990, ("refused",): 0}[change]
        if not memory:
            raise UserError("no")
        return estimate.Plan(1, 1, {"all": memory}, {}, Work({}, 0), 1, 1, {"data": 1, "fsdp": 1, "tensor": 1})

    asked = experiments.load("lora_llama2")
    options = [advice.Change((name,), same) for name, same in (("rank", False), ("again", True), ("fewer", True), ("refused", True))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advice.overrides, "parse_flags", lambda _, flags: flags)
        whole = estimate.Plan(1, 1, {"all": 2000}, {}, Work({}, 0), 1, 1, {"data": 1, "fsdp": 1, "tensor": 1})
        found = advice.ranked(asked, options, of, whole, device)
    assert [one.change.flags[0] for one in found] == ["again", "rank", "fewer"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(devices=("h10",)), "There is no device 'h10'. Did you mean 'h100'"),
        (Asked(mesh="rows:2"), "There is no axis of the mesh 'rows'"),
        (Asked(mesh="data:none"), "--plan.mesh: data has 1 device or more, not 'none'"),
        (Asked(mesh="fsdp:8,fsdp:4"), "--plan.mesh gives fsdp twice"),
        (Asked(price=-3.0), "--plan.price is US dollars an hour, 0 or more, not -3"),
        (Asked(price=float("nan")), "0 or more, not nan"),
        (Asked(count=-1), "--plan.count is 1 device or more, not -1"),
        (Asked(devices=("h100",), count=3), "8 rows, which 3 devices"),
    ],
)
def test_devices_that_there_are_not_are_told(asked, message):
    with pytest.raises(UserError, match=message):
        plan(experiments.load("qlora_llama2", "7b"), asked)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A10G", None),
        ("TPU v5", "v5p"),
        ("TPU v5 lite", "v5e"),
    ],
)
def test_a_device_is_told_by_its_whole_name(kind, name):
    found = devices.kind_of(kind)
    assert (found and found.name) == name
