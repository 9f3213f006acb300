"""The plan of a run, against the run itself."""

import dataclasses
import json
import re
import shutil

import datasets
import huggingface_hub
import jax
import jax.numpy as jnp
import pytest

import experiments
import launch
from jaxft import overrides
from jaxft.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from jaxft.errors import UserError
from jaxft.hub.load import describe_pretrained
from jaxft.methods import Full, LoRA, Partial, VeRA
from jaxft.methods.partition import size
from jaxft.objectives import SelfSupervised
from jaxft.train import advice, devices, estimate, published, roofline, setup
from jaxft.train.loop import jitted_step
from jaxft.train.placement import BATCH, place_batch
from jaxft.train.plan import Asked, plan
from jaxft.train.programs import operations
from jaxft.train.work import Kernel, Work, work


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


@pytest.mark.parametrize("method", [LoRA(rank=3), Full(), Partial(last=1)], ids=["lora", "full", "partial"])
def test_devices_that_share_weights_gather_one_layer_of_them(material, method):
    rows, run = estimate.prepare(experiment(material, method), 2, False)
    layers = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.shapes["layers"]))
    found, depth = estimate._gathered(run, estimate._arrays(run, rows)), run.model.config.num_hidden_layers
    assert layers <= (found + 1) * depth < 1.5 * layers


def test_of_full_tuning_each_device_makes_its_part_of_gradient_and_update(material):
    def made(devices):
        rows, run = estimate.prepare(experiment(material, Full(), fsdp_parallel=devices, batch_size=4, remat="full"), devices, False)
        found = estimate.estimate(run, rows)
        return found.memory["workspace"] - estimate._gathered(run, estimate._arrays(run, rows)), found.memory["trainable weights"]

    (alone, whole), (shared, own) = made(1), made(4)
    assert own == pytest.approx(whole / 4, rel=0.1)  # what is too small to share is whole
    assert alone > whole
    assert shared < 0.5 * alone


def test_of_a_cross_validation_all_folds_are_told(material, capsys):
    def hours(**data):
        asked = experiment(material, LoRA(rank=3))
        asked = dataclasses.replace(asked, data=dataclasses.replace(asked.data, **data))
        plan(asked, Asked(devices=("h100",), price=1e9))
        said = capsys.readouterr().out
        return float(re.search(r"h100 .* ([\d.,]+) *$", said, re.MULTILINE)[1].replace(",", "")), said

    one, _ = hours(folds=4, fold=0, split=(0.8, 0.0, 0.2))
    every, said = hours(folds=4, split=(0.8, 0.0, 0.2))
    assert every == pytest.approx(4 * one, rel=0.05)
    assert "each of the 4 folds has" in said
    assert "all folds, h" in said


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


def test_without_a_tokenizer_it_says_how_to_do_without_it(material, tmp_path):
    rows = DataConfig(train=str(material / "rows.jsonl"), split=(0.8, 0.1, 0.1), cache=False)
    with pytest.raises(UserError, match=r"has no tokenizer .* --plan.full_rows .* `hf download OWNER/NAME config.json"):
        estimate.prepare(dataclasses.replace(full_rows(tmp_path), data=rows), 8, full_rows=False)


# Parameters by Touvron et al. 2023 (arXiv:2307.09288), table 1, to the last one as transformers counts them.
LLAMA_2 = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without network, whose caches of the hub are empty; returns the cache of models."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.parametrize("name", LLAMA_2)
@pytest.mark.parametrize("kind", ["", "-chat"])
def test_the_published_shapes_are_those_of_llama_2(name, kind, bare, capsys):
    source = f"meta-llama/Llama-2-{name}{kind}-hf"
    with published.with_shapes(ModelConfig(source=source)) as model:
        assert size(describe_pretrained(model.source)[1]) == LLAMA_2[name]
    assert f"The files of {source} aren't here; shapes are those of its published configuration." in capsys.readouterr().out


