"""Cross-validation as runs: what each fold's is, and what they come to together."""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft import console
from jaxft.config import EvalConfig, Experiment
from jaxft.data import folds
from jaxft.errors import UserError
from jaxft.train.logs import number


def is_cross_validation(experiment: Experiment) -> bool:
    """Returns whether an experiment is a run for each fold."""
    return bool(experiment.data.folds) and experiment.data.fold == folds.ALL


def fold_folder(workdir: pathlib.Path, fold: int) -> pathlib.Path:
    """Returns where the run of a fold lives."""
    return workdir / f"fold-{fold}"


def one_fold(experiment: Experiment, fold: int) -> Experiment:
    """Returns the run of a fold: measured on the part that it holds out; raises `UserError` where another set is asked for.

    The test set is what is measured where nothing is said; here that is the part held out.
    """
    if experiment.eval.split not in (EvalConfig().split, "validation"):
        raise UserError(
            f"config.eval.split is {experiment.eval.split}, but each of config.data.folds is measured on the part that it holds out. Leave "
            "it out, or train one fold alone: --config.data.fold=0."
        )
    data = dataclasses.replace(experiment.data, fold=fold)
    return dataclasses.replace(experiment, data=data, eval=dataclasses.replace(experiment.eval, split="validation"))


def together(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the summary of all folds: under "eval" the mean of each metric, under "deviation" its deviation (n - 1), and all of them.

    Args:
      summaries: of the folds, in their order.
    """
    same = ("experiment", "model", "method", "task", "seed", "trainable_parameters", "total_parameters")
    found = {name: summaries[0][name] for name in same} | {"folds": len(summaries)}
    figures = {
        when: {
            name: [summary["eval"][when][name] for summary in summaries]
            for name in summaries[0]["eval"][when]
            if all(name in summary["eval"][when] for summary in summaries)
        }
        for when in summaries[0]["eval"]
    }
    found["seconds"] = sum(summary["seconds"] for summary in summaries)
    for title, function in (("eval", statistics.fmean), ("deviation", statistics.stdev)):
        found[title] = {when: {name: function(values) for name, values in of.items()} for when, of in figures.items()}
    return found | {"each": [summary["eval"] for summary in summaries]}


def print_folds(found: Mapping[str, Any]) -> None:
    """Prints the mean and the deviation of each metric, and each fold's."""
    rows = [
        [name, number(name, mean), number(name, found["deviation"]["after"][name])]
        + [number(name, one["after"][name]) for one in found["each"]]
        for name, mean in found["eval"]["after"].items()
    ]
    columns = ("metric", "mean", "deviation", *(f"fold {fold}" for fold in range(found["folds"])))
    console.table(f"Over {found['folds']} folds, each measured on the part that it held out", columns, rows)
