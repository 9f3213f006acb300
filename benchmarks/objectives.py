"""What each objective costs: time and memory of one training step beside that of plain supervised training.

    python benchmarks/objectives.py [--groups NAME ...] [--rounds N] [--only TEXT] [--output FOLDER]

Three groups, each of one experiment on the bundled material: `labels`, semi_supervised_bert_sentiment, 2 packed rows of labelled reviews
and 4 of the others a step, full fine-tuning of MiniLM; `tags`, lora_bert_tags, LoRA on MiniLM; `answers`, semi_supervised_llama2,
LoRA on SmolLM2. The first of a group is the supervised step on the labelled rows alone.

All steps of a group are compiled first, then taken in turn, one of each a round: what else the machine does meets all of them. A time is
the median over the rounds, a ratio the median of what the rounds' own ratios are, with their quartiles. Products are counted in the traced
step, memory is what the compiled program takes, its arguments included (`memory_analysis`). Writes objectives.json and objectives.md.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import machine

from jaxft import overrides
from jaxft.train import placement
from jaxft.train.loop import jitted_step
from jaxft.train.programs import operations
from jaxft.train.setup import TrainingSetup, set_up

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where the experiments are

import experiments  # noqa: E402

PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy")
PLAIN = "none"
_VIEW = "threshold=0.8,masked=0.15"
_TAGS = "policy='tags',rate=0.05,final_rate=0.15,schedule='linear',entity_rate=0.1"
# By group: the experiment that all steps are of, what makes it the supervised one, and the objectives
GROUPS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "labels": (
        "semi_supervised_bert_sentiment",
        "semi_supervised_bert_sentiment:supervised",
        (
            "FreeLB(rate=0.1)",
            "SMART()",
            "SMART(proximal=1.0)",
            "SelfSupervised()",
            "SelfTraining(threshold=0.8)",
            f"FixMatch({_VIEW})",
            f"FlexMatch({_VIEW})",
            f"UDA({_VIEW})",
            "MeanTeacher()",
            "VAT()",
        ),
    ),
    "tags": (
        "lora_bert_tags",
        "lora_bert_tags",
        (
            "DynamicMask(policy='tokens',restoration=0.0)",
            "DynamicMask(policy='tokens')",
            "DynamicMask(policy='words')",
            "DynamicMask(policy='spans')",
            f"DynamicMask({_TAGS})",
            "DynamicMask(policy='salience')",
            "DynamicMask(policy='salience',salience='attention')",
            "DynamicMask(policy='loss')",
            "DynamicMask(policy='mix',mix=(('words',0.5),('loss',0.5)))",
            "DynamicMask(policy='words',consistency=1.0)",
        ),
    ),
    "answers": (
        "semi_supervised_llama2",
        "semi_supervised_llama2:supervised",
        ("SelfSupervised(weight=0.1)", "PseudoAnswers(threshold=0.9,answer_tokens=24)", "DynamicMask(policy='words')", "FreeLB(rate=0.1)"),
    ),
}
ON_LABELS_ALONE = ("FreeLB", "SMART", "DynamicMask")


def main() -> None:
    """Measures the groups and writes the report; of other groups it keeps what an earlier call found."""
    options = _options()
    path = options.output / "objectives.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.groups:
        command = " ".join(["python benchmarks/objectives.py", *sys.argv[1:]])
        report[name] = {"command": command, "machine": machine.describe(PACKAGES), "rounds": options.rounds}
        report[name]["rows"] = measure(name, options.only, options.rounds)
        options.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(render(report))
    print(render(report))


def measure(group: str, only: str, rounds: int) -> list[dict[str, Any]]:
    """Returns a row an objective, the supervised step's first: of each its seconds by round, products, and memory."""
    named, plain, objectives = GROUPS[group]
    steps = {PLAIN: Step(_setup(plain))}
    for objective in objectives:
        if only in objective:
            steps[objective] = Step(_setup(named, objective))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            taken = step.take(number)
            if number:  # the first one also brings what it needs into memory
                seconds[name].append(taken)
        print(f"{group}, round {number} of {rounds}", file=sys.stderr, flush=True)
    return [{"objective": name, "seconds": seconds[name], **step.described} for name, step in steps.items()]


class Step:
    """One objective's compiled step, and the state that it has come to."""

    def __init__(self, setup: TrainingSetup):
        self._setup, self._state = setup, setup.state
        jitted = jitted_step(setup.experiment, setup.model, setup.optimizer, setup.state_sharding, setup.steps)
        given = (self._state, setup.frozen, self._batch(0), setup.start)
        traced = jitted.trace(*given)
        self._compiled = traced.lower().compile()
        used: Any = self._compiled.memory_analysis()
        self.described = {
            "operations": operations(traced.jaxpr.jaxpr),
            "bytes": used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes,
        }

    def take(self, number: int) -> float:
        """Takes a step; returns the seconds of it, what is logged fetched."""
        batch = jax.block_until_ready(self._batch(number))
        began = time.perf_counter()
        self._state, metrics = self._compiled(self._state, self._setup.frozen, batch, self._setup.start)
        jax.device_get(metrics)
        jax.block_until_ready(self._state)
        return time.perf_counter() - began

    def _batch(self, number: int) -> Any:
        return placement.place_batch(self._setup.batch(number), self._setup.mesh, placement.BATCH)


def _setup(name: str, objective: str = "") -> TrainingSetup:
    experiment = experiments.load(*name.partition(":")[::2])
    if not objective:
        return set_up(experiment)
    flags = [f"--config.objective={objective}"]
    if objective.partition("(")[0] in ON_LABELS_ALONE and experiment.train.unlabelled_batch_size:
        flags.append("--config.train.unlabelled_batch_size=0")
    return set_up(overrides.parse_flags(experiment, flags))


def ratios(row: Mapping[str, Any], plain: Mapping[str, Any]) -> tuple[float, float, float]:
    """Returns the quartiles of a row's times by the supervised step's of the same round: the median is the second.

    >>> ratios({"seconds": [2.0, 4.0, 9.0]}, {"seconds": [1.0, 2.0, 3.0]})
    (2.0, 2.0, 2.5)
    """
    found = [one / other for one, other in zip(row["seconds"], plain["seconds"], strict=True)]
    if len(found) == 1:
        return found[0], found[0], found[0]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return low, middle, high


def render(report: Mapping[str, Any]) -> str:
    """Returns the tables."""
    lines = ["# What objectives cost"]
    for group, found in report.items():
        lines += ["", f"## {group}: {GROUPS[group][0]}", "", f"    {found['command']}", ""]
        lines += [f"{name}: {value}  " for name, value in found["machine"].items()]
        lines += ["", "| objective | products, GFLOP | memory, MB | seconds a step | times the supervised step | products' ratio |"]
        lines += ["|---|---:|---:|---:|---:|---:|", *_rows(found["rows"])]
        lines += ["", f"Medians over {found['rounds']} rounds, one step of each objective a round; beside a ratio its quartiles."]
    return "\n".join([*lines, ""])


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        low, middle, high = ratios(row, rows[0])
        cells = [f"`{row['objective']}`", f"{row['operations'] / 1e9:.0f}", f"{row['bytes'] / 1e6:.0f}"]
        cells += [f"{statistics.median(row['seconds']):.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        cells.append(f"{row['operations'] / rows[0]['operations']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=12, help="steps of each objective")
    parser.add_argument("--only", default="", help="objectives that have this text, beside the supervised step")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
