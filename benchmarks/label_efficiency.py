"""What labels are worth: test accuracy and macro F1 against their number, supervised alone and by each semi-supervised objective.

    python benchmarks/label_efficiency.py [--labels N ...] [--algorithms NAME ...] [--seeds N ...] [--tuning N ...] [--steps N]
        [--workers N] [--output FOLDER] [--report]

MiniLM on the bundled reviews, as the experiment semi_supervised_bert_sentiment has it: 60 of 600 reviews are the validation set, so many
labels are kept of the others, and the rest are rows without labels. A seed draws all of it: which rows are held out, which keep their
label, the head's start, and the order; algorithms of one seed have the same rows, so they are compared in pairs. The last two layers of six
train, with the head: in so few steps they end no worse than the whole model (ablation_methods: 0.767 against 0.798), and cost about half.

Settings are chosen on validation alone, by its macro F1 with seeds of their own (--tuning), once, with 60 labels: the rate of the
supervised run, which all take, then each algorithm's own among a few. The test is measured once a seed, with the chosen ones. All have the
same steps and the same labelled rows a step.

A run is a process that trains as `launch.py` does, in a folder of its own: one that was stopped goes on where it was, one that has a
result isn't repeated. So parts can be run at any time, in any order: --labels, --algorithms and --seeds say which; --report writes the
table and the plot of what there is. With --workers=2 two run at a time, each on half of the cores, and their seconds are of so many.
Everything is 4 numbers of labels, 12 algorithms and 5 seeds, and before them 3 settings of each with 2 seeds: 312 runs.

Writes label_efficiency.json, label_efficiency.md and label_efficiency.png, and beside them, in FOLDER/label_efficiency/, a file a run.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import machine
import numpy as np
from scipy import stats

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # experiments and jaxft, of this checkout
EXPERIMENT, SUPERVISED = "semi_supervised_bert_sentiment", "supervised"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")
LABELS, SEEDS, TUNING = (20, 60, 120, 300), (0, 1, 2, 3, 4), (100, 101)
TUNED_AT = 60  # labels
METHOD = "Partial(last=2)"
TRAINING_ROWS, STEPS = 540, 150
METRICS = ("accuracy", "macro_f1")
CHOSEN_BY = "macro_f1"
CONFIDENCE = 0.95
_UNMEASURED = {"loss": float("nan")}  # before training, which no figure here is compared with
RATES = ("1e-4", "3e-4", "1e-3")  # as ablation_methods tries them
_VIEW = "masked=0.15"
ALGORITHMS: dict[str, tuple[str, ...]] = {  # the settings that are tried: objectives, as flags have them; of the supervised run rates
    SUPERVISED: RATES,
    "self_supervised": ("SelfSupervised(weight=0.1)", "SelfSupervised(weight=0.5)", "SelfSupervised(weight=1.0)"),
    "self_supervised_first": ("SelfSupervised(stage=0.3)", "SelfSupervised(stage=0.5)", "SelfSupervised(stage=0.7)"),
    "freelb": ("FreeLB(rate=0.05)", "FreeLB(rate=0.1)", "FreeLB(rate=0.3)"),
    "smart": ("SMART(weight=1.0)", "SMART(weight=3.0,epsilon=0.01,rate=0.01,start=0.01)", "SMART(weight=1.0,proximal=1.0)"),
    "vat": ("VAT(epsilon=0.3)", "VAT(epsilon=1.0)", "VAT(epsilon=1.0,entropy=0.3)"),
    "self_training": ("SelfTraining(threshold=0.7)", "SelfTraining(threshold=0.9)", "SelfTraining(threshold=0.8,balanced=True)"),
    "self_training_soft": tuple(f"SelfTraining(threshold=0.5,soft=True,temperature={one})" for one in (0.5, 0.8, 1.0)),
    "fixmatch": tuple(f"FixMatch(threshold={one},{_VIEW})" for one in (0.7, 0.8, 0.95)),
    "uda": tuple(f"UDA(threshold={one},temperature=0.6,{_VIEW})" for one in (0.45, 0.6, 0.8)),
    "flexmatch": tuple(f"FlexMatch(threshold={one},{_VIEW})" for one in (0.7, 0.8, 0.95)),
    "mean_teacher": ("MeanTeacher(weight=1.0)", "MeanTeacher(weight=10.0)", "MeanTeacher(weight=3.0,distance='kl')"),
}
ON_LABELS_ALONE = (SUPERVISED, "freelb", "smart")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of launch.py."""

    algorithm: str
    labels: int
    seed: int
    setting: str  # of ALGORITHMS
    rate: str  # the learning rate
    steps: int
    split: str  # what is measured after it: validation or test

    @property
    def name(self) -> str:
        """Of its folder and its file."""
        setting = "".join(letter if letter.isalnum() or letter in ".=-" else "_" for letter in self.setting).strip("_")
        return f"{self.split}-{self.labels}-{self.algorithm}-{setting}-{self.rate}-{self.steps}-{self.seed}"

    def flags(self) -> list[str]:
        """Returns the flags of launch.py."""
        objective = "none" if self.algorithm == SUPERVISED else self.setting
        found = {
            "objective": objective,
            "method": METHOD,
            "data.labelled_fraction": self.labels / TRAINING_ROWS,
            "optimizer.learning_rate": self.rate,
            "train.seed": self.seed,
            "train.steps": self.steps,
            "train.eval_every": 0,
            "train.checkpoint_every": max(self.steps // 3, 1),
            "train.unlabelled_batch_size": 0 if self.algorithm in ON_LABELS_ALONE else 4,
            "eval.split": self.split,
            "eval.gap": "false",
        }
        return [f"--config.{name}={value}" for name, value in found.items()]


def main() -> None:
    """Runs what is missing of the part that is asked for, and writes the report of all there is."""
    options = _options()
    folder = options.output / "label_efficiency"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.report:
        for labels in options.labels:
            study(labels, options.algorithms, options.seeds, options.tuning, options.steps, folder, options.workers)
    report(folder, options.output, options.steps)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, nargs="+", default=list(LABELS), help="numbers of labels")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), help="these alone, and the supervised run")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the measured runs")
    parser.add_argument("--tuning", type=int, nargs="+", default=list(TUNING), help="seeds of the runs that choose settings")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps a run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results", help="where results are kept, and the report is written")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what there is")
    return parser.parse_args()


