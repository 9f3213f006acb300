"""From a configuration to everything a run holds, the cheap checks first."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxft import console
from jaxft.config import EvalConfig, Experiment, ModelConfig, TrainConfig
from jaxft.data import folds
from jaxft.data.batches import Batches, Room
from jaxft.data.examples import Examples, NextTokens, answer_end
from jaxft.data.sources import Rows
from jaxft.data.template import with_template
from jaxft.data.unlabelled import check as check_unlabelled
from jaxft.data.unlabelled import real_tokens, step_batch
from jaxft.errors import UserError, unknown
from jaxft.hub.language_head import LanguageHead
from jaxft.hub.load import OriginalKernels, compute_type, describe_pretrained, load_pretrained, redrawn
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.methods.base import Material, Method
from jaxft.methods.head import with_head
from jaxft.methods.partition import combine, listing, partition, size
from jaxft.models import dropout
from jaxft.models.layers import REMAT
from jaxft.models.node import virtual_tokens
from jaxft.models.registry import family_of
from jaxft.objectives.base import OWN, objective_of
from jaxft.quant.blockwise import Format
from jaxft.tasks.base import Task
from jaxft.train import average as averages
from jaxft.train import loggers, placement
from jaxft.train import optimizer as optimizers
from jaxft.train.checkpoint import Progress
from jaxft.train.data import (
    TrainingData,
    check_split,
    check_tokens,
    load_measured,
    load_rows,
    load_training_data,
    micro_batches,
    room_of,
)
from jaxft.train.fit import fit_method
from jaxft.train.scores import gradient_scores
from jaxft.train.state import State, key_for, new_state


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run's model with its method, and the sets that it is measured on."""

    experiment: Experiment
    mesh: Any  # of `placement.make_mesh`
    model: nn.Module
    tokenizer: Any
    options: dict[str, Any]  # of `load_pretrained`, that the training rows gave: labels
    rows: dict[str, Rows]  # by set: train, validation, test
    examples: dict[str, Examples]  # the same, tokenized
    answer_end: int | None  # the special token that ends the answers trained on, or None where they end with text
    frozen: Any
    room: Room  # before each example, for an encoder's prompt

    def params(self, state: State) -> Any:
        """Returns the whole model, as it is measured and exported."""
        return without_own(combine(state.weights, self.frozen))


@dataclasses.dataclass(frozen=True)
class TrainingSetup(Setup):
    """A run, ready to step."""

    batches: Batches  # of the training set
    steps: int  # of the whole run
    optimizer: optax.GradientTransformation
    state: State  # before the first step
    state_sharding: State
    start: Any  # with mixout, the trainable leaves before the first step; else None
    unlabelled: Batches | None = None  # of rows without labels, where the objective learns from some

    def batch(self, step: int) -> Mapping[str, Any]:
        """Returns a step's batch."""
        return step_batch(self.batches, self.unlabelled, step)

    def real_tokens(self, step: int) -> int:
        """Returns the tokens of a step's examples."""
        return real_tokens(self.batches, self.unlabelled, step)


