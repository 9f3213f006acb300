"""Batches in which each row has its own LoRA, against each adapter alone and peft's mixed batches."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from evaluation_batches import evaluation_batches
from method_checks import IDS, base
from program_shapes import shapes_of
from tiny_models import VOCABULARY, largest_difference, load, make_examples, make_reference, moved, same_bits

import jaxft
from jaxft.config import DataConfig, TrainConfig
from jaxft.data.batches import lay_out
from jaxft.errors import UserError
from jaxft.generation import Sampling, generate
from jaxft.methods import IA3, LoRA, Prefix
from jaxft.methods.mixed_lora import MixedLoRAKernel, choose_adapters, mix_adapters
from jaxft.methods.partition import mask_by_name
from jaxft.models import segments
from jaxft.models.llama import PLACEMENT
from jaxft.models.node import Shared
from jaxft.tasks import SFT
from jaxft.train import placement

ADAPTERS = {  # of different ranks, targets and layers
    "french": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
    "german": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 5}},
    "law": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
}
ROWS = (2, -1, 0, 1, 0)
TOKENS = np.random.default_rng(3).integers(1, VOCABULARY, (len(ROWS), 11)).astype(np.int32)
LENGTHS = np.array([11, 7, 9, 11, 4])
MASK = (np.arange(11) < LENGTHS[:, None]).astype(np.int32)


@functools.cache
def adapters():
    """The adapters on one base, in a model of peft and loaded here."""
    model, params = base()
    torch.manual_seed(1)
    tuned = None
    for name, settings in ADAPTERS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        if tuned is None:
            tuned = peft.get_peft_model(make_reference("llama"), config, adapter_name=name)
        else:
            tuned.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        return tuned.eval(), [jaxft.load_adapter(f"{folder}/{name}", model, params) for name in ADAPTERS]


@functools.cache
def mixed():
    return mix_adapters(base()[1], adapters()[1])


def alone(number):
    """Returns the parameters of one adapter, or the base's."""
    return base()[1] if number < 0 else adapters()[1][number][0]


@functools.cache
def program():
    model = base()[0]
    return jax.jit(lambda params, ids, mask: model.apply({"params": params}, ids, attention_mask=mask).logits)


def test_each_row_has_the_logits_of_its_adapter_alone():
    found = program()(choose_adapters(mixed(), ROWS), TOKENS, MASK)
    for row, number in enumerate(ROWS):
        expected = program()(alone(number), TOKENS, MASK)[row]
        assert largest_difference(found[row, : LENGTHS[row]], expected[: LENGTHS[row]]) <= 1e-5 * float(jnp.abs(expected).max())
    assert len({np.asarray(program()(alone(number), TOKENS, MASK)).tobytes() for number in (-1, 0, 1, 2)}) == 4


def test_a_mixed_batch_is_that_of_peft():
    tuned, _ = adapters()
    names = ["__base__" if number < 0 else list(ADAPTERS)[number] for number in ROWS]
    with torch.no_grad():
        expected = tuned(torch.tensor(TOKENS), attention_mask=torch.tensor(MASK), adapter_names=names).logits.numpy()
    found = np.asarray(program()(choose_adapters(mixed(), ROWS), TOKENS, MASK))
    assert np.abs(found - expected)[MASK > 0].max() <= 1e-4


def test_two_devices_give_the_same_logits():
    params = choose_adapters(mixed(), ROWS)
    mesh = placement.make_mesh(TrainConfig(batch_size=2, data_parallel=1, fsdp_parallel=1, tensor_parallel=2))
    placed = jax.device_put(params, placement.shardings(params, PLACEMENT, mesh))
    expected = program()(params, TOKENS, MASK)
    assert largest_difference(program()(placed, TOKENS, MASK), expected) <= 1e-5 * float(jnp.abs(expected).max())


def test_until_one_is_chosen_they_act_as_the_base():
    for params in (mixed(), choose_adapters(mixed(), [-1] * len(ROWS))):
        assert largest_difference(program()(params, TOKENS, MASK), program()(alone(-1), TOKENS, MASK)) <= 1e-5