# ---------------------------------------------------------------- runs


def study(
    labels: int, algorithms: Sequence[str], seeds: Sequence[int], tuning: Sequence[int], steps: int, folder: pathlib.Path, workers: int = 1
) -> None:
    """Chooses settings on validation where they aren't yet, and measures them on test; the supervised run's rate is everybody's."""
    names = tuple(dict.fromkeys((SUPERVISED, *algorithms)))
    rate = tuned([SUPERVISED], "", tuning, steps, folder, workers)[SUPERVISED]
    chosen = {SUPERVISED: rate} | tuned([name for name in names if name != SUPERVISED], rate, tuning, steps, folder, workers)
    measured([Run(name, labels, seed, chosen[name], rate, steps, "test") for name in names for seed in seeds], folder, workers)


def tuned(algorithms: Sequence[str], rate: str, tuning: Sequence[int], steps: int, folder: pathlib.Path, workers: int) -> dict[str, str]:
    """Returns each algorithm's setting that is best on validation, the mean over the tuning seeds."""
    runs = [
        Run(algorithm, TUNED_AT, seed, setting, rate or setting, steps, "validation")
        for algorithm in algorithms
        for setting in ALGORITHMS[algorithm]
        for seed in tuning
    ]
    scores: dict[str, dict[str, list[float]]] = {algorithm: {setting: [] for setting in ALGORITHMS[algorithm]} for algorithm in algorithms}
    for run, found in zip(runs, measured(runs, folder, workers), strict=True):
        scores[run.algorithm][run.setting].append(found["metrics"][CHOSEN_BY])
    return {algorithm: max(own, key=lambda setting, own=own: np.mean(own[setting])) for algorithm, own in scores.items()}


