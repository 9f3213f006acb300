"""The job that both sides train: what is in it, and how it is written for the side that isn't jaxft.

Run as a process of its own: `python benchmarks/sft_job.py JOB.json` fills the folder that JOB.json stands in.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Any

import numpy as np

BUNDLED = "bundled:smollm2-135m-instruct"
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # where the experiments are
TINY = "tiny"  # a random model of six small layers, with the bundled model's tokenizer


@dataclasses.dataclass(frozen=True)
class Job:
    """One fine-tuning job. Paths lie in the folder of the job's file."""

    source: str  # of the model, as jaxft.load_pretrained takes it, or TINY
    folder: str  # where prepare puts model/, examples.npz and plan.json, and jaxft's side adapter/
    steps: int
    examples_per_step: int = 8  # on average: rows are packed, and each step takes the same number of rows
    max_length: int = 384  # tokens a row, as in the experiment
    recipe: str = "lora_llama2"  # the experiment whose model, data, method and rate it takes
    seed: int = 0

    def path(self, name: str) -> pathlib.Path:
        """Returns the path of one of the job's files."""
        return pathlib.Path(self.folder) / name

    def write(self, path: pathlib.Path) -> None:
        """Writes the job as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: str | pathlib.Path) -> "Job":
        """Reads what `write` wrote."""
        return cls(**json.loads(pathlib.Path(path).read_text()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which examples each step holds, and their tokens: what TRL needs to take the same steps."""

    tokens: list[np.ndarray]  # of each example, int32
    scored: list[np.ndarray]  # of each example, bool: counted in the loss
    rows: list[list[list[int]]]  # step -> packed row -> examples
    optimizer: dict[str, Any]  # jaxft's OptimizerConfig

    @classmethod
    def read(cls, job: Job) -> "Plan":
        """Reads what `prepare` wrote."""
        with np.load(job.path("examples.npz")) as file:
            cuts = file["offsets"][1:-1]
            return cls(np.split(file["tokens"], cuts), np.split(file["scored"], cuts), **json.loads(job.path("plan.json").read_text()))

    def own_tokens(self, examples: list[int]) -> int:
        """Returns the tokens of these examples, each whole: no padding, and a shared prefix once an example."""
        return sum(len(self.tokens[i]) for i in examples)


def experiment(job: Job) -> Any:
    """Returns the job's recipe with AdamW at a constant rate without decay. Its schedules are those of a whole run."""
    import experiments

    recipe = experiments.load(job.recipe)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, max_length=job.max_length, cache=False),
        train=dataclasses.replace(recipe.train, steps=max(job.steps, recipe.train.steps), seed=job.seed, accumulation=1, neftune_alpha=0.0),
        optimizer=dataclasses.replace(recipe.optimizer, name="adamw", schedule="constant", warmup=0, weight_decay=0.0),
    )


def training_batches(job: Job, source: str) -> Any:
    """Returns the packed batches of the 600 training reviews, sized so that a step holds `examples_per_step` examples on average.

    Args:
      job: the job.
      source: whose tokenizer.
    """
    from jaxft.data.batches import Batches
    from jaxft.data.sources import load_rows
    from jaxft.data.tokenize import tokenize
    from jaxft.hub.tokenizer import load_tokenizer

    config = experiment(job)
    tokenizer = load_tokenizer(source)
    examples = tokenize(load_rows("bundled:drug-reviews:train", "train"), tokenizer, config.data)
    pad = tokenizer.pad_token_id or 0

    def batches(rows: int) -> Batches:
        return Batches(examples, config.data, rows, 1, job.seed, True, pad)

    rows_per_epoch = batches(1).steps_per_epoch
    return batches(max(1, round(job.examples_per_step * rows_per_epoch / len(examples))))


def base_model(job: Job, source: str) -> tuple[Any, Any]:
    """Returns the recipe's model, in float32 or as it is quantized, and its parameters."""
    import jaxft
    from jaxft.train.setup import from_source

    config = experiment(job)
    held = dataclasses.replace(config.model, source=source, dtype="float32", revision="main")
    model, params = jaxft.load_pretrained(**from_source(held, config.task, {}, job.seed))
    return model.clone(remat=config.train.remat), params


def initial_parameters(job: Job, source: str, batches: Any) -> tuple[Any, Any, Any]:
    """Returns the model, its parameters with the method's that both sides start from, and the method."""
    from jaxft.hub.load import OriginalKernels
    from jaxft.hub.tokenizer import load_tokenizer
    from jaxft.methods.base import Material
    from jaxft.train.data import micro_batches
    from jaxft.train.scores import gradient_scores
    from jaxft.train.state import key_for

    config = experiment(job)
    model, params = base_model(job, source)
    method = config.method.tokenized(load_tokenizer(source))

    def scores(params: Any, chosen: Any, kind: str, count: int) -> Any:
        return gradient_scores(model, config.task, itertools.islice(micro_batches(batches), count), params, chosen, kind)

    return model, method.begin(key_for(job.seed, "method"), model, params, Material(scores, OriginalKernels(source))), method


def prepare(job: Job) -> None:
    """Writes the model, the examples, and which examples each step holds."""
    import jaxft
    from jaxft.hub.tokenizer import load_tokenizer

    source = _write_tiny(job) if job.source == TINY else job.source
    model, params = jaxft.load_pretrained(source, dtype="float32")
    jaxft.save_pretrained(job.path("model"), model, params, load_tokenizer(BUNDLED if job.source == TINY else source))
    batches = training_batches(job, str(job.path("model")))
    examples = batches.layout.examples
    np.savez(job.path("examples.npz"), tokens=examples.tokens, scored=examples.scored, offsets=examples.offsets)
    rows = [_rows(batches, step) for step in range(job.steps)]
    job.path("plan.json").write_text(json.dumps({"rows": rows, "optimizer": dataclasses.asdict(experiment(job).optimizer)}))


def _write_tiny(job: Job) -> str:
    """Writes a random model and returns its folder."""
    import torch
    import transformers

    torch.manual_seed(job.seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(job.path("tiny"))
    return str(job.path("tiny"))


def _rows(batches: Any, step: int) -> list[list[int]]:
    """The step's examples, row by row: a row's segments are numbered from 1."""
    segments = batches.batch(step)["segment_ids"][0]
    examples, rows = iter(batches.examples_of(step)), []
    for row in segments:
        rows.append([int(next(examples)) for _ in range(int(row.max()))])
    return rows


if __name__ == "__main__":
    prepare(Job.read(sys.argv[1]))
