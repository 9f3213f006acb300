"""What a model is for: its task, the head that reads its hidden states, and what Hugging Face's files call the two."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxft.errors import UserError
from jaxft.models import layers
from jaxft.models.attention import PADDING
from jaxft.models.dropout import dropped
from jaxft.models.layers import Cache, Output

CAUSAL_LM = "causal_lm"
MASKED_LM = "masked_lm"
SEQUENCE_CLASSIFICATION = "sequence_classification"
TOKEN_CLASSIFICATION = "token_classification"
QUESTION_ANSWERING = "question_answering"
TASKS = (CAUSAL_LM, MASKED_LM, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING)
MULTIPLE_CHOICE = "multiple_choice"
ALIASES = {MULTIPLE_CHOICE: CAUSAL_LM}  # tasks whose model is that of another: here choices are told apart by their likelihood
CLASSIFYING = (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION)  # the tasks with labels

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)  # of sequence classification, as transformers names them

FIRST, LAST = "first", "last"  # the token of an example that stands for all of it
SUFFIXES = {
    CAUSAL_LM: "ForCausalLM",
    MASKED_LM: "ForMaskedLM",
    SEQUENCE_CLASSIFICATION: "ForSequenceClassification",
    TOKEN_CLASSIFICATION: "ForTokenClassification",
    QUESTION_ANSWERING: "ForQuestionAnswering",
}
_OUTPUT_LAYERS = ("classifier", "classifier/out_proj", "score", "qa_outputs")  # what the families call the last layer of a head
_SPAN_ENDS = 2  # start and end of an answer


class Architecture(NamedTuple):
    """One class of transformers."""

    model_type: str  # transformers' name of the family
    task: str  # of its head; "" for none, or one that jaxft doesn't have: its files still hold the base
    base: str  # what its tensors' names begin with where they belong to the base: bert; "" for nothing


def architectures(stem: str, model_type: str, base: str, tasks: Iterable[str], others: Iterable[str] = ()) -> dict[str, Architecture]:
    """Returns a family's classes by name: one a task, the base alone, and `others`, whose files hold the base beside another head.

    >>> architectures("Bert", "bert", "bert", ["masked_lm"])["BertForMaskedLM"]
    Architecture(model_type='bert', task='masked_lm', base='bert')
    """
    named = {stem + SUFFIXES[task]: Architecture(model_type, task, base) for task in tasks}
    left = {stem + other: Architecture(model_type, "", base) for other in others}
    return named | {f"{stem}Model": Architecture(model_type, "", "")} | left


def labels_of(hf: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """Returns the names of a config.json's labels by class id; () for a task that has none."""
    if task not in CLASSIFYING:
        return ()
    names = {int(number): str(name) for number, name in (hf.get("id2label") or {}).items()}
    return tuple(names[number] for number in sorted(names))