def measured(runs: Sequence[Run], folder: pathlib.Path, workers: int) -> list[dict[str, Any]]:
    """Returns what runs came to: from their files, or by running them, so many at a time, each on its share of the cores."""
    missing = [run for run in dict.fromkeys(runs) if not _file(run, folder).exists()]
    if missing:
        import jaxft.train.run  # noqa: F401 - what every run needs: imported once, before the first fork

        context = multiprocessing.get_context("fork")
        lanes = context.Value("i", 0)
        with concurrent.futures.ProcessPoolExecutor(workers, context, _pin, (lanes, workers)) as pool:
            for _ in pool.map(_run_apart, missing, itertools.repeat(folder)):
                pass
    return [json.loads(_file(run, folder).read_text()) for run in runs]


def _file(run: Run, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"{run.name}.json"


def _pin(lanes: Any, workers: int) -> None:
    """Gives this process, and those that it starts, their share of the cores."""
    with lanes.get_lock():
        number, lanes.value = lanes.value, lanes.value + 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % len(cores) :: workers] or cores)


def _run_apart(run: Run, folder: pathlib.Path) -> None:
    """Runs in a process of its own, whose peak of memory is the run's, and writes what it came to."""
    workdir = folder / "work" / run.name
    workdir.parent.mkdir(exist_ok=True)
    log = workdir.with_name(f"{run.name}.log")  # a name has points of numbers
    process = multiprocessing.get_context("fork").Process(target=_train, args=(run, workdir, _file(run, folder), log))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{run.name} ended with code {process.exitcode}:\n{log.read_text()[-2000:]}")
    shutil.rmtree(workdir)
    log.unlink()


def _train(run: Run, workdir: pathlib.Path, result: pathlib.Path, log: pathlib.Path) -> None:
    """Trains as launch.py does, or goes on with what was stopped, and measures after it; what launch.py does beside that is left out."""
    told = os.dup(1)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import experiments
    from jaxft import overrides
    from jaxft.train import run as modes
    from jaxft.train.evaluate import Evaluator
    from jaxft.train.logs import peak_memory_bytes
    from jaxft.train.loop import Loop
    from jaxft.train.setup import set_up

    began = time.perf_counter()
    experiment = overrides.parse_flags(experiments.load(EXPERIMENT), run.flags())
    modes.prepare(experiment, workdir)
    setup = set_up(experiment)
    evaluator = Evaluator(setup)
    begun = modes.begin(experiment, setup, workdir, evaluator, before=_UNMEASURED)
    outcome = Loop(setup, workdir, begun.checkpoints, evaluator, began).run(begun.state, begun.progress)
    if outcome.stopped:
        sys.exit(1)
    outcome.logs.close()
    metrics = evaluator.full(outcome.state, run.split, run.split).metrics
    begun.checkpoints.close()
    found = dataclasses.asdict(run) | {
        "metrics": metrics,
        "seconds": begun.progress.elapsed + time.perf_counter() - began,
        "peak_memory_bytes": peak_memory_bytes(),
        "last": _last_step(workdir),
        "machine": machine.describe(PACKAGES),
    }
    written = result.with_suffix(".partial")
    written.write_text(json.dumps(found, indent=1) + "\n")
    written.replace(result)
    scores = ", ".join(f"{name} {metrics[name]:.3f}" for name in METRICS)
    os.write(told, f"{run.name}: {scores} in {found['seconds']:.0f} s\n".encode())


def _last_step(workdir: pathlib.Path) -> dict[str, float]:
    """What the last step logged: loss, share of unlabelled rows in use, accuracy of their labels."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "loss" in line)


# ---------------------------------------------------------------- the report


def interval(values: Sequence[float]) -> float:
    """Returns half the width of the 95% interval of a mean, by Student's t; nan for one value.

    >>> round(interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    count = len(values)
    if count < 2:
        return float("nan")
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))


def compared(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float]:
    """Returns the mean difference over the seeds that both have, and the p-value of the paired t-test; nan where it can't be told."""
    seeds = sorted(ours.keys() & theirs.keys())
    differences = np.asarray([ours[seed] - theirs[seed] for seed in seeds])
    if len(seeds) < 2 or np.ptp(differences) == 0:
        return (float(differences.mean()) if len(seeds) else float("nan")), float("nan")
    return float(differences.mean()), float(stats.ttest_1samp(differences, 0.0).pvalue)