def from_the_command_line(capsys, *flags):
    launch.main(["launch.py", "--mode=plan", *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["lora_llama2:70b", "qlora_llama2:13b"])
def test_llama_2_is_planned_where_the_hub_is_out_of_reach(name, bare, capsys, monkeypatch):
    monkeypatch.setattr(advice, "changes", lambda *_: [])  # each is another plan
    said = from_the_command_line(capsys, f"--experiment={name}", "--plan.device=h100", "--plan.count=8", "--plan.mesh=fsdp:8")
    assert f"The files of meta-llama/Llama-2-{name.partition(':')[2]}-chat-hf aren't here; shapes are those of its" in said
    assert "The rows of medalpaca/medical_meadow_medical_flashcards:train aren't here; rows are taken as full, 2,048 tokens each." in said
    assert "each of its 32,768 tokens." in said
    assert "a million tokens, h" in said


def test_a_classifier_of_llama_2_is_planned_without_a_tokenizer(bare, capsys, monkeypatch):
    monkeypatch.setattr(advice, "changes", lambda *_: [])
    said = from_the_command_line(capsys, "--experiment=lora_llama2_classifier:7b", "--plan.device=h100", "--config.train.steps=9")
    assert "The files of meta-llama/Llama-2-7b-hf aren't here; rows are taken as full, 256 tokens each." in said
    assert "each of its 1,024 tokens; the run has 9 steps." in said
    assert "the run, h" in said


def test_what_the_cache_has_of_a_model_alone_is_enough(material, bare, capsys):
    folder = bare / "models--owner--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40, encoding="ascii")
    ignored = shutil.ignore_patterns("*token*", "*.jinja", "*.safetensors")
    shutil.copytree(material / "model", folder / "snapshots" / ("0" * 40), ignore=ignored)
    asked = dataclasses.replace(experiment(material, LoRA(rank=3)), model=ModelConfig(source="owner/tiny"))
    found, _ = estimate.prepare(asked, 2, full_rows=False)
    assert found.batch["tokens"].shape == (1, 2, 128)
    assert "The files of owner/tiny aren't here; rows are taken as full, 128 tokens each." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.data.train=gone.jsonl", "There is no file gone.jsonl"),
        ("--config.data.test=gone.jsonl", "There is no file gone.jsonl"),
        ("--config.data.train=bundled:drug-review", "There is no bundled data set 'drug-review'. Did you mean"),
        ("--config.data.test=bundled:drug-review", "There is no bundled data set 'drug-review'. Did you mean"),
        ("--config.model.source=bundled:smollm2", "There is no bundled model 'smollm2'"),
        ("--config.model.source=gone.gguf", "There is no file 'gone.gguf'"),
        ("--config.model.source=meta-llama/Llama-2-7b-chat", "'meta-llama/Llama-2-7b-chat' (revision 'main') isn't"),
        ("--config.method.targets=q_projection", "matches nothing"),
    ],
)
def test_a_mistake_stays_one_where_the_hub_is_out_of_reach(change, message, bare):
    with pytest.raises(UserError, match=re.escape(message)):
        plan(overrides.parse_flags(experiments.load("lora_llama2", "7b"), [change]), Asked(devices=("h100",)))


def test_an_objective_needs_the_rows(bare):
    asked = dataclasses.replace(experiments.load("lora_llama2", "7b"), objective=SelfSupervised())
    asked = dataclasses.replace(asked, data=dataclasses.replace(asked.data, labelled_fraction=0.5))
    with pytest.raises(UserError, match=r"The rows of medalpaca/.* aren't here\. Full rows are for SFT.*; SelfSupervised needs the data"):
        plan(asked, Asked(devices=("h100",)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub."), None),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/aggregated' doesn't exist on the Hub"), "the hub has no such data set"),
        (ValueError("Unknown split 'tran'. Should be one of ['train', 'test']."), "no split 'tran'"),
    ],
)
def test_a_gated_data_set_is_done_without_and_a_wrong_name_is_not(error, message, material, monkeypatch, capsys):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    asked = dataclasses.replace(experiment(material, LoRA(rank=3)), data=DataConfig(train="o/n:tran", max_length=128))
    if message:
        with pytest.raises(UserError, match=message):
            estimate.prepare(asked, 2, full_rows=False)
    else:
        estimate.prepare(asked, 2, full_rows=False)
        assert "The rows of o/n:tran aren't here; rows are taken as full, 128 tokens each." in capsys.readouterr().out


def test_a_run_needs_the_files_that_a_plan_does_without(material, bare):
    with pytest.raises(UserError, match=r"medical_flashcards:train: the hub can't be reached"):
        setup.describe_run(experiments.load("lora_llama2", "7b"))
    asked = dataclasses.replace(experiment(material, LoRA(rank=3)), model=experiments.load("lora_llama2", "7b").model)
    with pytest.raises(UserError, match=r"'meta-llama/Llama-2-7b-chat-hf' .* isn't, or isn't wholly, in the hub's cache"):
        setup.describe_run(asked)


def test_a_product_is_as_long_as_its_operations_or_its_bytes_take():
    device = devices.Device("tried", "gpu", 10**9, {"float32": 1e9}, 1e8, 1e7, 0.0)
    a, b = jax.ShapeDtypeStruct((100, 1000), "float32"), jax.ShapeDtypeStruct((1000, 10), "float32")
    few = work(lambda a, b: a @ b, a, b)
    moved = 4 * (100 * 1000 + 1000 * 10 + 100 * 10)
    assert few.bytes == moved
    assert roofline.pace(few, device).seconds == pytest.approx(max(2e6 / 1e9, moved / 1e8))
    assert roofline.pace(few, device, sent=10**6).seconds == pytest.approx(0.1)


