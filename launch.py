"""Flags -> experiment -> mode.

python launch.py --experiment=NAME[:VARIANT] [--mode=MODE] [--workdir=DIR] [--config.PATH=VALUE ...]
python launch.py --list
"""

import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

import experiments
from jaxft.errors import UserError, given_path, unknown

# Each mode, and the flags that belong to it alone.
MODES = {
    "train": (),
    "eval": (),
    "generate": ("prompt", "prompts", "output"),
    "export": ("format", "output"),
    "inspect": (),
    "plan": ("plan.device", "plan.count", "plan.mesh", "plan.price", "plan.full_rows"),
    "sweep": (
        *("sweep.limit", "sweep.filter", "sweep.executor", "sweep.workers"),
        *("sweep.partition", "sweep.account", "sweep.time", "sweep.gpus", "sweep.cpus", "sweep.memory", "sweep.slurm"),
    ),
}

FLAGS = flags.FlagValues()
FLAGS.set_gnu_getopt(True)
flags.DEFINE_string("experiment", None, "NAME or NAME:VARIANT of an experiment.", flag_values=FLAGS)
flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "The run's folder. Default: runs/NAME, or runs/NAME-VARIANT.", flag_values=FLAGS)
flags.DEFINE_string("prompt", None, "generate: one prompt.", flag_values=FLAGS)
flags.DEFINE_string("prompts", None, "generate: a file of prompts, one {'prompt': ...} or row of the data a line.", flag_values=FLAGS)
flags.DEFINE_string(
    "format",
    None,
    "export: peft, adapterhub (the adapter), hf (merged), bitsandbytes (merged, 4 bits); default: the method's.",
    flag_values=FLAGS,
)
flags.DEFINE_string("output", None, "generate: the file for the answers. export: the folder.", flag_values=FLAGS)
flags.DEFINE_list("plan.device", [], "plan: devices by name, as h100,a100-40g,rtx4090,v5e; default: this machine's.", flag_values=FLAGS)
flags.DEFINE_integer("plan.count", 0, "plan: how many of them; default: as many as the mesh takes.", flag_values=FLAGS)
flags.DEFINE_string("plan.mesh", "", "plan: their mesh, as data:1,fsdp:8,tensor:1; default: the configuration's.", flag_values=FLAGS)
flags.DEFINE_float("plan.price", 0.0, "plan: US dollars that one costs an hour; default: a public price.", flag_values=FLAGS)
flags.DEFINE_boolean("plan.full_rows", False, "plan: take full rows in the place of the data's, without a tokenizer.", flag_values=FLAGS)
flags.DEFINE_integer("sweep.limit", 0, "sweep: the first so many runs alone; 0 is all.", flag_values=FLAGS)
flags.DEFINE_string("sweep.filter", "", "sweep: the runs alone whose ID matches this regular expression.", flag_values=FLAGS)
flags.DEFINE_string("sweep.executor", "local", "sweep: local, processes of this machine; slurm, jobs of Slurm.", flag_values=FLAGS)
flags.DEFINE_integer("sweep.workers", 1, "sweep: runs at a time.", flag_values=FLAGS)
flags.DEFINE_string("sweep.partition", "", "sweep, Slurm: the partition of a worker's job.", flag_values=FLAGS)
flags.DEFINE_string("sweep.account", "", "sweep, Slurm: the account of a worker's job.", flag_values=FLAGS)
flags.DEFINE_integer("sweep.time", 0, "sweep, Slurm: minutes that a worker's job may take; 0 is a day.", flag_values=FLAGS)
flags.DEFINE_integer("sweep.gpus", 0, "sweep, Slurm: GPUs a worker.", flag_values=FLAGS)
flags.DEFINE_integer("sweep.cpus", 0, "sweep, Slurm: CPU cores a worker.", flag_values=FLAGS)
flags.DEFINE_integer("sweep.memory", 0, "sweep, Slurm: gigabytes of memory a worker.", flag_values=FLAGS)
flags.DEFINE_list("sweep.slurm", [], "sweep, Slurm: other options of sbatch, as qos=high,constraint=a100.", flag_values=FLAGS)
flags.DEFINE_boolean("list", False, "List the experiments.", flag_values=FLAGS)
flags.DEFINE_boolean("help", False, "Show this.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    """Runs one mode of one experiment."""
    overrides = parse(argv)
    if FLAGS.help:
        print(f"{__doc__}\n{FLAGS.get_help()}\n\nThe fields of --config.PATH are in docs/configuration.md.")
    elif FLAGS.list:
        for found in map(experiments.entry, experiments.names()):
            variants = f" [variants: {', '.join(found.variants)}]" if found.variants else ""
            print(f"{found.name}: {found.summary}{variants}")
    else:
        run(overrides)


def parse(argv: Sequence[str]) -> list[str]:
    """Fills `FLAGS`; returns the arguments that are left, those of `--config`."""
    for name in FLAGS:  # nothing is left of an earlier call in this process
        FLAGS[name].unparse()
    try:
        rest = FLAGS(argv, known_only=True)[1:]
    except flags.Error as error:
        raise UserError(str(error)) from error
    for argument in rest:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.removeprefix("no").partition(".")[0] != "config":
            raise unknown("flag", f"--{name}", [*(f"--{known}" for known in FLAGS), "--config.PATH"])
    if FLAGS.mode not in MODES:
        raise unknown("mode", FLAGS.mode, MODES)
    for name in sorted({name for own in MODES.values() for name in own}):
        if FLAGS[name].present and name not in MODES[FLAGS.mode]:
            raise UserError(f"--{name} belongs to --mode={' or '.join(mode for mode, own in MODES.items() if name in own)}.")
    return rest


def run(arguments: Sequence[str]) -> None:
    """Runs `FLAGS.mode`."""
    if not FLAGS.experiment:
        raise UserError(f"Give --experiment=NAME[:VARIANT]. Known: {', '.join(experiments.names())}.")
    if FLAGS.mode == "generate" and (FLAGS.prompt is None) == (FLAGS.prompts is None):
        raise UserError("--mode=generate takes --prompt=TEXT or --prompts=FILE.jsonl, one of them.")
    name, _, variant = FLAGS.experiment.partition(":")
    found = experiments.load(name, variant)

    from jaxft import overrides

    workdir = given_path(FLAGS.workdir or f"runs/{FLAGS.experiment.replace(':', '-')}")
    output = given_path(FLAGS.output) if FLAGS.output else None
    given = overrides.parse_flags(found, arguments)
    if FLAGS.mode == "sweep":
        from jaxft.sweep import sweep as sweeps

        options: dict[str, Any] = {name.partition(".")[2]: FLAGS[name].value for name in MODES["sweep"]}
        sweeps.sweep(given, experiments.load_sweep(name, variant), workdir, sweeps.Options(**options), overrides.given_paths(arguments))
        return

    from jaxft.train import run as modes  # transformers, datasets and orbax: seconds, once everything given is known to be right
    from jaxft.train.workdir import saved_experiment

    if FLAGS.mode not in ("train", "plan"):  # what was trained is in its folder; flags change what may change
        given = overrides.parse_flags(saved_experiment(workdir, found.name) or found, arguments)
    found = given

    if FLAGS.mode == "train":
        modes.train(found, workdir)
    elif FLAGS.mode == "plan":
        from jaxft.train.plan import Asked, plan

        given_here: list[Any] = [FLAGS[name].value for name in MODES["plan"]]
        plan(found, Asked(*given_here), workdir, arguments)
    elif FLAGS.mode == "eval":
        modes.evaluate(found, workdir)
    elif FLAGS.mode == "inspect":
        modes.inspect(found, workdir)
    elif FLAGS.mode == "generate":
        modes.generate(found, workdir, prompts(), output)
    else:
        modes.export(found, workdir, FLAGS.format, output)


def prompts() -> list[dict[str, str]]:
    """Returns what `--prompt` or `--prompts` gives, a row each."""
    if FLAGS.prompt is not None:
        try:
            FLAGS.prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"--prompt isn't UTF-8 text: {error.reason} (character {error.start + 1}).") from error
        return [{"prompt": FLAGS.prompt}]

    from jaxft.data.sources import load_rows

    return list(load_rows(FLAGS.prompts, "test").dataset)


class Terminated(BaseException):
    """SIGTERM outside of the training loop, which has a handler of its own."""


def terminate(*_: object) -> None:
    """Ends the program as Ctrl-C does."""
    raise Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    try:
        main(sys.argv)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Terminated):
        print("\nStopped. The same command starts again.", file=sys.stderr)
        sys.exit(1)