def collected(folder: pathlib.Path, steps: int) -> dict[tuple[int, str], dict[int, dict[str, Any]]]:
    """Returns (labels, algorithm) -> seed -> the measured runs of so many steps."""
    found: dict[tuple[int, str], dict[int, dict[str, Any]]] = collections.defaultdict(dict)
    for path in sorted(folder.glob("test-*.json")):
        one = json.loads(path.read_text())
        if one["steps"] == steps:
            found[one["labels"], one["algorithm"]][one["seed"]] = one
    return found


def report(folder: pathlib.Path, output: pathlib.Path, steps: int) -> None:
    """Writes the table, the plot and their numbers."""
    found = collected(folder, steps)
    if not found:
        print("There is nothing to report yet.")
        return
    table = rows(found)
    text = render(table, steps)
    print(text)
    (output / "label_efficiency.md").write_text(text + "\n")
    (output / "label_efficiency.json").write_text(json.dumps({"steps": steps, "rows": table}, indent=1) + "\n")
    plot(table, output / "label_efficiency.png")


def rows(found: Mapping[tuple[int, str], Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns a row for each number of labels and algorithm: means, intervals, and the difference from the supervised run."""
    table = []
    for labels, algorithm in sorted(found, key=lambda key: (key[0], list(ALGORITHMS).index(key[1]))):
        runs, base = found[labels, algorithm], found.get((labels, SUPERVISED), {})
        row: dict[str, Any] = {"labels": labels, "algorithm": algorithm, "seeds": sorted(runs), "setting": _only(runs, "setting")}
        row["seconds"] = float(np.median([run["seconds"] for run in runs.values()]))
        row["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in runs.values())
        for metric in METRICS:
            values = {seed: run["metrics"][metric] for seed, run in runs.items()}
            row[metric], row[f"{metric}_interval"] = float(np.mean(list(values.values()))), interval(list(values.values()))
            if algorithm != SUPERVISED:
                others = {seed: run["metrics"][metric] for seed, run in base.items()}
                row[f"{metric}_gain"], row[f"{metric}_p"] = compared(values, others)
        table.append(row)
    return table


def _only(runs: Mapping[int, Mapping[str, Any]], name: str) -> str:
    return ", ".join(dict.fromkeys(str(run[name]) for run in runs.values()))


def render(table: Iterable[Mapping[str, Any]], steps: int) -> str:
    """Returns the table as Markdown."""
    lines = [
        f"Test accuracy and macro F1, {METHOD}, {steps} steps; mean over seeds +- 95% interval (Student's t). Gain: mean difference of",
        "macro F1 from the supervised run of the same seed, p by the paired t-test, not corrected for the number of comparisons.",
        "",
        "| labels | algorithm | setting | seeds | accuracy | macro F1 | gain | p | s a run | GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        means = [f"{row[metric]:.1%} +- {row[f'{metric}_interval']:.1%}" for metric in METRICS]
        gain = [f"{row['macro_f1_gain']:+.1%}", f"{row['macro_f1_p']:.3f}"] if "macro_f1_gain" in row else ["", ""]
        cost = [f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 1e9:.2f}"]
        cells = [str(row["labels"]), row["algorithm"], f"`{row['setting']}`", str(len(row["seeds"])), *means, *gain, *cost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace("nan%", "-").replace("nan", "-")


def plot(table: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draws both metrics against the number of labels, a line an algorithm, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METRICS), figsize=(12, 5), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for number, algorithm in enumerate(dict.fromkeys(row["algorithm"] for row in table)):
            own = [row for row in table if row["algorithm"] == algorithm]
            places = [row["labels"] * (1 + 0.01 * number) for row in own]  # beside each other, so that intervals can be told apart
            style = {"color": "black", "linewidth": 2.5, "zorder": 5} if algorithm == SUPERVISED else {"linewidth": 1.2}
            spread = [np.nan_to_num(row[f"{metric}_interval"]) for row in own]
            axis.errorbar(places, [row[metric] for row in own], yerr=spread, label=algorithm, capsize=2, marker="o", markersize=3, **style)
        axis.set_xscale("log")
        axis.set_xticks(sorted({row["labels"] for row in table}), sorted({str(row["labels"]) for row in table}, key=int))
        axis.minorticks_off()
        axis.set_xlabel("labelled reviews")
        axis.set_ylabel(f"test {metric.replace('_', ' ')}")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