def test_an_earlier_runs_rate_is_used_where_its_steps_are_the_same(tmp_path):
    given = experiments.load("lora_llama2")
    asked = overrides.parse_flags(given, ["--config.model.dtype=bfloat16"])  # as a plan for accelerators says it
    device = {"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu", "count": 1, "cpus": 8}
    (tmp_path / "config.json").write_text(json.dumps({"config": overrides.to_dict(given), "device": device}), encoding="utf-8")
    lines = [json.dumps({"step": step, "tokens_per_second": rate}) + "\n" for step, rate in enumerate((1.0, 90.0, 100.0, 110.0), start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    assert roofline.measured(tmp_path, asked) == roofline.Measured(100.0, 3, "NVIDIA H100 80GB HBM3", "gpu", 1)
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.train.steps=9"])) is not None
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.train.remat=full"])) is None
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.optimizer.offload"])) is None
    assert roofline.measured(tmp_path / "none", asked) is None
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.model.dtype=float32"])) is None
    (tmp_path / "config.json").write_text(json.dumps({"config": overrides.to_dict(given), "device": device | {"count": 8}}))
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.train.data_parallel=8"]), count=8) is not None
    assert roofline.measured(tmp_path, overrides.parse_flags(asked, ["--config.train.fsdp_parallel=8"]), count=8) is None


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
        found = advice.ranked(advice.lighter(asked, options, of, whole), device)
    assert [one.change.flags[0] for one in found] == ["again", "rank", "fewer"]


def sized(memory):
    """A plan of so many bytes."""
    kernels = {Kernel(100, "float32", 100): 1}
    return estimate.Plan(1, 1, {"all": memory}, {}, Work(kernels, 0), 1, 1, {"data": 1, "fsdp": 1, "tensor": 1})


def of_memory(name, memory):
    return devices.Device(name, "tpu", memory, {"float32": 1.0}, 1.0, 1.0, 0.0)


CHANGES = (
    advice.Planned(advice.Change(("--config.train.batch_size=1", "--config.train.accumulation=8"), True), sized(600)),
    advice.Planned(advice.Change(("--config.method.rank=4",), False), sized(300)),
)
GIVEN = ("--config.train.batch_size=4", "--config.train.seed", "1", "--config.train.accumulation", "2", "--config.method.rank=8")
COMMAND = ("launch.py", *GIVEN)


def test_each_device_that_it_does_not_fit_on_has_its_own_list(capsys):
    targets = [of_memory(name, memory) for name, memory in (("large", 5000), ("middle", 700), ("small", 400), ("other", 450))]
    advice.say(CHANGES, sized(1000), targets, COMMAND)
    titles, lists = [], {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("What "):
            titles.append(line)
        elif line[:1].isdigit():
            lists.setdefault(titles[-1], []).append(line.split(", ")[1])
    assert titles == [
        "What makes it fit, or come nearer, on middle (* changes what is learned):",
        "What makes it fit, or come nearer, on small and other (* changes what is learned):",
    ]
    assert list(lists.values()) == [["fits", "fits"], ["fits", "doesn't fit"]]


def test_where_all_fit_what_needs_less_is_told_once_with_its_device(capsys):
    advice.say(CHANGES, sized(1000), [of_memory("first", 5000), of_memory("second", 3000)], COMMAND)
    said = capsys.readouterr().out
    assert said.count("What ") == said.count("What needs less memory on first (* changes what is learned):") == 1
    advice.say((), sized(1000), [of_memory("first", 500), of_memory("second", 300)], COMMAND)
    assert capsys.readouterr().out == "Nothing that jaxft knows makes it fit on first and second.\n\n"


def test_a_changes_flag_is_in_the_place_of_the_given_one(capsys):
    advice.say(CHANGES, sized(1000), [of_memory("first", 5000)], COMMAND)
    commands = [line.strip() for line in capsys.readouterr().out.splitlines() if "launch.py" in line]
    assert commands == [
        "launch.py --config.train.seed 1 --config.method.rank=8 --config.train.batch_size=1 --config.train.accumulation=8",
        "launch.py --config.train.batch_size=4 --config.train.seed 1 --config.train.accumulation 2 --config.method.rank=4",
    ]
    other = advice.Planned(advice.Change(("--config.method=LoRA(rank=8)",), False), sized(300))
    advice.say([other], sized(1000), [of_memory("first", 5000)], COMMAND)
    assert "--config.method.rank" not in capsys.readouterr().out


def test_a_setting_that_it_needs_to_fit_stands_below_the_table(material, capsys, monkeypatch):
    asked = experiment(material, LoRA(rank=3), batch_size=1, fsdp_parallel=1)
    monkeypatch.setattr(advice, "changes", lambda *_: [])
    needed = plan(asked, Asked(devices=("h100",))).memory_bytes
    assert devices.MEMORY_FRACTION not in capsys.readouterr().out
    monkeypatch.setitem(devices.DEVICES, "h100", dataclasses.replace(devices.named("h100"), memory=int(needed / 0.9)))
    plan(asked, Asked(devices=("h100",)))
    said = capsys.readouterr().out.splitlines()
    assert re.search(r" h100 +yes\* +90% ", "\n".join(said))
    assert f"* with {devices.MEMORY_FRACTION}" in said


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
