"""The ways to look 4-bit codes up, timed one beside the other: alone, and within the product that needs them.

    python benchmarks/dequantize.py [--shapes OUTxIN ...] [--tokens N] [--repeats N] [--output FOLDER]

Each form turns packed NF4 codes (out, in / 2) uint8 and a float32 scale a block of 64 into W (out, in) float32, to the same bits, under
one `jax.jit`. The product is x @ W.T of (tokens, in). Forms are timed in turn, and the least of the repeats counts: other processes
only ever add time. What is fastest on a backend is what `jaxft/quant/blockwise.py` does there. Writes dequantize.json and dequantize.md.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np

from jaxft.quant import Format, codes, quantize
from jaxft.quant.blockwise import weight
from jaxft.quant.fused import fused

HERE = pathlib.Path(__file__).resolve().parent
BLOCK = 64
BOOK = codes.NF4
BYTES = np.arange(256)
PAIRS = np.stack([BOOK[BYTES >> 4], BOOK[BYTES & 15]], axis=1)
FLOOR, DENSE = "write W, nothing looked up", "dense W, nothing dequantized"
FUSED = "one Pallas kernel"  # jaxft/quant/fused.py, on a GPU only: elsewhere it is interpreted


def main() -> None:
    """Times every form for every shape and writes the report."""
    options = _options()
    rows = [row for shape in options.shapes for row in measure(shape, options.tokens, options.repeats)]
    report = {
        "machine": machine.describe(("jax", "jaxlib", "numpy")) | {"device": str(jax.devices()[0].device_kind)},
        "tokens": options.tokens,
        "repeats": options.repeats,
        "rows": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "dequantize.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "dequantize.md").write_text(render(report))
    print(render(report))


def measure(shape: tuple[int, int], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Returns a row a form: the least seconds of W alone and of x @ W.T."""
    random = np.random.default_rng(0)
    kernel = quantize(jnp.asarray(random.normal(size=shape[::-1]), jnp.float32), Format("nf4", BLOCK, double_quantization=False))
    x = jnp.asarray(random.normal(size=(tokens, shape[1])), jnp.float32)
    expected = weight(kernel, jnp.float32)
    calls: dict[tuple[str, str], tuple[Callable[..., jax.Array], tuple[Any, ...]]] = {}
    for name, form in FORMS.items():
        np.testing.assert_array_equal(jax.jit(form)(kernel.codes, kernel.scales), expected)
        calls[name, "seconds"] = jax.jit(form), (kernel.codes, kernel.scales)
        calls[name, "product_seconds"] = jax.jit(lambda x, c, s, form=form: x @ form(c, s).mT), (x, kernel.codes, kernel.scales)
    calls[FLOOR, "seconds"] = jax.jit(lambda scales: jnp.repeat(scales, BLOCK, axis=1) * 2), (kernel.scales,)
    if jax.default_backend() == "gpu":
        calls[FUSED, "product_seconds"] = jax.jit(lambda x, kernel: fused(x, kernel)), (x, kernel)
    calls[DENSE, "product_seconds"] = jax.jit(lambda x, w: x @ w.mT), (x, expected)
    for function, arguments in calls.values():
        jax.block_until_ready(function(*arguments))
    best: dict[tuple[str, str], float] = {}
    for _ in range(repeats):
        for key, (function, arguments) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            best[key] = min(best.get(key, np.inf), time.perf_counter() - start)
    return [
        {"shape": shape, "form": name, "seconds": best.get((name, "seconds")), "product_seconds": best.get((name, "product_seconds"))}
        for name in dict.fromkeys(name for name, _ in calls)
    ]


def _scaled(values: jax.Array, scales: jax.Array) -> jax.Array:
    return (values.reshape(*scales.shape, BLOCK) * scales[..., None]).reshape(values.shape[0], -1)


def _nibbles(packed: jax.Array) -> jax.Array:
    return jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(packed.shape[0], -1)


def gather_16(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """A gather from sixteen values for each code."""
    return _scaled(jnp.asarray(BOOK)[_nibbles(packed)], scales)


def gather_16_unchecked(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """The same, without the bounds that a code can't leave."""
    return _scaled(jnp.asarray(BOOK).at[_nibbles(packed)].get(mode="promise_in_bounds"), scales)


def gather_pairs(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """A gather from 256 pairs of values for each byte."""
    return _scaled(jnp.asarray(PAIRS)[packed].reshape(packed.shape[0], -1), scales)


def gather_pairs_unchecked(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """The same, without bounds."""
    return _scaled(jnp.asarray(PAIRS).at[packed].get(mode="promise_in_bounds").reshape(packed.shape[0], -1), scales)


def selects(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """Fifteen selects in a row."""
    nibbles = _nibbles(packed)
    values = jnp.full(nibbles.shape, BOOK[0])
    for code in range(1, 16):
        values = jnp.where(nibbles == code, BOOK[code], values)
    return _scaled(values, scales)


def select_tree(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """Fifteen selects in a tree, a bit of the code a level."""
    nibbles = _nibbles(packed)
    values = [jnp.float32(value) for value in BOOK]
    for bit in range(4):
        odd = ((nibbles >> bit) & 1) != 0
        values = [jnp.where(odd, right, left) for left, right in zip(values[0::2], values[1::2], strict=True)]
    return _scaled(values[0], scales)


def one_hot(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """A product of one-hot codes with the book."""
    return _scaled(jax.nn.one_hot(_nibbles(packed), 16, dtype=jnp.float32) @ jnp.asarray(BOOK), scales)


def arithmetic(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """A sum of fifteen masked bit patterns, no table and no select."""
    nibbles = _nibbles(packed).astype(jnp.int32)
    bits = jnp.zeros(nibbles.shape, jnp.int32)
    for code, pattern in enumerate(BOOK.view(np.int32)):
        bits = bits | jnp.where(nibbles == code, jnp.int32(-1), jnp.int32(0)) & pattern
    return _scaled(jax.lax.bitcast_convert_type(bits, jnp.float32), scales)


FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    form.__name__: form
    for form in (gather_16, gather_16_unchecked, gather_pairs, gather_pairs_unchecked, selects, select_tree, one_hot, arithmetic)
}


def render(report: dict[str, Any]) -> str:
    """Returns the tables, in Markdown."""
    made = report["machine"]
    lines = [
        f"{made['processor']}, {made['cores']} cores, on {made['device']}; jax {made['versions']['jax']}. The least of "
        f"{report['repeats']} runs in turn, in milliseconds; the product is of {report['tokens']} tokens. Load average at the end: "
        f"{made['load_average'][0]:.1f}.",
    ]
    for shape in dict.fromkeys(tuple(row["shape"]) for row in report["rows"]):
        lines += ["", f"W of {shape[0]} x {shape[1]}:", "", "| form | W alone | with the product |", "| --- | ---: | ---: |"]
        for row in report["rows"]:
            if tuple(row["shape"]) == shape:
                lines.append(
                    f"| {row['form'].replace('_', ' ')} | {_milliseconds(row['seconds'])} | {_milliseconds(row['product_seconds'])} |"
                )
    return "\n".join(lines) + "\n"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(1536, 576), (576, 1536), (2048, 2048)], metavar="OUTxIN")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results")
    return parser.parse_args()


def _shape(text: str) -> tuple[int, int]:
    outputs, inputs = map(int, text.split("x"))
    return outputs, inputs


if __name__ == "__main__":
    main()
