"""The floor under a LoRA step: every product that it can't do without, timed alone at the step's shapes; and where the step's time goes.

What a remat policy computes again is no part of the floor, nor is anything but products.
"""

import collections
import dataclasses
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.attention import QUERY_BLOCK

_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Product:
    """A kind of product of the step, (batch, m, k) x (batch, k, n), and how often it stands in one step."""

    kind: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    contract: tuple[tuple[int, ...], tuple[int, ...]]  # axes of left and right, as lax.dot_general names them
    batched: int = 0  # leading axes that both share
    count: int = 1

    @property
    def operations(self) -> int:
        """Multiplications and additions of one."""
        free = [size for axis, size in enumerate(self.right) if axis >= self.batched and axis not in self.contract[1]]
        return 2 * int(np.prod(self.left)) * int(np.prod(free))


def floor(config: Any, batch: Mapping[str, jax.Array], rank: int) -> dict[str, Any]:
    """Returns the seconds of each kind of product in one step, their sum, and the rate of each.

    Args:
      config: the model's `LlamaConfig`.
      batch: one step's batch, (1, rows, length) tokens and (1, rows, slots) scored.
      rank: of the LoRA on every linear layer.
    """
    _, rows, length = batch["tokens"].shape
    products = [
        *linear_products(config, rows * length, rank),
        *attention_products(config, rows, length),
        *head_products(config, batch["scored"].size),
    ]
    seconds: dict[Any, float] = {}
    kinds: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"seconds": 0.0, "operations": 0})
    for product in products:
        shape = dataclasses.replace(product, kind="", count=1)
        if shape not in seconds:
            seconds[shape] = measure(product)
        kinds[product.kind]["seconds"] += seconds[shape] * product.count
        kinds[product.kind]["operations"] += product.operations * product.count
    for entry in kinds.values():
        entry["gflops"] = entry["operations"] / entry["seconds"] / 1e9
    return {"seconds": sum(entry["seconds"] for entry in kinds.values()), "kinds": dict(kinds)}


def linear_products(config: Any, tokens: int, rank: int) -> list[Product]:
    """The linear layers: forward, and the input's gradient; LoRA's: two forward, two for the input's gradient, two for its own."""
    hidden, wide = config.hidden_size, config.intermediate_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(hidden, query), (hidden, key_value), (hidden, key_value), (query, hidden), (hidden, wide), (hidden, wide), (wide, hidden)]
    depth, found = config.num_hidden_layers, []
    for rows, columns in shapes:
        found += [
            Product("linear forward", (tokens, rows), (rows, columns), ((1,), (0,)), count=depth),
            Product("linear backward", (tokens, columns), (rows, columns), ((1,), (1,)), count=depth),
            Product("LoRA forward", (tokens, rows), (rows, rank), ((1,), (0,)), count=depth),
            Product("LoRA forward", (tokens, rank), (rank, columns), ((1,), (0,)), count=depth),
            Product("LoRA backward", (tokens, columns), (rank, columns), ((1,), (1,)), count=depth),
            Product("LoRA backward", (tokens, rank), (rows, rank), ((1,), (1,)), count=depth),
            Product("LoRA backward", (tokens, rank), (tokens, columns), ((0,), (0,)), count=depth),
            Product("LoRA backward", (tokens, rows), (tokens, rank), ((0,), (0,)), count=depth),
        ]
    return found


def attention_products(config: Any, rows: int, length: int) -> list[Product]:
    """Scores and weighted values of each block of queries, with the keys up to its last one; and their gradients, twice as many."""
    groups, head_dim, depth = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    heads, found = config.num_attention_heads // groups, []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        queries, keys = (rows, groups, heads * (end - start), head_dim), (rows, groups, end, head_dim)
        scores = (*queries[:3], end)
        to_scores = {"left": queries, "right": keys, "contract": ((3,), (3,)), "batched": 2, "count": depth}
        to_queries = {"left": scores, "right": keys, "contract": ((3,), (2,)), "batched": 2, "count": depth}
        to_keys = {"left": scores, "right": queries, "contract": ((2,), (2,)), "batched": 2, "count": 2 * depth}
        found += [Product("attention forward", **to_scores), Product("attention forward", **to_queries)]
        found += [Product("attention backward", **part) for part in (to_scores, to_queries, to_keys)]
    return found


def head_products(config: Any, scored: int) -> list[Product]:
    """The output head at the scored positions, and its input's gradient."""
    hidden, words = config.hidden_size, config.vocab_size
    return [
        Product("head forward", (scored, hidden), (words, hidden), ((1,), (1,))),
        Product("head backward", (scored, words), (words, hidden), ((1,), (0,))),
    ]


def measure(product: Product) -> float:
    """Returns the median seconds of one product, alone, compiled."""
    shared = tuple(range(product.batched))
    multiply = jax.jit(lambda left, right: jax.lax.dot_general(left, right, (product.contract, (shared, shared))))
    left, right = (jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate((product.left, product.right)))
    multiply(left, right).block_until_ready()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        multiply(left, right).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


# ---------------------------------------------------------------- where the step's time goes

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = .*?[})\]] (?P<code>[a-z][\w-]*)\(")
_OPERATION = re.compile(r'op_name="([^"]*)"')
_OUTER = ("while", "call", "conditional")  # hold other instructions: their time is counted there
_SITES = ("attention", "mlp", "norm", "logits")
_WHAT = {"dot_general": "products", "dynamic_slice": "slices", "dynamic_update_slice": "slices", "slice": "slices"}


def profile(compiled: Any, state: Any, frozen: Any, batch: Any) -> dict[str, float]:
    """Returns the seconds of one step by kind of XLA operation, from the profiler; the state is used up.

    Times are those of the operations as the executor ran them: where two ran side by side, they add up to more than the step.
    """
    kinds = _kinds(compiled.as_text())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(compiled(state, frozen, batch))
        found = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
    seconds: dict[str, float] = collections.defaultdict(float)
    for plane in found.planes:
        for line in plane.lines:
            for event in line.events:
                kind = kinds.get(event.name)
                if kind is not None:
                    seconds[kind] += event.duration_ns * 1e-9
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _kinds(text: str) -> dict[str, str]:
    """Returns what each instruction belongs to: pass, site and kind of operation, as far as its metadata tell."""
    kinds = {}
    for line in text.splitlines():
        if (match := _INSTRUCTION.match(line)) and match["code"] not in _OUTER:
            named = _OPERATION.search(line)
            operation = named[1] if named else ""
            part = "backward" if "transpose(" in operation else "forward" if "jvp(" in operation else "update"
            site = next((site for site in _SITES if site in operation), "other")
            what = _WHAT.get(operation.rpartition("/")[2], "elementwise")
            kinds[match["name"]] = f"{part}, {site}: {what if operation else match['code']}"
    return kinds