def test_every_choice_is_one_program_and_multiplies_each_base_kernel_once():
    model = base()[0]
    run = jax.jit(lambda params, index: model.apply({"params": choose_adapters(params, index)}, TOKENS).logits)
    plain = run(mixed(), jnp.asarray([-1] * 5))
    assert largest_difference(run(mixed(), jnp.asarray(ROWS)), plain) > 0.1
    assert largest_difference(run(mixed(), jnp.asarray([9, -7, 3, -1, 5])), plain) == 0  # what no adapter has is the base
    assert run._cache_size() == 1
    inputs, outputs = 32, 56  # of up_proj
    shapes = list(shapes_of(jax.make_jaxpr(run)(mixed(), jnp.asarray(ROWS)).jaxpr))
    assert (TOKENS.size, outputs) in shapes
    assert not any(shape[-2:] == (inputs, outputs) and len(shape) > 2 for shape in shapes)  # no kernel is made for each row


def test_a_prompt_is_answered_by_its_adapter():
    random = np.random.default_rng(4)
    prompts = [random.integers(1, VOCABULARY, length).astype(np.int32) for length in (5, 2, 4, 3)]
    numbers, new = (1, 0, -1, 2), 6
    # sorted by length, and a batch that isn't full
    texts = generate(base()[0], mixed(), prompts, Sampling(max_new_tokens=new), batch_size=3, adapters=numbers)
    rows, mask = np.zeros_like(TOKENS), np.zeros_like(MASK)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        whole = np.concatenate([prompt, text])
        rows[row, : len(whole)], mask[row, : len(whole)] = whole, 1
    for row, (prompt, number, text) in enumerate(zip(prompts, numbers, texts, strict=True)):
        words = {n: np.asarray(program()(alone(n), rows, mask))[row, len(prompt) - 1 :][:new].argmax(-1).tolist() for n in range(-1, 3)}
        assert text.tolist() == words.pop(number)
        assert any(text.tolist() != other for other in words.values())


EXAMPLES = make_examples([9, 14, 21, 12], answer=4)
OWNERS = np.array([1, 0, 1, 0])  # the adapter of each
PACKED = DataConfig(max_length=64)  # all of them in one row


def gradients(params, packed, reduce=None):
    """Returns the summed loss of the examples, and its gradients in every lora_a and lora_b."""
    model = base()[0]
    (batch,) = evaluation_batches(EXAMPLES, PACKED if packed else DataConfig(max_length=32, packing=False), 1 if packed else 4, False)
    if reduce is not None:
        params, batch = reduce(params, batch)
    mask = mask_by_name(params, lambda name: name.endswith(("/lora_a", "/lora_b")))
    trainable, frozen = jaxft.partition(params, mask)

    def total(trainable, frozen, batch):
        return SFT().sums(model, jaxft.combine(trainable, frozen), batch, {}).loss

    return jax.jit(jax.value_and_grad(total))(trainable, frozen, dict(batch))


@functools.cache
def expected_gradients(number):
    """The loss and gradients of an adapter alone on the examples that are its own."""

    def only(params, batch):
        return params, batch | {"weights": batch["weights"] * (number == OWNERS)[:, None]}

    return gradients(alone(number), False, only)


def by_name(tree):
    return {
        name: leaf.value if leaf.layers is None else leaf.value[place]
        for leaf in segments.leaves(tree)
        for place, name in enumerate(leaf.names)
    }


@pytest.mark.parametrize("packed", [False, True])
def test_losses_and_gradients_are_the_sums_of_the_adapters_alone(packed):
    def choose(params, batch):
        if not packed:
            return choose_adapters(params, OWNERS), batch
        (row,) = lay_out(EXAMPLES, np.arange(4), PACKED, False, 0).rows
        return choose_adapters(params, np.append(-1, OWNERS[row])[batch["segment_ids"]]), batch  # one a token

    loss, found = gradients(mix_adapters(base()[1], adapters()[1][:2]), packed, choose)
    assert abs(loss - sum(expected_gradients(number)[0] for number in range(2))) <= 1e-5 * loss
    found = by_name(found)
    kernels = {name.rpartition("/")[0] for name in found}
    parts = [by_name(expected_gradients(number)[1]) for number in range(2)]
    for kernel in kernels:
        for side, axis in (("lora_a", 1), ("lora_b", 0)):
            expected = np.concatenate([part[f"{kernel}/{side}"] for part in parts if f"{kernel}/{side}" in part], axis=axis)
            assert np.linalg.norm(expected) > 0
            assert np.linalg.norm(found[f"{kernel}/{side}"] - expected) <= 1e-5 * np.linalg.norm(expected), (kernel, side)


