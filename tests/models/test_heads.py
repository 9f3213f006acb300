"""Every family with every head of its against transformers: outputs, states, gradients, padding, packed rows, token types."""

import functools

import jax
import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, load, make_pair, same_bits

from jaxft.hub.names import tensors_of
from jaxft.models import heads

# float32 on both sides, outputs of order 1 to 10: a wrong operation is off by far more, rounding by far less
TOLERANCE = 1e-4

CASES = {
    "bert sequence_classification": {},
    "bert token_classification": {"hidden_act": "gelu_new"},
    "bert question_answering": {},
    "bert masked_lm": {},
    "bert masked_lm untied": {"tie_word_embeddings": False, "hidden_act": "relu"},
    "roberta sequence_classification": {"pad_token_id": 1, "type_vocab_size": 1},
    "roberta masked_lm": {"pad_token_id": 1},
    "roberta masked_lm untied": {"pad_token_id": 0, "tie_word_embeddings": False},
    "xlm-roberta token_classification": {"pad_token_id": 1},
    "camembert question_answering": {"pad_token_id": 3},
    "distilbert sequence_classification": {},
    "distilbert token_classification": {"sinusoidal_pos_embds": True},
    "distilbert question_answering": {},
    "distilbert masked_lm": {"activation": "gelu_new"},
    "distilbert masked_lm untied": {"tie_word_embeddings": False},
    "electra sequence_classification": {},
    "electra token_classification": {"embedding_size": 32},
    "electra question_answering": {"embedding_size": 20},
    "electra masked_lm": {"embedding_size": 20},
    "electra masked_lm untied": {"embedding_size": 20, "tie_word_embeddings": False},
    "gpt2 sequence_classification": {},
    "gpt2 token_classification": {},
    "gpt2 question_answering": {},
    "llama sequence_classification": {},
    "qwen2 token_classification": {},
    "mistral question_answering": {"sliding_window": 5},
    "qwen3 question_answering": {"head_dim": 12},
}
CAUSAL, OFFSET = ("gpt2", "llama", "qwen2", "qwen3", "mistral"), ("roberta", "xlm-roberta", "camembert")
ENCODERS = [case for case in CASES if case.split()[0] not in CAUSAL]
TYPED = [case for case in ENCODERS if case.split()[0] in ("bert", "electra") or case == "roberta masked_lm"]  # have two kinds of tokens


@functools.cache
def pair(case):
    family, task = case.split()[:2]
    return make_pair(family, task, **CASES[case])


@functools.cache
def program(case):
    model = pair(case)[1]
    return jax.jit(lambda params, **batch: model.apply({"params": params}, **batch))


def ragged(side, case):
    """Returns ids and mask (3, 14), texts of 14, 9 and 4 tokens padded on `side`, and token types of an encoder."""
    random = np.random.default_rng(1)
    mask = (np.arange(14) < np.array([14, 9, 4])[:, None]).astype(np.int32)
    batch = {"input_ids": random.integers(4, VOCABULARY, mask.shape).astype(np.int32), "attention_mask": mask}
    batch["input_ids"][mask == 0] = pair(case)[0].config.pad_token_id or 0
    if case in TYPED:
        batch["token_type_ids"] = random.integers(0, 2, mask.shape).astype(np.int32) * mask
    shift = (side == "left") * (14 - mask.sum(axis=1)[:, None])
    return {name: np.take_along_axis(value, (np.arange(14) - shift) % 14, axis=1) for name, value in batch.items()}


def theirs(reference, batch):
    """transformers' output; positions count the real tokens, which a RoBERTa does of its own accord."""
    tensors = {name: torch.tensor(value) for name, value in batch.items()}
    if reference.config.model_type not in OFFSET:
        tensors["position_ids"] = torch.tensor(np.maximum(np.cumsum(batch["attention_mask"], axis=1) - 1, 0))
    return reference(**tensors, output_hidden_states=True)


