"""What is known to be wrong with a sweep's runs before the first one starts."""

from jaxft import overrides
from jaxft.config import Experiment
from jaxft.errors import UserError
from jaxft.sweep.population import populations
from jaxft.sweep.runs import NO_VALIDATION, Folder
from jaxft.train.setup import check as check_values
from jaxft.train.setup import describe_run


def check(folder: Folder) -> str | list[list[str]]:
    """Returns what the first run that can't be is refused for, or the runs' IDs in the groups that train together.

    Every run's values are checked; what fits which model, and what the data holds, once for all runs that are alike in that.
    """
    experiments: dict[str, Experiment] = {}
    described: set[str] = set()
    for run in [run["id"] for run in folder.sweep()["runs"]]:
        try:
            experiment = experiments[run] = folder.experiment(run)
            check_values(experiment)
            if (kind := _kind(experiment)) not in described:
                described.add(kind)
                _check_fit(experiment)
        except UserError as error:
            text = f"Run {run}: {error}"
            for field in ("metric", "mode"):  # the sweep's own, which its runs have these by
                text = text.replace(f"train.best_{field}", f"Sweep.{field}")
            return text
    names = list(experiments)
    return [[names[i] for i in group] for group in populations(list(experiments.values()))]


def _kind(experiment: Experiment) -> str:
    """What runs are alike in that differ in numbers alone."""
    config = overrides.to_dict(experiment)
    train = {name: value for name, value in config["train"].items() if name not in ("seed", "steps", "epochs")}
    return repr({name: value for name, value in config.items() if name not in ("optimizer", "train")} | train)


def _check_fit(experiment: Experiment) -> None:
    """Raises `UserError` for what the model's and the data's files say against a run."""
    if "validation" not in describe_run(experiment)[1]:
        raise UserError(NO_VALIDATION)