def test_each_row_drops_at_the_rate_of_its_adapter():
    kernel = MixedLoRAKernel(
        jnp.zeros((400, 1), jnp.float32),
        jnp.ones((400, 2), jnp.float32),
        jnp.ones((2, 1), jnp.float32),
        jnp.eye(2, dtype=jnp.float32),
        Shared(jnp.asarray([0, 1, -1])),
        jnp.asarray([0.0, 0.5], jnp.float32),
    )
    whole, half, none = np.asarray(kernel.dot(jnp.ones((3, 400), jnp.float32), jax.random.key(0)))[:, 0]
    assert (whole, none) == (400.0, 0.0)
    assert half != 400.0
    assert abs(half - 400.0) <= 120.0  # six standard deviations of what half of 400 leave, twice


def test_mixing_has_no_side_effect():
    params, (_, loaded) = base()[1], adapters()
    kept = jax.tree.map(np.array, (params, [adapter for adapter, _ in loaded]))
    mix_adapters(params, loaded)
    assert same_bits(kept, (params, [adapter for adapter, _ in loaded]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 3), r"There is no adapter 3: they are numbered 0 to 2, and -1 is the base alone"),
        ((0, -2), "There is no adapter -2"),
        ((0.0, 1.0), r"by whole numbers, \(rows,\)"),
        ((), "by whole numbers"),
    ],
    ids=str,
)
def test_choices_that_there_are_not_are_refused(index, message):
    with pytest.raises(UserError, match=message):
        choose_adapters(mixed(), index)


def test_a_batch_of_another_size_is_refused():
    model, _ = base()
    with pytest.raises(UserError, match=r"chosen for 3 \(rows, or rows x length\), which 26 tokens aren't"):
        model.apply({"params": choose_adapters(mixed(), [0, 1, 2])}, IDS)
    with pytest.raises(UserError, match="2 prompts and 1 adapters"):
        generate(model, mixed(), [IDS[0], IDS[1]], Sampling(), adapters=[0])


def made(method, family="llama"):
    model, params = base(family)
    return moved(method, model, params), method


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda: made(LoRA(rank=2, targets=("q_proj",), dora=True)), "is a DoRA"),
        (lambda: made(LoRA(rank=2, targets=("q_proj",), start="pissa")), "took a part of the base"),
        (lambda: made(IA3()), "holds no LoRA"),
        (lambda: made(LoRA(rank=2, targets=("q_proj",), modules_to_save=("norm",))), r"Adapter 1: .*norm/scale isn't what the base has"),
        (lambda: made(LoRA(rank=2, targets=("q_proj",)) + Prefix(2)), "Adapter 1: prefix/embedding isn't what the base has"),
        (lambda: made(LoRA(rank=2, targets=("q_proj",)), "qwen2"), r"Adapter 1: layers/0/attention/.* isn't what the base has"),
        (lambda: made(LoRA(rank=2, targets=("lm_head",))), "lm_head/kernel is a target"),
    ],
    ids=["dora", "pissa", "other method", "modules_to_save", "sum", "other base", "head"],
)
def test_adapters_that_cannot_stand_side_by_side_are_refused(adapter, message):
    with pytest.raises(UserError, match=message):
        mix_adapters(base()[1], [adapters()[1][0], adapter()])


def test_what_there_is_nothing_of_is_said():
    with pytest.raises(UserError, match="no adapters to mix"):
        mix_adapters(base()[1], [])
    with pytest.raises(UserError, match="make them by mix_adapters"):
        choose_adapters(base()[1], [0])
    with pytest.raises(UserError, match="no one kernel"):
        mixed()["embed"]["embedding"].dense()


def test_a_base_of_the_same_shape_and_other_weights_is_another_base():
    reference = make_reference("llama")
    with torch.no_grad():
        reference.model.layers[2].mlp.up_proj.weight += 1e-3
    _, other = load(reference)
    with pytest.raises(UserError, match="Adapter 0: layers/2/mlp/up_proj/kernel isn't what the base has"):
        mix_adapters(other, adapters()[1])