def outputs(out, mask):
    """Returns what a head gave, at real tokens."""
    if getattr(out, "logits", None) is None:
        return [np.asarray(part)[mask == 1] for part in (out.start_logits, out.end_logits)]
    logits = np.asarray(out.logits)
    return [logits if logits.ndim == 2 else logits[mask == 1]]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_states_are_those_of_transformers(case):
    reference, model, params = pair(case)
    for side in ("right", "left"):
        batch = ragged(side, case)
        ours = program(case)(params, **batch)
        with torch.no_grad():
            expected = theirs(reference, batch)
            if case in ENCODERS and model.task == heads.SEQUENCE_CLASSIFICATION:  # theirs reads the first place, padding or not
                expected.logits = theirs(reference, ragged("right", case)).logits
        mask = batch["attention_mask"]
        for one, other in zip(outputs(ours, mask), outputs(expected, mask), strict=True):
            assert one.shape == other.shape
            assert np.abs(one - other).max() <= TOLERANCE
        assert len(ours.hidden_states) == len(expected.hidden_states)
        for one, other in zip(ours.hidden_states, expected.hidden_states, strict=True):
            assert np.abs(np.asarray(one) - other.numpy())[mask == 1].max() <= TOLERANCE


PACKED = [case for case in CASES if case.startswith("bert ")] + [
    "roberta sequence_classification",
    "distilbert token_classification",
    "electra question_answering",
    "gpt2 sequence_classification",
    "llama sequence_classification",
]


@pytest.mark.parametrize("case", PACKED)
def test_the_head_on_chosen_rows_of_packed_texts_gives_what_each_text_alone_does(case):
    _, model, params = pair(case)
    batch = ragged("right", case)
    lengths = batch["attention_mask"].sum(axis=1)
    packed = {name: value[batch["attention_mask"] == 1][None] for name, value in batch.items() if name != "attention_mask"}
    packed["segment_ids"] = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]
    packed["positions"] = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])[None]
    places = np.cumsum(lengths) - (lengths if model.pooling == heads.FIRST else 1)

    @jax.jit
    def run(params):
        hidden = model.apply({"params": params}, **packed, method="features")[0]
        rows = hidden[places] if model.task == heads.SEQUENCE_CLASSIFICATION else hidden
        return model.apply({"params": params}, rows, method="logits")

    expected = outputs(program(case)(params, **batch), batch["attention_mask"])
    expected = np.stack(expected, axis=-1) if model.task == heads.QUESTION_ANSWERING else expected[0]
    assert np.abs(np.asarray(run(params)) - expected).max() <= TOLERANCE


def loss_of(logits, xp):
    """Some function of a head's outputs with a gradient everywhere."""
    return (xp.sin(logits) * logits).sum()


GRADIENTS = [
    *("bert sequence_classification", "bert masked_lm", "bert question_answering", "roberta sequence_classification"),
    *("distilbert token_classification", "electra question_answering", "gpt2 sequence_classification"),
    *("llama sequence_classification", "qwen3 question_answering"),
]


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_those_of_transformers(case):
    reference, model, params = pair(case)
    batch = ragged("right", case)
    mask = batch["attention_mask"]
    parts = ("start_logits", "end_logits") if model.task == heads.QUESTION_ANSWERING else ("logits",)

    @jax.jit
    def ours(params):
        def loss(params):
            out = model.apply({"params": params}, **batch)
            found = [getattr(out, part) for part in parts]
            return sum(loss_of(x if len(x) != mask.shape[0] or x.shape[1:2] != mask.shape[1:] else x[mask == 1], jax.numpy) for x in found)

        return jax.grad(loss)(params)

    reference.zero_grad()
    out = theirs(reference, batch)
    found = [getattr(out, part) for part in parts]
    sum(loss_of(x[torch.tensor(mask) == 1] if x.shape[1] == mask.shape[1] else x, torch) for x in found).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(np.abs(gradient.numpy()).max() for gradient in expected.values() if gradient is not None)
    for entry in tensors_of(model, ours(params)):
        gradient = entry.leaf.value if entry.index is None else entry.leaf.value[entry.index]
        error = np.abs(entry.swap(np.asarray(gradient)) - expected[entry.name].numpy()).max()
        assert error <= TOLERANCE * max(np.abs(expected[entry.name].numpy()).max(), 1e-2 * largest), entry.name