def common_fields(hf: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Returns the fields that every family's configuration has of the task."""
    return {
        "architecture": hf["architectures"][0],
        "task": architecture.task,
        "labels": labels_of(hf, architecture.task),
        "problem_type": (hf.get("problem_type") or "") if architecture.task == SEQUENCE_CLASSIFICATION else "",
        "hf": json.dumps(dict(hf), sort_keys=True, default=str),
    }


def check_causal(hf: Mapping[str, Any]) -> None:
    """Raises `UserError` for a causal model's class whose tokens see those behind them."""
    if hf.get("is_causal") is False:
        raise UserError(
            f"config.json has is_causal false: tokens of this {hf['architectures'][0]} see what stands behind them, and jaxft's see what "
            "stands before. Pass another model."
        )


def tagger_dropout(hf: Mapping[str, Any]) -> float:
    """Returns the rate before a causal model's head of token classification, 0.1 where config.json says nothing, as in transformers."""
    rates = [hf.get(name) for name in ("classifier_dropout", "hidden_dropout")]
    return next((float(rate) for rate in rates if rate is not None), 0.1)


def outputs_of(task: str, labels: tuple[str, ...]) -> int:
    """Returns how many numbers a head gives for each row it reads, where these aren't a vocabulary's."""
    return _SPAN_ENDS if task == QUESTION_ANSWERING else len(labels)


def is_language_model(model: Any) -> bool:
    """Returns whether a model's head gives words."""
    return model.task in (CAUSAL_LM, MASKED_LM)


def is_causal(model: Any) -> bool:
    """Returns whether a token sees those before it alone; in an encoder it sees all of its example."""
    return bool(model.pooling == LAST)


def is_output(path: str) -> bool:
    """Returns whether a parameter is of the layer that gives a head's outputs.

    >>> is_output("classifier/out_proj/kernel"), is_output("classifier/dense/kernel")
    (True, False)
    """
    return path.rpartition("/")[0] in _OUTPUT_LAYERS


def pooled(hidden: jax.Array, segments: jax.Array, pooling: str) -> jax.Array:
    """Returns the hidden state of the first or the last real token of each row, (batch, features), of hidden (batch, length, features).

    Args:
      hidden: of every token.
      segments: (batch, length) int32, PADDING at padding, which may be on either side.
      pooling: first or last.
    """
    real = segments != PADDING
    place = jnp.argmax(real, axis=1) if pooling == FIRST else real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]


def output(
    model: Any,
    hidden: jax.Array,
    segments: jax.Array,
    states: tuple[jax.Array, ...],
    cache: Cache | None = None,
) -> Output:
    """Returns what a call of a model returns: its head on `hidden`, (batch, length, features), in the shape of transformers' class.

    Args:
      model: has `task`, `pooling` and `logits`.
      hidden: what the head reads.
      segments: as of `pooled`.
      states: the hidden states.
      cache: the new one.
    """
    if model.task == SEQUENCE_CLASSIFICATION:
        return Output(model.logits(pooled(hidden, segments, model.pooling)), states, cache)
    logits = model.logits(hidden)
    if model.task == QUESTION_ANSWERING:
        return Output(None, states, cache, logits[..., 0], logits[..., 1])
    return Output(logits, states, cache)


def on_rows(function: Callable[[jax.Array], jax.Array], hidden: jax.Array) -> jax.Array:
    """Returns `function`, of (rows, features), of hidden (..., features): (..., outputs)."""
    return function(hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:-1], -1)


class DenseHead(nn.Module):
    """dropout, dense, activation, dropout, out_proj: RoBERTa's and ELECTRA's head of sequence classification, on (rows, features)."""

    outputs: int
    activation: Callable[[jax.Array], jax.Array]
    dropout: float
    dtype: Any
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = dropped(x, self.dropout, layers.dropout_rng(self))
        x = self.activation(layers.Linear(x.shape[-1], True, self.dtype, self.kernel_init, name="dense")(x))
        x = dropped(x, self.dropout, layers.dropout_rng(self))
        return layers.Linear(self.outputs, True, self.dtype, self.kernel_init, name="out_proj")(x)


class MaskedLMHead(nn.Module):
    """dense, activation, norm, then the product with the embedding, or with a kernel of its own, and a bias, on (rows, features)."""

    vocabulary: int
    features: int  # of the embedding
    activation: Callable[[jax.Array], jax.Array]
    epsilon: float
    tied: bool
    dtype: Any
    kernel_init: layers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array, attend: Callable[[jax.Array], jax.Array]) -> jax.Array:
        x = self.activation(layers.Linear(self.features, True, self.dtype, self.kernel_init, name="dense")(x))
        x = layers.LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        if not self.tied:
            return layers.Linear(self.vocabulary, True, self.dtype, self.kernel_init, name="decoder")(x)
        bias = layers.parameter(self, "bias", nn.initializers.zeros, (self.vocabulary,), self.dtype)
        return attend(x) + bias.astype(x.dtype)
