"""QLoRA beside LoRA, and beside PEFT on bitsandbytes' 4-bit kernels, on one fine-tuning job: speed and memory.

    python benchmarks/qlora.py [--steps N] [--output FOLDER] [--quick]

The job is that of qlora_llama2: the bundled model and reviews, its kernels in double-quantized NF4. PEFT's side holds the very same
codes and starts from the same adapter, takes exactly the same examples in each step, and computes in float32 as jaxft does. Each side is
a process of its own, one after the other; nothing else should run on the machine. Compilation and the first step are excluded, and given
beside the rest. Needs jaxft's extra `benchmark`. Writes qlora.json and qlora.md.
"""

import argparse
import json
import tempfile
from typing import Any

import machine
import methods
import sft
import sft_job

PACKAGES = ("jax", "jaxlib", "flax", "optax", "bitsandbytes", "peft", "transformers", "torch", "numpy")
LORA, QLORA, PEFT = "jaxft, LoRA", "jaxft, QLoRA", "PEFT and bitsandbytes, QLoRA"


def main() -> None:
    """Runs the three sides and writes the report."""
    options = sft.parsed(argparse.ArgumentParser(description=__doc__.splitlines()[0]), 5, "qlora.json and qlora.md")
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine.describe(PACKAGES), "steps": options.steps, "sides": measure(options)}
    text = render(report)
    print(text)
    (options.output / "qlora.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "qlora.md").write_text(text + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what each side measured."""
    with tempfile.TemporaryDirectory() as folder:
        source = sft_job.TINY if options.quick else sft_job.BUNDLED
        lora, qlora = (sft_job.Job(source, folder, options.steps, recipe=f"{name}_llama2") for name in ("lora", "qlora"))
        sft.side("sft_job.py", qlora, folder)
        sides = {LORA: sft.side("train_jaxft.py", lora, folder), QLORA: sft.side("train_jaxft.py", qlora, folder)}
        sft.side("qlora_write.py", qlora, folder)
        sides[PEFT] = sft.side("qlora_torch.py", qlora, folder)
    if len({tuple(side["tokens"]) for side in sides.values()}) != 1:
        raise RuntimeError("The sides didn't train on the same tokens.")
    return sides


COLUMNS = (
    "side",
    "frozen kernels and all, MB",
    "step, s",
    "of LoRA's step",
    "tokens/s",
    "of PEFT's",
    "peak, GB",
    "step's memory by XLA, GB",
)


def render(report: dict[str, Any]) -> str:
    """Returns the report as Markdown."""
    about, sides = report["machine"], report["sides"]
    rows = [_row(name, sides) for name in sides]
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *rows]
    losses = methods.loss_difference(QLORA, {"jaxft": sides[QLORA], "reference": sides[PEFT]})
    return "\n\n".join(
        (
            f"{about['processor']}, {about['cores']} cores; Python {about['python']}; "
            + ", ".join(f"{package} {version}" for package, version in about["versions"].items())
            + f". Float32, {report['steps'] - 1} steps timed. Load average at the start: {about['load_average'][0]:.1f}.",
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
            f"The losses of jaxft and PEFT on the same 4-bit kernels differ by at most {losses:.0e} of their value.",
        )
    )


def _row(name: str, sides: dict[str, Any]) -> tuple[str, ...]:
    own = sides[name]
    memory = own.get("memory_analysis", {})
    taken = memory.get("argument_size_in_bytes", 0) + memory.get("temp_size_in_bytes", 0)
    return (
        name,
        f"{own['frozen_bytes'] / 1e6:.0f}" if "frozen_bytes" in own else "",
        f"{methods.step(own):.2f}",
        f"{methods.step(own) / methods.step(sides[LORA]):.2f}",
        f"{methods.rate(own):.0f}",
        f"{methods.rate(own) / methods.rate(sides[PEFT]):.2f}",
        f"{own['peak_memory_bytes'] / 1e9:.2f}",
        f"{taken / 1e9:.2f}" if taken else "",
    )


if __name__ == "__main__":
    main()