@pytest.mark.parametrize("case", [case for case in TYPED if "sequence" in case])
def test_token_types_are_0_where_none_are_given(case):
    _, _, params = pair(case)
    batch = ragged("right", case)
    without = {name: value for name, value in batch.items() if name != "token_type_ids"}
    zeros = without | {"token_type_ids": np.zeros_like(batch["input_ids"])}
    assert np.array_equal(program(case)(params, **without).logits, program(case)(params, **zeros).logits)


@pytest.mark.parametrize("case", ["bert sequence_classification", "gpt2 token_classification"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(case, dtype):
    reference, exact, wide = pair(case)
    model, params = load(reference, exact.task, dtype=dtype)
    batch = ragged("right", case)
    half = np.asarray(jax.jit(lambda params: model.apply({"params": params}, **batch).logits)(params), np.float32)
    full = np.asarray(exact.apply({"params": wide}, **batch).logits)
    real = slice(None) if half.ndim == 2 else batch["attention_mask"] == 1
    error = np.abs(half - full)[real]
    # 8 (11) bits of mantissa: 2**-8 a rounding, some tens of them one after the other through three layers
    assert 0 < error.max() <= 0.05 * np.abs(full).max()


def test_no_token_of_an_encoder_depends_on_another_example_and_each_on_all_of_its_own():
    """Each place of the row has a word of its own, so that a row of the embedding is the input of one place."""
    _, model, params = make_pair("bert", "masked_lm", num_hidden_layers=2, tie_word_embeddings=False)
    ids = np.arange(8, dtype=np.int32)[None]
    segments, positions = np.array([[1, 1, 1, 2, 2, 2, 0, 0]], np.int32), np.array([[0, 1, 2, 0, 1, 2, 0, 0]], np.int32)

    def logits(embedding):
        replaced = params | {"embed": {"embedding": embedding}}
        return model.apply({"params": replaced}, ids, segment_ids=segments, positions=positions).logits[0, :, :2].sum(axis=-1)

    jacobian = np.asarray(jax.jit(jax.jacrev(logits))(params["embed"]["embedding"]))[:6, :8]
    assert np.array_equal((jacobian != 0).any(axis=-1), segments[0, :6, None] == segments[0])


@pytest.mark.parametrize("case", [case for case in ENCODERS if "sequence" in case])
def test_a_text_with_a_position_beyond_the_table_is_no_number(case):
    _, model, params = pair(case)
    length = model.config.max_position_embeddings
    ids, mask = np.full((2, length + 1), 2, np.int32), np.ones((2, length + 1), np.int32)
    mask[0, length:] = 0
    logits = np.asarray(program(case)(params, input_ids=ids, attention_mask=mask).logits)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()


RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


@pytest.mark.parametrize("kind", RATES)
def test_dropout_is_drawn_from_its_key_and_off_without_one(kind):
    off = dict.fromkeys(RATES, 0.0)
    _, model, params = make_pair("bert", "sequence_classification", **(off | {kind: 0.5}))
    batch = ragged("right", "bert sequence_classification")

    @jax.jit
    def logits(seed):
        return model.apply({"params": params}, **batch, rngs={"dropout": jax.random.key(seed)}).logits

    assert same_bits(logits(0), logits(0))
    assert np.abs(np.asarray(logits(0) - program("bert sequence_classification")(params, **batch).logits)).max() > 0.01
    assert np.abs(np.asarray(logits(0) - logits(1))).max() > 0.01