def check(experiment: Experiment, count: int | None = None) -> Any:
    """Raises `UserError` for values that make no sense, before anything is loaded; returns the mesh, abstract where a `count` is given."""
    train, evaluation = experiment.train, experiment.eval
    folds.check(experiment.data)
    optimizers.check(experiment.optimizer)
    averages.check(train)
    loggers.check(train.loggers)
    compute_type(experiment.model.dtype)
    quantization(experiment.model)
    dropout.check(dropout_rates(experiment.model))
    if train.remat not in REMAT:
        raise unknown("remat policy", train.remat, REMAT)
    for field, offloads in (("train.remat=offload", train.remat == "offload"), ("optimizer.offload", experiment.optimizer.offload)):
        if offloads and count is None:
            placement.check_host_memory(field)
    if train.best_mode not in ("min", "max"):
        raise unknown("train.best_mode", train.best_mode, ("min", "max"))
    if evaluation.split not in ("validation", "test", "train"):
        raise unknown("eval.split", evaluation.split, ("validation", "test", "train"))
    positive = {"train.batch_size": train.batch_size, "train.accumulation": train.accumulation, "train.keep": train.keep}
    positive |= {"train.log_every": train.log_every, "train.checkpoint_every": train.checkpoint_every}
    positive |= {"eval.batch_size": evaluation.batch_size, "eval.max_new_tokens": evaluation.max_new_tokens}
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"{name} is 1 or more, not {value}.")
    natural: dict[str, float] = {"train.steps": train.steps, "train.eval_every": train.eval_every, "train.patience": train.patience}
    natural |= {
        "eval.limit": evaluation.limit,
        "train.neftune_alpha": train.neftune_alpha,
        "train.seed": train.seed,
        "train.r_drop": train.r_drop,
    }
    for name, number in natural.items():
        if number < 0:
            raise UserError(f"{name} is 0 or more, not {number}.")
    if train.seed >= 2**32:
        raise UserError(f"train.seed is below 2^32, not {train.seed}.")
    if train.epochs <= 0:
        raise UserError(f"train.epochs is more than 0, not {train.epochs}.")
    if not 0 < evaluation.top_p <= 1:
        raise UserError(f"eval.top_p is a share above 0 and up to 1, not {evaluation.top_p}.")
    if not 0 <= train.mixout < 1:
        raise UserError(f"train.mixout is a share from 0 up to, not including, 1, not {train.mixout}.")
    for name, number in {"eval.top_k": evaluation.top_k, "eval.temperature": evaluation.temperature}.items():
        if number < 0:
            raise UserError(f"{name} is 0 or more, not {number}.")
    for name in ("top_k", "top_p"):
        if not evaluation.temperature and getattr(evaluation, name) != getattr(EvalConfig, name):
            raise UserError(
                f"eval.{name} has no effect with eval.temperature=0, which takes the likeliest token. Set that, or leave this out."
            )
    if train.patience and not train.eval_every:
        raise UserError("train.patience counts evaluations during training: set train.eval_every too.")
    return placement.make_mesh(train, count)


_BETTER_BELOW = ("loss", "perplexity")  # metrics of which less is better; of all others more is
NONE, FORMATS = "none", ("nf4", "fp4", "int8")  # of model.quantization


@dataclasses.dataclass(frozen=True)
class Described:
    """A run's model with its method as files describe it: all but the weights."""

    experiment: Experiment  # its method trains the task's head too
    mesh: Any  # of `placement.make_mesh`
    model: nn.Module
    options: dict[str, Any]  # of `load_pretrained`, that the training rows gave
    tokenizer: Any
    method: Method  # with the tokens of what it has as text
    shapes: Any  # of the whole model with the method's leaves
    kernels: OriginalKernels  # of the model's files
    language_head: LanguageHead  # the same


def own_tokenizer(experiment: Experiment) -> Any:
    """Returns the model's tokenizer as the task reads with it."""
    found = load_tokenizer(experiment.model.source, experiment.model.revision)
    return experiment.task.fit_tokenizer(with_template(found, experiment.data.template))


def describe_run(
    experiment: Experiment, count: int | None = None, read: Callable[[Experiment], Any] = own_tokenizer
) -> tuple[Described, dict[str, Rows]]:
    """Loads the rows, and of the model its configuration alone; raises `UserError` for what can be found without tokens and weights.

    Args:
      experiment: of the run.
      count: of devices, which needn't be here; None is this machine's.
      read: returns the tokenizer.
    """
    mesh = _check_given(experiment, count)
    rows = load_rows(experiment)
    check_split(experiment.eval.split, rows)
    if "validation" not in rows:
        _check_unvalidated(experiment.train)
    return describe_model(experiment, mesh, experiment.task.model_options(rows["train"], experiment.data), read), rows


def _check_unvalidated(train: TrainConfig) -> None:
    """Raises `UserError` for settings that only a validation set gives a meaning."""
    for name in ("patience", "best_metric"):
        if getattr(train, name) != getattr(TrainConfig, name):
            raise UserError(
                f"train.{name} has no effect without a validation set. Give config.data.validation, or a share of the training rows by "
                "config.data.split, or leave it out."
            )


