"""What is measured: the loss on a set, and generated answers against the true ones."""

import dataclasses
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxft.data.batches import evaluation_batches
from jaxft.data.tokenize import Examples
from jaxft.errors import UserError
from jaxft.generation import Sampling, generate
from jaxft.methods.partition import partition
from jaxft.tasks.answers import AnswerFormat, exact_match, majority_match
from jaxft.tasks.head import Sums
from jaxft.train import placement
from jaxft.train.setup import Setup, end_tokens, pad_token
from jaxft.train.state import State
from jaxft.train.step import make_evaluation


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The figures, and the answers that they were made of."""

    metrics: dict[str, float]
    answers: list[str]


class Evaluator:
    """Measures states of one run; its program is compiled once."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._program = jax.jit(make_evaluation(setup.model, setup.experiment.task))

    def chosen(self, name: str) -> Examples:
        """Returns the set of this name, `eval.limit` examples of it; raises `UserError` where there is none."""
        found = self._setup.examples
        if name not in found:
            raise UserError(f"There is no {name} set. Give config.data.{name}, or a share of the training rows by config.data.split.")
        limit = self._setup.experiment.eval.limit
        return found[name].first(limit) if limit else found[name]

    def loss(self, state: State, examples: Examples) -> dict[str, float]:
        """Returns mean negative log-likelihood (nats a scored token), perplexity and token accuracy."""
        return self._measured(state.trainable, self._setup.frozen, examples)

    def loss_of(self, params: Any, examples: Examples) -> dict[str, float]:
        """Returns what `loss` does, of parameters in another form than the run's."""
        return self._measured(*partition(params, jax.tree.map(lambda _: False, params)), examples)

    def _measured(self, trainable: Any, frozen: Any, examples: Examples) -> dict[str, float]:
        setup = self._setup
        rows = -(-min(setup.experiment.eval.batch_size, len(examples)) // _shares(setup)) * _shares(setup)
        total: Any = Sums(*[0.0] * 4)  # type: ignore[arg-type]  # floats of this host
        for batch in evaluation_batches(examples, setup.experiment.data, rows, True, pad_token(setup.tokenizer)):
            placed = placement.place_batch(batch, setup.mesh, placement.EVALUATION_BATCH)
            sums = jax.device_get(self._program(trainable, frozen, placed))
            total = jax.tree.map(lambda one, other: one + float(other), total, sums)
        loss = total.nll / total.weight
        return {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": total.correct / total.weight}

    def full(self, state: State, name: str, title: str) -> Evaluation:
        """Returns the loss and, where `eval.generate` is on, the exact match of generated answers."""
        examples = self.chosen(name)
        metrics = self.loss(state, examples)
        if not self._setup.experiment.eval.generate:
            return Evaluation(metrics, [])
        answers = self.answers(state, examples, title)
        true = [examples.answer(i) for i in range(len(examples))]
        return Evaluation(metrics | exact_match(answers, true, self.answer_format), answers)

    @property
    def answer_format(self) -> AnswerFormat:
        """The completion's format."""
        return AnswerFormat(self._setup.experiment.data.completion)

    def majority(self, name: str) -> dict[str, float]:
        """Returns the exact match of always answering as most training rows do."""
        training, examples = self._setup.examples["train"], self.chosen(name)
        return majority_match(training.answers, [examples.answer(i) for i in range(len(examples))], self.answer_format)

    def answers(self, state: State, examples: Examples, title: str) -> list[str]:
        """Returns the model's answer to each example's prompt."""
        setup = self._setup
        sampling = make_sampling(setup.experiment.eval, setup.tokenizer, setup.examples["train"])
        prompts = [examples.prompt(i) for i in range(len(examples))]
        with tqdm(total=len(prompts), desc=title, unit="answer", leave=False) as bar:
            made = generate(
                setup.model,
                setup.params(state),
                prompts,
                sampling,
                setup.experiment.train.seed,
                setup.experiment.eval.batch_size,
                bar.update,
            )
        return [text.strip() for text in setup.tokenizer.batch_decode(made, skip_special_tokens=True)]


def make_sampling(config: Any, tokenizer: Any, training: Examples) -> Sampling:
    """Returns how answers are sampled, from the configuration and the tokens that end an answer."""
    return Sampling(
        config.max_new_tokens, config.temperature, config.top_k, config.top_p, end_tokens(tokenizer, training), pad_token(tokenizer)
    )


def _shares(setup: Setup) -> int:
    return setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
