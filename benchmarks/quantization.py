"""What a number format loses: errors on normal values by code and block size, and the bundled model's perplexity on real text.

    python benchmarks/quantization.py [--reviews N] [--output FOLDER] [--quick]

Errors are those of values drawn from N(0, 1), 1024 x 1024. Perplexity is SmolLM2-135M-Instruct's on the test reviews of
bundled:drug-reviews, each after the beginning-of-text token, cut at 256 tokens, with the linear kernels of all layers in the format and
everything else, computing included, in float32. Its file is in Q4_1 already, blocks of 32: what is lost comes on top of that.
Writes quantization.json, quantization.md and quantization.png.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import machine
import matplotlib
import numpy as np
import optax

import jaxft
from jaxft.data.sources import load_rows
from jaxft.methods.partition import size_in_bytes
from jaxft.models import segments
from jaxft.quant import Format, quantize
from jaxft.quant.blockwise import BLOCK_SIZES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).resolve().parent
MODEL, TEXTS = "bundled:smollm2-135m-instruct", "bundled:drug-reviews:test"
NAMES = {"int8": "int8", "nf4": "NF4", "fp4": "FP4", "int4": "Int4"}
MAX_TOKENS = 256
ROWS, BUCKET = 8, 64  # texts a batch, and the multiple of tokens that it is padded to
QUICK_REVIEWS, QUICK_SIDE, SIDE = 4, 128, 1024


def main() -> None:
    """Measures errors and perplexities and writes the report."""
    options = _options()
    report: dict[str, Any] = {"machine": machine.describe(("jax", "jaxlib", "numpy")), "side": QUICK_SIDE if options.quick else SIDE}
    report["errors"] = [errors(Format(code, block, double), report["side"]) for code, block, double in _formats()]
    report |= perplexities(options.reviews, [Format(code) for code in NAMES])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "quantization.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "quantization.md").write_text(render(report))
    plot(report, options.output / "quantization.png")
    print(render(report))


def _formats() -> Iterator[tuple[str, int, bool]]:
    for code in NAMES:
        for block in BLOCK_SIZES:
            yield code, block, False
        yield code, 64, True


def errors(format: Format, side: int) -> dict[str, Any]:
    """Returns the mean error of one format on normal values, and the bits that a value takes."""
    values = np.random.default_rng(0).standard_normal((side, side)).astype(np.float32)
    kernel = quantize(values, format)
    error = np.abs(kernel.dense() - values)
    return dataclasses.asdict(format) | {
        "bits": 8 * size_in_bytes(kernel) / values.size,
        "absolute": float(error.mean()),
        "relative": float((error / np.abs(values)).mean()),
        "root_mean_square": float(np.sqrt(np.square(error).mean())),
    }


def perplexities(reviews: int, formats: list[Format]) -> dict[str, Any]:
    """Returns the perplexity of the model as it is and in each format, and the bytes of its layers' kernels."""
    model, params = jaxft.load_pretrained(MODEL, dtype="float32")
    batches = list(_batches(reviews))

    @jax.jit
    def sums(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens, attention_mask=mask).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
        return jnp.sum(losses * mask[:, 1:])

    def perplexity(params: Any) -> float:
        total = sum(float(sums(params, *batch)) for batch in batches)
        return float(np.exp(total / sum(int(mask[:, 1:].sum()) for _, mask in batches)))

    rows = [{"code": "float32", "perplexity": perplexity(params), "bytes": _kernel_bytes(params)}]
    for format in formats:
        held = segments.map_leaves(lambda leaf, format=format: quantize(leaf.value, format) if _chosen(leaf) else leaf.value, params)
        rows.append(dataclasses.asdict(format) | {"perplexity": perplexity(held), "bytes": _kernel_bytes(held)})
        print(rows[-1], flush=True)
    return {"reviews": reviews, "tokens": sum(int(mask[:, 1:].sum()) for _, mask in batches), "perplexities": rows}


def _chosen(leaf: segments.Leaf) -> bool:
    return leaf.layers is not None and leaf.path[-1] == "kernel"


def _kernel_bytes(params: Any) -> int:
    return sum(size_in_bytes(leaf.value) for leaf in segments.leaves(params) if "kernel" in leaf.path)


def _batches(reviews: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields token ids and masks (rows, length) int32, texts of similar length together."""
    tokenizer = jaxft.load_tokenizer(MODEL)
    texts = load_rows(TEXTS, "test").dataset["text"][:reviews]
    ids = sorted(([tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)][:MAX_TOKENS] for text in texts), key=len)
    for start in range(0, len(ids), ROWS):
        part = ids[start : start + ROWS]
        length = -(-len(part[-1]) // BUCKET) * BUCKET
        tokens, mask = np.zeros((2, ROWS, length), np.int32)
        for row, text in enumerate(part):
            tokens[row, : len(text)], mask[row, : len(text)] = text, 1
        yield tokens, mask


def render(report: dict[str, Any]) -> str:
    """Returns the tables, in Markdown."""
    made = report["machine"]
    whole = report["perplexities"][0]["bytes"]
    lines = [
        f"{made['processor']}, {made['cores']} cores; jax {made['versions']['jax']}.",
        "",
        f"SmolLM2-135M-Instruct on {report['reviews']} reviews, {report['tokens']} tokens; blocks of 64, double quantization:",
        "",
        "| kernels in | perplexity | their bytes, MB | of float32 |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in report["perplexities"]:
        name = NAMES.get(row["code"], row["code"])
        lines.append(f"| {name} | {row['perplexity']:.2f} | {row['bytes'] / 1e6:.1f} | {row['bytes'] / whole:.3f} |")
    lines += ["", f"Errors on N(0, 1), {report['side']} x {report['side']}:", ""]
    lines += [
        "| code | block | scales | bits a value | mean error | relative | root mean square |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in report["errors"]:
        lines.append(
            f"| {NAMES[row['code']]} | {row['block_size']} | {'8-bit' if row['double_quantization'] else 'float32'} | {row['bits']:.3f} | "
            f"{row['absolute']:.4f} | {row['relative']:.4f} | {row['root_mean_square']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws error over bits a value, and the perplexities beside each other."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for code, name in NAMES.items():
        rows = [row for row in report["errors"] if row["code"] == code and not row["double_quantization"]]
        line = left.plot([row["bits"] for row in rows], [row["root_mean_square"] for row in rows], "o-", label=name)[0]
        double = next(row for row in report["errors"] if row["code"] == code and row["double_quantization"])
        left.plot(double["bits"], double["root_mean_square"], "*", color=line.get_color(), markersize=14)
    left.set(
        xlabel="bits a value", ylabel="root mean square error on N(0, 1)", yscale="log", title="Blocks of 32 to 4096; stars: 64, double"
    )
    left.legend()
    names = [NAMES.get(row["code"], row["code"]) for row in report["perplexities"]]
    bars = right.bar(names, [row["perplexity"] for row in report["perplexities"]], color=["gray", "C0", "C1", "C2", "C3"])
    right.bar_label(bars, fmt="%.2f")
    right.set(ylabel="perplexity", title="SmolLM2-135M-Instruct on reviews")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=int, default=100)
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="few texts and small matrices: whether it runs, not what it finds")
    options = parser.parse_args()
    if options.quick:
        options.reviews = QUICK_REVIEWS
    return options


if __name__ == "__main__":
    main()