def _check_given(experiment: Experiment, count: int | None = None) -> Any:
    mesh = check(experiment, count)
    if not experiment.data.train:
        raise UserError("There is nothing to train on: set config.data.train to a hub data set, a file, or bundled:NAME.")
    if not experiment.model.source:
        raise UserError("There is no model: set config.model.source to a hub id, a local folder, a .gguf file, or bundled:NAME.")
    experiment.task.check(experiment.data)
    experiment.task.check_evaluation(experiment.eval)
    if experiment.eval.general and not experiment.task.generates:
        raise UserError(
            f"config.eval.general measures a causal model's loss on plain texts; {type(experiment.task).__name__} has none. Leave it out."
        )
    objective_of(experiment).check(experiment)
    chosen = experiment.objective
    check_unlabelled(experiment.data, experiment.train, type(chosen).__name__ if chosen else "", objective_of(experiment).unlabelled)
    return mesh


def describe_model(
    experiment: Experiment, mesh: Any, options: dict[str, Any], read: Callable[[Experiment], Any] = own_tokenizer
) -> Described:
    """Returns the model with the run's method, from the configuration alone; raises `UserError` where the two don't fit.

    Args:
      experiment: checked.
      mesh: of `check`.
      options: of `load_pretrained`, that the training rows gave.
      read: returns the tokenizer; None for a plan of an experiment that needs none.
    """
    config, task, train = experiment.model, experiment.task, experiment.train
    model, shapes = describe_pretrained(**from_source(config, task, options, train.seed))
    model = dropout.with_dropout(model, dropout_rates(config))
    if train.best_metric not in task.metrics(model):
        raise unknown("train.best_metric", train.best_metric, task.metrics(model))
    if (wanted := "min" if train.best_metric in _BETTER_BELOW else "max") != train.best_mode:
        raise UserError(f"train.best_mode={train.best_mode} would keep the worst {train.best_metric}. Set train.best_mode={wanted}.")
    kernels = OriginalKernels(config.source, config.revision, task.model_task, seed=train.seed, **options)
    method, tokenizer = experiment.method, read(experiment)
    if tokenizer is not None:
        objective, method = objective_of(experiment).fitted(task, model, tokenizer), method.tokenized(tokenizer)
        experiment = dataclasses.replace(experiment, task=task.tokenized(tokenizer), objective=objective)
    method, shapes = fit_method(method, model, shapes, train.seed, kernels)
    experiment = dataclasses.replace(experiment, method=with_head(experiment.method, model, shapes))
    model = model.clone(remat=train.remat)
    words = LanguageHead(config.source, config.revision, config.dtype, train.seed)
    return Described(experiment, mesh, model, options, tokenizer, method, shapes, kernels, words)


def set_up(experiment: Experiment) -> TrainingSetup:
    """Loads data and model, adds the method, places everything, and prints what trains."""
    loggers.check_installed(experiment.train.loggers)
    run, rows = describe_run(experiment)
    data = load_training_data(run.experiment, run.model, run.tokenizer, run.shapes, rows)
    params, mask = begin_params(run, data, read_base(run))
    print_trainable(params, mask)
    return begin_run(run, data, params, mask)


def read_base(run: Described) -> Any:
    """Returns the base's parameters, read from its files; what they lack of the task's head is drawn by the run's seed."""
    placing = functools.partial(placement.shardings, mesh=run.mesh)
    return load_pretrained(**_of_base(run), placing=placing)[1]


def with_head_of(run: Described, base: Any) -> Any:
    """Returns parameters that another run's `read_base` read, with what the files lack drawn by this run's seed."""
    return redrawn(base, **_of_base(run))


def _of_base(run: Described) -> dict[str, Any]:
    experiment = run.experiment
    return from_source(experiment.model, experiment.task, run.options, experiment.train.seed)


def begin_params(run: Described, data: TrainingData, base: Any) -> tuple[Any, Any]:
    """Returns the parameters of a run's start, the method's leaves and the objective's added to the base's, and which of them train."""
    return with_own(run, _begin(run, base, lambda: data.batches), run.language_head.read)


