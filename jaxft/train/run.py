"""The modes of launch.py: train, evaluate, generate, export, inspect."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxft import console, overrides
from jaxft.config import Experiment
from jaxft.data import folds
from jaxft.data.conversations import question
from jaxft.data.tokenize import prompt_tokens
from jaxft.data.unlabelled import UNLABELLED
from jaxft.errors import UserError, expanded, unknown
from jaxft.generation import generate as generate_tokens
from jaxft.hub import bitsandbytes_config
from jaxft.hub.folder import check_replaceable
from jaxft.hub.peft import adapter_format, has_form, save_adapter
from jaxft.hub.save import BITSANDBYTES, HF, save_pretrained
from jaxft.hub.tokenizer import load_tokenizer
from jaxft.inspect import report
from jaxft.inspect.look import Look, look
from jaxft.inspect.page import page
from jaxft.methods.base import Compose, Method
from jaxft.methods.partition import size
from jaxft.tasks.base import Report
from jaxft.train import host_memory, requantize
from jaxft.train.checkpoint import Checkpoints, Progress, fingerprint
from jaxft.train.data import GENERAL
from jaxft.train.evaluate import Evaluation, Evaluator, answer_texts, make_sampling
from jaxft.train.fit import can_merge
from jaxft.train.folds import fold_folder, is_cross_validation, one_fold, print_folds, together
from jaxft.train.logs import peak_memory_bytes
from jaxft.train.loop import Loop, Outcome
from jaxft.train.observed import Observed
from jaxft.train.report import adapter_command, card, model_command, print_answers, print_comparison, print_report
from jaxft.train.setup import Setup, TrainingSetup, is_averaged, on_host, set_up, set_up_trained, stopping_model
from jaxft.train.state import State
from jaxft.train.workdir import (
    CONFIG,
    INSPECTION,
    INSPECTION_PAGE,
    SUMMARY,
    check_folder,
    check_workdir,
    summary_of,
    write_config,
    write_json,
    write_text,
)

WHOLE = (HF, BITSANDBYTES)  # formats of a merged model
FORMATS = ("peft", "adapterhub", *WHOLE)


def train(experiment: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains, or goes on from the newest checkpoint in `workdir`; evaluates before and after; exports; returns the summary.

    A run that a signal stopped returns an empty summary; the same call goes on with it. Folds are a run each, in a folder of its own.
    """
    folds.check(experiment.data)
    return _train_folds(experiment, workdir) if is_cross_validation(experiment) else _train_one(experiment, workdir)


