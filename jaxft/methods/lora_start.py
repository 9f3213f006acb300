"""What a LoRA starts from: random, a part of the kernel itself, which is taken out of the base, or what a quantized base has lost."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import UserError, nearest
from jaxft.models.node import Quantized

DEFAULT, GAUSSIAN, PISSA, OLORA, LOFTQ = "default", "gaussian", "pissa", "olora", "loftq"
NAMES = (DEFAULT, GAUSSIAN, PISSA, "pissa_niter_4", OLORA, LOFTQ, "loftq_niter_5")  # any number of iterations in place of 4 and 5
_ITERATIONS = re.compile(rf"{PISSA}_niter_(\d+)")
_LOFTQ = re.compile(rf"{LOFTQ}(?:_niter_([1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class Start:
    """lora_a (in, rank) and lora_b (rank, out) float32 of one kernel."""

    lora_a: jax.Array
    lora_b: jax.Array


def check(name: str) -> None:
    """Raises `UserError` for a start that there isn't."""
    if name not in NAMES and _ITERATIONS.fullmatch(name) is None and _LOFTQ.fullmatch(name) is None:
        raise UserError(f"method.start: there is no '{name}'.{nearest(name, NAMES)} There are: {', '.join(NAMES)}.")


def changes_base(name: str) -> bool:
    """Returns whether scale * lora_a @ lora_b of this start is taken out of the base.

    >>> changes_base("pissa_niter_4"), changes_base("gaussian")
    (True, False)
    """
    return name not in (DEFAULT, GAUSSIAN) and not loftq_iterations(name)


def decomposes(name: str) -> bool:
    """Returns whether this start is found from the kernel itself, which has to have the rank."""
    return name not in (DEFAULT, GAUSSIAN)


def loftq_iterations(name: str) -> int:
    """Returns how often LoftQ alternates, 0 for another start.

    >>> loftq_iterations("loftq"), loftq_iterations("loftq_niter_5"), loftq_iterations("pissa")
    (1, 5, 0)
    """
    found = _LOFTQ.fullmatch(name)
    return 0 if found is None else int(found[1] or 1)


def linear(name: str, rng: jax.Array, shape: tuple[int, ...], rank: int) -> Start:
    """Returns a start that leaves a kernel (in, out) as it is: lora_b is zero.

    default: lora_a is uniform in +-1/sqrt(in), as peft's; gaussian: normal with deviation 1/rank.
    """
    rows, columns = shape
    bound = rows**-0.5
    if name == GAUSSIAN:
        lora_a = jax.random.normal(rng, (rows, rank), jnp.float32) / rank
    else:
        lora_a = jax.random.uniform(rng, (rows, rank), jnp.float32, -bound, bound)
    return Start(lora_a, jnp.zeros((rank, columns), jnp.float32))


def embedding(rng: jax.Array, shape: tuple[int, ...], rank: int) -> Start:
    """Returns the start of a table (vocabulary, features): lora_a is zero, lora_b is standard normal, as peft's."""
    rows, columns = shape
    return Start(jnp.zeros((rows, rank), jnp.float32), jax.random.normal(rng, (rank, columns), jnp.float32))


def from_kernel(name: str, rng: jax.Array, kernel: jax.Array, rank: int, scale: float) -> Start:
    """Returns the start whose scale * lora_a @ lora_b is a part of `kernel` (in, out) float32.

    pissa: the largest singular values and their vectors, by a whole SVD or, pissa_niter_N, by N steps of a randomized one (Meng et al.
    2024, arXiv:2404.02948); olora: the first columns of a QR (Büyükakyüz 2024, arXiv:2406.01775), whose product is scaled as it stands.
    """
    if name == OLORA:
        q, r = jnp.linalg.qr(kernel.T)
        return Start(r[:rank].T, q[:, :rank].T)
    found = _ITERATIONS.fullmatch(name)
    u, values, v = _largest(kernel, rank) if found is None else _largest_randomized(rng, kernel, rank, int(found[1]))
    root = jnp.sqrt(values / scale)
    return Start(u * root, root[:, None] * v)


def loftq(name: str, kernel: jax.Array, quantized: Quantized, rank: int, scale: float) -> tuple[Start, Quantized]:
    """Returns the start that makes up for what quantization lost of `kernel` (in, out) float32, and the base that goes with it.

    LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1): the rest of the kernel is quantized, and the error's largest singular values
    and their vectors are the LoRA, in turn. The first turn's quantized kernel is the one given: with one turn the base stays as it is.
    """
    product = jnp.zeros_like(kernel)
    for turn in range(loftq_iterations(name)):
        if turn:
            quantized = quantized.requantized(kernel - product)
        u, values, v = _largest(kernel - quantized.dense(), rank)
        root = jnp.sqrt(values / scale)
        start = Start(u * root, root[:, None] * v)
        product = scale * jnp.matmul(start.lora_a, start.lora_b, precision="highest")
    return start, quantized


def _largest(kernel: jax.Array, rank: int) -> tuple[Any, Any, Any]:
    u, values, v = jnp.linalg.svd(kernel, full_matrices=False)
    return u[:, :rank], values[:rank], v[:rank]


def _largest_randomized(rng: jax.Array, kernel: jax.Array, rank: int, iterations: int) -> tuple[Any, Any, Any]:
    """Subspace iteration (Halko et al. 2009, arXiv:0909.4061, algorithms 4.4 and 5.1), as torch.svd_lowrank."""
    high = jax.lax.Precision.HIGHEST
    rows = jnp.matmul(kernel, jax.random.normal(rng, (kernel.shape[1], rank), jnp.float32), precision=high)
    basis = jnp.linalg.qr(rows)[0]
    for _ in range(iterations):
        other = jnp.linalg.qr(jnp.matmul(kernel.T, basis, precision=high))[0]
        basis = jnp.linalg.qr(jnp.matmul(kernel, other, precision=high))[0]
    u, values, v = jnp.linalg.svd(jnp.matmul(basis.T, kernel, precision=high), full_matrices=False)
    return jnp.matmul(basis, u, precision=high), values, v