def begin_run(run: Described, data: TrainingData, params: Any, mask: Any) -> TrainingSetup:
    """Returns a run, ready to step, of what `begin_params` returned."""
    training = data.examples["train"]
    end = answer_end(run.tokenizer, training) if isinstance(training, NextTokens) else None
    if run.experiment.objective is not None:
        objective = run.experiment.objective.with_answer_end(run.tokenizer, end)
        run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, objective=objective))
    optimizer = make_optimizer(run, data.steps)
    trainable, frozen, places = _placed(run, params, mask)
    state = begin_state(run, trainable, optimizer, data.slots)
    sharding = shardings_of(run, state, places, optimizer)
    state = jax.device_put(state, sharding)
    return TrainingSetup(
        run.experiment,
        run.mesh,
        run.model,
        run.tokenizer,
        run.options,
        data.rows,
        data.examples,
        end,
        frozen,
        room_of(run.model, run.shapes),
        batches=data.batches,
        steps=data.steps,
        optimizer=optimizer,
        state=state,
        state_sharding=sharding,
        start=jax.tree.map(jnp.copy, state.trainable) if run.experiment.train.mixout else None,  # the first step gives the state's own up
        unlabelled=data.unlabelled,
    )


def set_up_trained(experiment: Experiment, progress: Progress, measured: bool) -> tuple[Setup, Any]:
    """Returns a run to use, not to train, and the trainable leaves before the first step, which its checkpoint replaces.

    Args:
      experiment: the run's configuration.
      progress: of it what the training rows gave: the labels, and what ends an answer; and the test set beside which they were cut.
      measured: whether its `eval.split` is needed. Other sets aren't tokenized, but for a method that chose by training batches.
    """
    trained = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, test=progress.config["data"]["test"]))
    if experiment.eval.split != "test":
        experiment = trained
    run = describe_model(experiment, _check_given(experiment), progress.options)
    rows, examples = load_measured(run.experiment, run.tokenizer, run.model) if measured else ({}, {})
    if examples:
        check_tokens(examples, experiment, run.model, virtual_tokens(run.shapes))
    params = _begin(
        run, read_base(run), lambda: load_training_data(run.experiment, run.model, run.tokenizer, run.shapes, load_rows(trained)).batches
    )
    trainable, frozen, _ = _placed(run, *with_own(run, params, run.language_head.read))
    room = room_of(run.model, run.shapes)
    made = Setup(run.experiment, run.mesh, run.model, run.tokenizer, run.options, rows, examples, progress.answer_end, frozen, room)
    return made, trainable


def _begin(run: Described, base: Any, batches: Callable[[], Batches]) -> Any:
    """The base's parameters with the method's leaves; the batches are made where it asks for gradients."""
    experiment, seed = run.experiment, run.experiment.train.seed

    def scores(params: Any, chosen: Callable[[str], bool], kind: str, count: int) -> Any:
        first = map(objective_of(experiment).plain, itertools.islice(micro_batches(batches()), count))
        return gradient_scores(run.model, experiment.task, first, params, chosen, kind)

    return run.method.begin(key_for(seed, "method"), run.model, base, Material(scores, run.kernels))