def _train_folds(experiment: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains the folds that aren't finished; returns the summary of all, or an empty one where a signal stopped it."""
    resolved, runs = overrides.to_dict(experiment), [one_fold(experiment, fold) for fold in range(experiment.data.folds)]
    check_workdir(workdir, resolved)
    write_config(workdir, resolved)
    summaries = []
    for fold, own in enumerate(runs):
        folder = fold_folder(workdir, fold)
        check_workdir(folder, overrides.to_dict(own))
        console.say(f"Fold {fold} of {experiment.data.folds}, in {folder}{', is finished' if summary_of(folder) else ''}.\n")
        if not (summary := summary_of(folder) or _train_one(own, folder)):
            return {}
        summaries.append(summary)
    found = together(summaries)
    write_json(workdir / SUMMARY, found)
    print_folds(found)
    return found


def _train_one(experiment: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    began = time.perf_counter()
    prepare(experiment, workdir)
    setup = set_up(experiment)
    begun = begin(experiment, setup, workdir, Evaluator(setup))
    outcome = Loop(setup, workdir, begun.checkpoints, begun.evaluator, began).run(begun.state, begun.progress)
    if outcome.stopped:
        begun.checkpoints.close()
        console.say(
            f"\nStopped by {outcome.stopped} after step {int(outcome.state.step)} of {setup.steps}. The same command goes on from there."
        )
        return {}
    return finish(begun, outcome, lambda: begun.progress.elapsed + time.perf_counter() - began)


@dataclasses.dataclass(frozen=True)
class Begun:
    """A run in its folder, where it begins or goes on."""

    setup: TrainingSetup
    workdir: pathlib.Path
    checkpoints: Checkpoints
    evaluator: Evaluator
    state: State
    progress: Progress


def prepare(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Raises `UserError` unless the folder is free or holds this very run; has compiled programs kept on disk from now on."""
    check_workdir(workdir, overrides.to_dict(experiment))
    _keep_compiled()
    host_memory.run_in_calling_thread()


def begin(
    experiment: Experiment, setup: TrainingSetup, workdir: pathlib.Path, evaluator: Evaluator, before: dict[str, float] | None = None
) -> Begun:
    """Opens a run's folder, and measures the model before training where the run doesn't go on.

    Args:
      experiment: as it was given.
      setup: of it.
      workdir: the run's folder.
      evaluator: of `setup`.
      before: what that evaluation would find, where another run found it.
    """
    for name, format, _ in own_exports(setup, setup.state):  # what could be written nowhere is refused before it trains
        check_replaceable(workdir / "export" / name, _kind(format))
    evaluator.warn(setup.experiment.eval.split)
    resolved = overrides.to_dict(experiment)
    write_config(workdir, resolved)
    checkpoints = Checkpoints(workdir / "checkpoints", experiment.train.keep)
    state, progress = _start(setup, checkpoints, evaluator, resolved, before)
    return Begun(setup, workdir, checkpoints, evaluator, state, progress)


def evaluate(experiment: Experiment, workdir: pathlib.Path) -> dict[str, float]:
    """Evaluates the best checkpoint of `workdir` on `eval.split`, and prints the figures; pictures go into a folder for that set."""
    setup, state = _load_best(experiment, workdir, measured=True)
    evaluator = Evaluator(setup)
    found = evaluator.full(state, experiment.eval.split, "Evaluating")
    console.table(
        f"{experiment.name}, step {int(state.step)}, on {experiment.eval.split}",
        ("metric", "value"),
        [(name, f"{value:.4f}") for name, value in found.metrics.items()],
    )
    split = experiment.eval.split
    print_report(experiment.task.report(setup.model, evaluator.chosen(split), found.outputs), workdir / f"eval-{split}")
    return found.metrics


def generate(experiment: Experiment, workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]], output: pathlib.Path | None) -> None:
    """Answers prompts with the best checkpoint of `workdir`; prints them, or writes them to `output` as JSON Lines.

    Args:
      experiment: the run's configuration.
      workdir: the run's folder.
      rows: each {"prompt": text}, or the columns that `data.prompt` names.
      output: a file, or None.
    """
    if not experiment.task.generates:
        raise UserError(
            f"The task {type(experiment.task).__name__} has no text to generate. --mode=eval measures the model; --mode=export writes it "
            "for transformers' pipelines."
        )
    places = [f"prompt {number}" for number in range(1, len(rows) + 1)]
    asked = [question(row, experiment.data, place) for row, place in zip(rows, places, strict=True)]
    prompts = [turns[-1]["content"] for turns in asked]
    if output is not None and output.exists():
        raise UserError(f"{output} exists. Choose another --output.")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"There is no folder {output.absolute().parent} for --output={output}.")
    if output is not None and not os.access(output.absolute().parent, os.W_OK):
        raise UserError(f"--output={output} can't be written: {output.absolute().parent} isn't yours to write in. Choose another place.")
    setup, state = _load_best(experiment, workdir)
    sampling = make_sampling(setup)
    tokens = generate_tokens(
        setup.model,
        setup.params(state),
        prompt_tokens(asked, places, setup.tokenizer, experiment.data),
        sampling,
        experiment.train.seed,
        min(experiment.eval.batch_size, len(prompts)),
    )
    answers = answer_texts(setup, tokens)
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) for prompt, answer in zip(prompts, answers, strict=True)]
    failed = None
    if output is not None:
        try:
            output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            console.say(f"{len(answers)} answers are in {output}.")
            return
        except OSError as error:
            failed = error
    for prompt, answer in zip(prompts, answers, strict=True):
        console.say(answer if len(prompts) == 1 else f"> {prompt}\n{answer}\n")
    if failed is not None:
        raise UserError(f"{output} can't be written: {failed}. The answers are printed above.") from failed


def export(experiment: Experiment, workdir: pathlib.Path, format: str | None, output: pathlib.Path | None) -> None:
    """Writes the best checkpoint of `workdir` to `output`.

    Args:
      experiment: the run's configuration.
      workdir: the run's folder.
      format: `peft` or `adapterhub`, the adapter; `hf`, the merged model; `bitsandbytes`, the merged model quantized again, which prints
        what that loses; None, what a run ends with.
      output: a folder, or None for one in `workdir`.
    """
    if format is None:
        setup, state = _load_best(experiment, workdir)
        exports = own_exports(setup, state)
        for name, own, method in exports:
            folder = output / name if output and len(exports) > 1 else output or workdir / "export" / name
            _export(setup, state, own, method, folder, summary_of(workdir))
            _say_exported(folder, own)
        return
    own_format = adapter_format(experiment.method) or HF
    if format not in FORMATS:
        raise unknown("export format", format, FORMATS)
    if format not in (*WHOLE, own_format):
        raise UserError(f"{experiment.method.title} has no form in {format}. Give --format={own_format}.")
    folder = output or workdir / "export" / format
    if format == BITSANDBYTES:
        bitsandbytes_config.check_code(experiment.model.quantization)
    check_replaceable(folder, _kind(format))
    setup, state = _load_best(experiment, workdir, measured=format == BITSANDBYTES)
    if format == BITSANDBYTES:
        requantize.export(setup, state, Evaluator(setup), folder, summary_of(workdir))
    else:
        _export(setup, state, format, setup.experiment.method, folder, summary_of(workdir))
    _say_exported(folder, format)


def inspect(experiment: Experiment, workdir: pathlib.Path) -> Look:
    """Prints what the data holds and what is wrong with it, writes it to `workdir` as JSON and as a page, and returns it.

    Of the model the tokenizer alone is loaded. A run that lives in the folder is left as it is.
    """
    check_folder(workdir)
    if not experiment.model.source:
        raise UserError("There is no model, whose tokenizer is needed: set config.model.source to a hub id, a folder, or bundled:NAME.")
    tokenizer = experiment.task.fit_tokenizer(load_tokenizer(experiment.model.source, experiment.model.revision))
    found = look(experiment, tokenizer)
    report.say(found)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir} can't be written ({error.strerror}). Choose another --workdir.") from error
    write_json(workdir / INSPECTION, report.as_json(found))
    write_text(workdir / INSPECTION_PAGE, page(found))
    console.say(f"All of it, with pictures, is in {workdir / INSPECTION_PAGE}, and for programs in {workdir / INSPECTION}.")
    return found


def _say_exported(folder: pathlib.Path, format: str) -> None:
    console.say(f"{folder} holds the {'merged model' if format in WHOLE else 'adapter'}.")


def _kind(format: str) -> str:
    return "model" if format in WHOLE else "adapter"


def own_exports(setup: Setup, state: State) -> list[tuple[str, str, Method]]:
    """Returns what a run is exported as: folder's name, format, method.

    The adapter alone where PEFT or AdapterHub has such, else the whole model; a sum as a whole model too, or as the adapters of its parts
    where it can't be merged. Raises `UserError` for such a part that no file can hold.
    """
    method, params = setup.experiment.method, setup.params(state)

    def form(part: Method) -> str | None:
        found = adapter_format(part)
        return found if found != "peft" or has_form(setup.model, params, part) else None

    if not isinstance(method, Compose):
        format = form(method) or "hf"
        return [(format, format, method)]
    whole = adapter_format(method)
    if setup.model.head and whole is not None and has_form(setup.model, params, method):  # one adapter, and the task's head
        return [(whole, whole, method)]
    if can_merge(method, setup.model, params):
        return [("hf", "hf", method)]
    exports = []
    for number, part in enumerate(method.methods, start=1):
        if (found := form(part)) is None:
            raise UserError(
                f"What {method.title} trains could be written nowhere: it can't be merged, and PEFT's files can't hold {part}. "
                "Change that part, or leave one out."
            )
        exports.append((f"{number}-{part.title}", found, part))
    return exports


def _keep_compiled() -> None:
    """Keeps XLA's programs on disk, so that the same job started again compiles nothing."""
    folder = pathlib.Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _start(
    setup: TrainingSetup, checkpoints: Checkpoints, evaluator: Evaluator, resolved: dict[str, Any], before: dict[str, float] | None
) -> tuple[State, Progress]:
    """The newest checkpoint's state, or the first state with the evaluation before training."""
    base, split, data = fingerprint(setup.frozen), setup.experiment.eval.split, _digests(setup)
    newest = checkpoints.latest()
    if newest is None:
        before = before or evaluator.full(setup.state, split, "Before training").metrics
        return setup.state, Progress(resolved, base, before, data, answer_end=setup.answer_end, options=setup.options)
    progress = dataclasses.replace(checkpoints.progress(newest), answer_end=setup.answer_end, options=setup.options)
    _check_base(progress, base, setup)
    _check_data(progress, data, setup)
    console.say(f"Going on from step {newest} of {setup.steps}.")
    same_sets = all(progress.data.get(name) == data.get(name) for name in (split, GENERAL))
    if not same_sets or _measured(progress.config) != _measured(resolved):  # the table compares figures of the same sets
        before = evaluator.full(setup.state, split, "Before training").metrics
        progress = dataclasses.replace(progress, config=resolved, before=before, data=data)
    return checkpoints.restore(newest, setup.state, setup.state_sharding), progress


def _digests(setup: TrainingSetup) -> dict[str, str]:
    """What tells a run's sets from others, by their names."""
    found = {name: examples.digest for name, examples in setup.examples.items()}
    return found if setup.unlabelled is None else found | {UNLABELLED: setup.unlabelled.layout.examples.digest}


def _check_data(progress: Progress, data: Mapping[str, str], setup: TrainingSetup) -> None:
    """Raises `UserError` where a set that training reads isn't the one that the run began with; the test set may be another."""
    for name in ("train", "validation", UNLABELLED):
        if name in progress.data and progress.data[name] != data.get(name):
            rows = (name == UNLABELLED and setup.experiment.data.unlabelled) or setup.rows.get(name, setup.rows["train"]).name
            raise UserError(
                f"The {name} set isn't the one that this run began with: its rows, from {rows}, have changed since. Put them back, or "
                "choose another --workdir."
            )


def _measured(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What decides on which rows, and how, a model is measured before and after training."""
    return config["eval"], config["data"].get("test")


def _check_base(progress: Progress, base: str, setup: Setup) -> None:
    if progress.base != base:
        start = getattr(setup.experiment.method, "start", "default")
        also = f" Or this machine rounds otherwise than that one: start={start} is computed anew." if start != "default" else ""
        raise UserError(
            f"The checkpoint was trained on another base model than {setup.experiment.model.source} is now: their frozen parameters "
            f"differ.{also} Give the same config.model.source and revision, or another --workdir."
        )


def _best(checkpoints: Checkpoints, progress: Progress) -> int:
    newest = checkpoints.latest()
    assert newest is not None
    return newest if progress.best_step is None else progress.best_step


def _load_best(experiment: Experiment, workdir: pathlib.Path, measured: bool = False) -> tuple[Setup, State]:
    """The run of a working folder, at its best checkpoint; where it shall be `measured`, with the set of `eval.split`."""
    if not (workdir / CONFIG).is_file():
        raise UserError(f"{workdir} holds no run of jaxft. Train one first (--mode=train), or name its folder by --workdir.")
    check_workdir(workdir, overrides.to_dict(experiment), trains=False)
    if is_cross_validation(experiment):
        folder = fold_folder(workdir, 0)
        raise UserError(f"{workdir} holds a run for each of {experiment.data.folds} folds. Name one of them, as --workdir={folder}.")
    _keep_compiled()
    host_memory.run_in_calling_thread()
    checkpoints = Checkpoints(workdir / "checkpoints", experiment.train.keep)
    newest = checkpoints.latest()
    if newest is None:
        raise UserError(f"{workdir} has no checkpoint yet. Train first (--mode=train).")
    progress = checkpoints.progress(newest)
    setup, trainable = set_up_trained(experiment, progress, measured)
    _check_base(progress, fingerprint(setup.frozen), setup)
    state = checkpoints.restore_trained(_best(checkpoints, progress), trainable, is_averaged(experiment))
    checkpoints.close()
    return setup, state


def finish(begun: Begun, outcome: Outcome, elapsed: Callable[[], float]) -> dict[str, Any]:
    """Evaluates the best state, exports it, writes and prints what came out; returns the summary.

    TensorBoard and the loggers have the figures as "SPLIT_METRIC" of the last step.

    Args:
      begun: the run.
      outcome: how its loop ended.
      elapsed: returns its seconds so far.
    """
    setup, workdir, checkpoints, evaluator = begun.setup, begun.workdir, begun.checkpoints, begun.evaluator
    best = _best(checkpoints, outcome.progress)
    state = outcome.state
    if best != int(state.step):
        state = checkpoints.restore(best, setup.state, setup.state_sharding)
        console.say(f"Step {best} was the best on validation.")
    split = setup.experiment.eval.split
    with outcome.logs.end(int(outcome.state.step)) as figures:
        after = evaluator.full(state, split, "After training")
        figures.update({f"{split}_{name}": value for name, value in after.metrics.items()})
    summary = _summarize(setup, outcome, after, elapsed())
    summary["eval"]["majority"] = evaluator.majority(split)
    summary["eval"] |= evaluator.word_baseline(split)
    exports = own_exports(setup, state)
    for name, format, method in exports:
        _export(setup, state, format, method, workdir / "export" / name, summary)
    summary["seconds"] = elapsed()
    write_json(workdir / SUMMARY, summary)
    chosen = evaluator.chosen(split)
    fields = evaluator.answer_format.names if evaluator.generates else ()
    print_comparison(summary, fields, f"On {len(set(chosen.rows.tolist())):,} rows of {split}")
    print_report(setup.experiment.task.report(setup.model, chosen, after.outputs), workdir)
    print_report(Report(pictures=Observed(setup, workdir).pictures()), workdir)
    print_answers(chosen, after, setup)
    console.say(
        f"{summary['seconds']:.0f} s in all, {summary['compile_seconds']:.1f} s of them compiling; "
        f"{summary['tokens_per_second']:,.0f} tokens/s, peak memory {summary['peak_memory_bytes'] / 2**30:.2f} GiB.\n"
    )
    for name, format, method in exports:
        folder, model = workdir / "export" / name, setup.experiment.model
        console.say(model_command(folder, setup.model) if format == HF else adapter_command(folder, model, format, setup.model, method))
    checkpoints.close()
    return summary


def _summarize(setup: TrainingSetup, outcome: Outcome, after: Evaluation, seconds: float) -> dict[str, Any]:
    progress, trainable = outcome.progress, size(outcome.state.trainable)
    return {
        "experiment": setup.experiment.name,
        "model": setup.experiment.model.source,
        "method": setup.experiment.method.title,
        "task": type(setup.experiment.task).__name__,
        "steps": int(outcome.state.step),
        "seed": setup.experiment.train.seed,
        "trainable_parameters": trainable,
        "total_parameters": trainable + size(setup.frozen),
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "compile_seconds": outcome.compile_seconds,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "train_loss": progress.train_loss,
        "eval": {"before": progress.before, "after": after.metrics},
    }


def _export(setup: Setup, state: State, format: str, method: Method, folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    experiment, params = setup.experiment, setup.params(state)
    text = card(experiment, summary, format)
    if format != "hf":
        save_adapter(folder, setup.model, params, method, base_model=expanded(experiment.model.source), card=text)
    else:
        save_pretrained(folder, stopping_model(setup), method.merge(setup.model, on_host(params)), setup.tokenizer, card=text)
