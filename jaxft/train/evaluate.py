"""What is measured: the loss on a set, and generated answers against the true ones."""

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxft import console
from jaxft.data.batches import Layout, each_once, lay_out
from jaxft.data.conversations import are_texts
from jaxft.data.examples import Examples, NextTokens
from jaxft.data.template import chat_template
from jaxft.errors import UserError
from jaxft.generation import Sampling, generate
from jaxft.methods.partition import partition
from jaxft.models.heads import LAST
from jaxft.tasks.answers import AnswerFormat, equal_answers, majority_match, overlap
from jaxft.train import host_memory, placement
from jaxft.train.data import GENERAL, check_split, pad_token
from jaxft.train.gap import sample
from jaxft.train.setup import Setup, end_tokens
from jaxft.train.state import State
from jaxft.train.step import make_evaluation


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The figures, and what they were made of."""

    metrics: dict[str, float]
    answers: list[str] = dataclasses.field(default_factory=list)  # generated ones
    outputs: np.ndarray | None = None  # of the head, for each slot of the examples, where the task's metrics need them


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of a batch."""

    rows: int
    length: int  # tokens a row
    slots: int  # scored positions a row


class Evaluator:
    """Measures states of one run; its program is compiled once for validation and for the training rows that are compared with it."""

    def __init__(self, setup: Setup, like: "Evaluator | None" = None):
        """Measures the run of `setup`, with the program, and in batches of the shape, of another one whose model is the same."""
        self._setup, self._like = setup, like
        self._program: Any = (
            like._program if like else jax.jit(placement.on_mesh(make_evaluation(setup.model, setup.experiment.task), setup.mesh))
        )

    def chosen(self, name: str) -> Examples:
        """Returns the set of this name, of `eval.limit` of its rows; raises `UserError` where there is none."""
        found = self._setup.examples
        check_split(name, found)
        limit = self._setup.experiment.eval.limit
        return found[name].first(limit) if limit else found[name]

    def measure(self, state: State, examples: Examples) -> Evaluation:
        """Returns the task's metrics."""
        return self._measured(state.weights, self._setup.frozen, examples)

    def measure_params(self, params: Any, examples: Examples) -> Evaluation:
        """Returns what `measure` does, of parameters in another form than the run's."""
        return self._measured(*partition(params, jax.tree.map(lambda _: False, params)), examples)

    def loss(self, state: State, examples: Examples, chosen: np.ndarray) -> float:
        """Returns the mean loss on some of the examples, by their numbers."""
        with host_memory.kept() as memory:
            batches = self._batches(state.weights, self._setup.frozen, self._lay_out(examples, chosen), memory)
            sums = [sums for _, sums, _ in batches]
        return sum(found.nll for found in sums) / sum(found.weight for found in sums)

    @functools.cached_property
    def gap_sample(self) -> np.ndarray:
        """The numbers of the training examples, of as many rows as validation has, whose loss is compared with validation's."""
        training, validation = (self._setup.examples[name] for name in ("train", "validation"))
        return sample(training.rows, len(np.unique(validation.rows)), self._setup.experiment.train.seed)

    @functools.cached_property
    def _least(self) -> Shape:
        """The shape that validation, and the training rows that are compared with it, both fit in: a program is made for a shape."""
        found, gap = self._setup.examples, self._setup.experiment.eval.gap
        layouts = [self._own_layout(found["validation"], np.arange(len(found["validation"])))] if "validation" in found else []
        if layouts and "train" in found and gap:
            layouts.append(self._own_layout(found["train"], self.gap_sample))
        shapes = [Shape(1, 0, 0), *map(self._shape, layouts), *([self._like._least] if self._like else [])]
        return Shape(*map(max, zip(*map(dataclasses.astuple, shapes), strict=True)))

    def _shape(self, layout: Layout) -> Shape:
        batches = -(-len(layout.rows) // self._setup.experiment.eval.batch_size)
        return Shape(-(-len(layout.rows) // batches), layout.length, layout.slots)  # 20 rows are 2 batches of 10, not 16 and 4 that fill 16

    def _measured(self, trainable: Any, frozen: Any, examples: Examples) -> Evaluation:
        layout = self._lay_out(examples, np.arange(len(examples)))
        total, found = None, None
        with host_memory.kept() as memory:
            for rows, sums, outputs in self._batches(trainable, frozen, layout, memory):
                total = sums if total is None else jax.tree.map(operator.add, total, sums)
                if outputs is None:
                    continue
                if found is None:
                    found = np.zeros((len(layout.examples.slots.reads), *outputs.shape[2:]), outputs.dtype)
                for b, row in enumerate(rows):
                    slots = layout.slots_of(row)
                    found[slots] = outputs[b, : len(slots)]
        return Evaluation(self._setup.experiment.task.scores(self._setup.model, examples, total, found), outputs=found)

    def _lay_out(self, examples: Examples, chosen: np.ndarray) -> Layout:
        own = self._own_layout(examples, chosen)
        return dataclasses.replace(own, length=max(own.length, self._least.length), slots=max(own.slots, self._least.slots))

    def _own_layout(self, examples: Examples, chosen: np.ndarray) -> Layout:
        setup = self._setup
        examples = setup.experiment.task.for_evaluation(setup.model, examples, chosen)
        return lay_out(examples, chosen, setup.experiment.data, setup.model.pooling == LAST, pad_token(setup.tokenizer), setup.room)

    def _batches(self, trainable: Any, frozen: Any, layout: Layout, memory: host_memory.Kept) -> Iterator[tuple[range, Any, Any]]:
        """Yields the numbers of some rows, their sums as floats, and their outputs."""
        setup = self._setup
        size = -(-max(self._shape(layout).rows, self._least.rows) // _shares(setup)) * _shares(setup)
        for rows, batch in each_once(layout, size):
            placed = placement.place_batch(batch, setup.mesh, placement.EVALUATION_BATCH)
            sums, outputs = jax.device_get(self._program(trainable, frozen, placed))
            memory.settle()
            yield rows, jax.tree.map(float, sums), outputs

    def full(self, state: State, name: str, title: str) -> Evaluation:
        """Returns the metrics, with `eval.general` the loss on those texts, and, where the task generates and `eval.generate` is on, the
        metrics of generated answers.
        """
        examples = self.chosen(name)
        measured = self.measure(state, examples)
        if general := self._setup.examples.get(GENERAL):
            found = {f"{GENERAL}_loss": self.measure(state, general).metrics["loss"]}
            measured = dataclasses.replace(measured, metrics=measured.metrics | found)
        if not self.generates:
            return measured
        assert isinstance(examples, NextTokens)
        answers = self.answers(state, examples, title)
        true = [examples.answer(i) for i in range(len(examples))]
        return Evaluation(measured.metrics | equal_answers(answers, true, self.answer_format) | overlap(answers, true), answers)

    @property
    def generates(self) -> bool:
        """Whether answers are generated and compared with the true ones: plain texts have none."""
        experiment = self._setup.experiment
        rows = self._setup.rows[experiment.eval.split]
        texts = not experiment.data.prompt and are_texts(rows.dataset.column_names)
        return experiment.task.generates and experiment.eval.generate and not texts

    def warn(self, name: str) -> None:
        """Says where a set has answers that no generated one can equal."""
        examples, most = self.chosen(name), self._setup.experiment.eval.max_new_tokens
        if not self.generates:
            return
        assert isinstance(examples, NextTokens)
        counts = map(len, self._setup.tokenizer(list(examples.answers), add_special_tokens=False)["input_ids"])
        if long := [count for count in counts if count > most]:
            console.say(
                f"Warning: {len(long)} of {len(examples)} answers of {name} have more than {most} tokens, up to {max(long)}; generated "
                "ones end there, and their figures suffer. Raise config.eval.max_new_tokens.\n"
            )

    @property
    def answer_format(self) -> AnswerFormat:
        """The completion's format."""
        return AnswerFormat(self._setup.experiment.data.completion)

    def majority(self, name: str) -> dict[str, float]:
        """Returns the metrics of what answers as most training rows do."""
        training, examples = self._setup.examples["train"], self.chosen(name)
        if not self.generates:
            return self._setup.experiment.task.majority(self._setup.model, training, examples)
        assert isinstance(training, NextTokens)
        assert isinstance(examples, NextTokens)
        return majority_match(training.answers, [examples.answer(i) for i in range(len(examples))], self.answer_format)

    def word_baseline(self, name: str) -> dict[str, dict[str, float]]:
        """Returns the metrics of the task's simple model of words, by its name; {} where the task has none."""
        setup, examples = self._setup, self.chosen(name)
        rows = setup.rows[name].select(range(len(set(examples.rows.tolist()))))
        training = (setup.rows["train"], setup.examples["train"])
        data, seed = setup.experiment.data, setup.experiment.train.seed
        return setup.experiment.task.word_baseline(setup.model, data, seed, training, (rows, examples))

    def answers(self, state: State, examples: NextTokens, title: str) -> list[str]:
        """Returns the model's answer to each example's prompt."""
        setup = self._setup
        sampling = make_sampling(setup)
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
        return answer_texts(setup, made)


def answer_texts(setup: Setup, made: Sequence[Any]) -> list[str]:
    """Returns generated tokens as text, without what the chat template itself writes before every answer, as Qwen3's empty thought."""
    tokenizer = setup.tokenizer
    texts = [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)]
    template = chat_template(tokenizer, setup.experiment.data.template)
    if template is None:
        return texts
    try:
        lead = template.lead([{"role": "user", "content": "?"}], "A question")
    except UserError:  # a template that wants more than a question: what it writes before an answer isn't known
        return texts
    tokens = tokenizer.encode(lead, add_special_tokens=False)
    lead = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return [text.removeprefix(lead).strip() for text in texts]


def make_sampling(setup: Setup) -> Sampling:
    """Returns how answers are sampled, from the configuration and the tokens that end an answer."""
    config = setup.experiment.eval
    return Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p, end_tokens(setup), pad_token(setup.tokenizer))


def _shares(setup: Setup) -> int:
    return setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