def with_own(run: Described, params: Any, language_head: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
    """Returns parameters with the objective's own leaves, and which leaves train.

    Args:
      run: what runs.
      params: with the method's leaves, or their shapes.
      language_head: of `run.language_head`, what reads it or its shapes.
    """
    own, trains = objective_of(run.experiment).leaves(run.model, language_head)
    mask = run.method.mask(params)
    return ({**params, OWN: own}, {**mask, OWN: trains}) if own else (params, mask)


def without_own(params: Any) -> Any:
    """Returns the model's parameters alone."""
    return {name: part for name, part in params.items() if name != OWN}


def _placed(run: Described, params: Any, mask: Any) -> tuple[Any, Any, Any]:
    """The trainable and the frozen leaves on the devices, and the shardings of the former."""
    places = placement.shardings(params, family_of(run.model.config.architecture).module.PLACEMENT, run.mesh)
    trainable, frozen = partition(placement.place(params, places), mask)
    return trainable, frozen, partition(places, mask)[0]


def is_averaged(experiment: Experiment) -> bool:
    """Returns whether a run keeps an average of its weights."""
    return experiment.train.average != averages.NONE


def begin_state(run: Described, trainable: Any, optimizer: optax.GradientTransformation, slots: int) -> State:
    """Returns the state before the first step; `slots` are those of all rows without labels."""
    state, objective = new_state(trainable, optimizer, is_averaged(run.experiment)), objective_of(run.experiment)
    own = objective.with_slots(objective.init(run.experiment.task, run.model, state.trainable), slots)
    return dataclasses.replace(state, objective=own)


def shardings_of(run: Described, state: State, trainable: Any, optimizer: optax.GradientTransformation) -> State:
    """Returns the shardings of a run's state, of those of its trainable leaves."""
    objective = objective_of(run.experiment)
    found: State = placement.state_shardings(state, trainable, run.mesh, optimizer, run.experiment.optimizer.offload, objective)
    return found


def make_optimizer(run: Described, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run of so many steps, with what its method adds."""
    return run.method.optimizer(optimizers.make_optimizer(run.experiment.optimizer, steps), steps)


def from_source(config: ModelConfig, task: Task, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns the arguments of `load_pretrained` and `describe_pretrained`.

    Args:
      config: which model.
      task: what for.
      options: what the task says of its head.
      seed: of a head that is drawn anew.
    """
    return {
        **options,
        "source": config.source,
        "task": task.model_task,
        "seed": seed,
        "dtype": config.dtype,
        "revision": config.revision,
        "quantization": quantization(config),
        "quantized": config.quantized,
    }


def quantization(config: ModelConfig) -> Format | None:
    """Returns the format that kernels are held in, or None; raises `UserError` for one that there isn't."""
    if config.quantization not in (NONE, *FORMATS):
        raise unknown("model.quantization", config.quantization, (NONE, *FORMATS))
    if config.quantization == NONE:
        default = ModelConfig()
        for field in ("double_quantization", "block_size", "quantized"):
            if getattr(config, field) != getattr(default, field):
                raise UserError(f"model.{field} has no effect without model.quantization: set that, or leave this out.")
        return None
    return Format(config.quantization, config.block_size, config.double_quantization)


def dropout_rates(config: ModelConfig) -> dict[str, float]:
    """Returns the rate that is asked of each kind of dropout."""
    return {kind: getattr(config, kind) for kind in dropout.KINDS}


def on_host(params: Any) -> Any:
    """Returns `params` where memory is largest: a merged model is a second copy of the weights, for which a device may have no room."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return params
    return jax.device_put(params, host)


def print_trainable(params: Any, mask: Any) -> None:
    """Prints what trains: path, shape, dtype, count, bytes; and its share of the whole."""
    rows = listing(params, mask)
    total, trains = size(params), sum(row[3] for row in rows)
    console.table(
        "What trains", ("path", "shape", "dtype", "parameters", "bytes"), [(*row[:3], f"{row[3]:,}", f"{row[4]:,}") for row in rows]
    )
    console.say(f"{trains:,} of {total:,} parameters train ({trains / total:.2%}).\n")


def end_tokens(setup: Setup) -> tuple[int, ...]:
    """Returns the tokens that end a text: the tokenizer's, those of the model's files, and the one that ends the answers trained on."""
    hf = json.loads(setup.model.config.hf)
    own = (hf.get("generation_config") or hf).get("eos_token_id")
    found = {setup.tokenizer.eos_token_id, setup.answer_end, *(own if isinstance(own, list) else [own])}
    return tuple(sorted(found - {None}))


def stopping_model(setup: Setup) -> nn.Module:
    """Returns the model, with the tokens that end a text here as those that its files tell transformers."""
    hf, found = json.loads(setup.model.config.hf), list(end_tokens(setup))
    if not setup.experiment.task.generates or not found:
        return setup.model
    (hf.get("generation_config") or hf)["eos_token_id"] = found[0] if len(found) == 1 else found
    model: nn.Module = setup.model.clone(config=dataclasses.replace(setup.model.config, hf=json.dumps(hf)))
    return model
