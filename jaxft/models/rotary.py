"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) and the ways of stretching them.

Frequencies follow transformers' `modeling_rope_utils`, which is the reference in the tests.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import UserError, unknown

TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotary settings of a model, under the names that config.json uses."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 0.0  # of the positions; 0 for yarn: what the two numbers of positions give
    original_max_position_embeddings: int = 0  # positions of pre-training; 0: those of the model
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn

    def __post_init__(self) -> None:
        if self.rope_type not in TYPES:
            raise unknown("rotary type", self.rope_type, TYPES)
        numbers = {"rope_theta": self.rope_theta}
        if self.rope_type != "default" and (self.rope_type, self.factor) != ("yarn", 0.0):
            numbers["factor"] = self.factor
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"{name} of the rotary embedding is a number above 0, not {value!r}.")


def angles(rotary: Rotary, head_dim: int, max_positions: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine for `positions` (batch, length): two (batch, length, 1, head_dim / 2) float32 arrays."""
    original = rotary.original_max_position_embeddings or max_positions
    scale = 1.0
    if rotary.rope_type == "dynamic":
        frequencies = _dynamic(rotary, head_dim, max_positions, positions)
    else:
        plain = plain_frequencies(rotary.rope_theta, head_dim)
        if rotary.rope_type == "linear":
            plain = plain / rotary.factor
        elif rotary.rope_type == "llama3":
            plain = llama3_frequencies(rotary, plain, original)
        elif rotary.rope_type == "yarn":
            plain, scale = _yarn(rotary, plain, head_dim, original, max_positions)
        frequencies = jnp.asarray(plain, jnp.float32)
    angle = positions[:, :, None].astype(jnp.float32) * frequencies
    return (jnp.cos(angle) * scale)[:, :, None], (jnp.sin(angle) * scale)[:, :, None]


def rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Returns x (batch, length, heads, head_dim) turned by its position; the first half pairs with the second (the HF layout)."""
    first, second = jnp.split(x, 2, axis=-1)
    cosine, sine = cosine.astype(x.dtype), sine.astype(x.dtype)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """Returns the frequencies of the default type, (head_dim / 2,) float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.power(np.float32(theta), exponent)


def _dynamic(rotary: Rotary, head_dim: int, max_positions: int, positions: jax.Array) -> jax.Array:
    """NTK-aware: the base grows once a sequence is longer than the model's positions."""
    length = jnp.maximum(jnp.max(positions) + 1, max_positions).astype(jnp.float32)
    stretch = (rotary.factor * length / max_positions) - (rotary.factor - 1)
    base = rotary.rope_theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def llama3_frequencies(rotary: Rotary, plain: np.ndarray, original: int) -> np.ndarray:
    """Returns Llama 3.1's frequencies, as `plain`: low ones are divided, high ones stay, those between are blended."""
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    blended = (1 - blend) * plain / rotary.factor + blend * plain
    stretched = np.where(wavelength > original / rotary.low_freq_factor, plain / rotary.factor, blended)
    return np.where(wavelength < original / rotary.high_freq_factor, plain, stretched)


def _yarn(rotary: Rotary, plain: np.ndarray, head_dim: int, original: int, max_positions: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp between stretched and plain frequencies, and a scale on both angles."""
    factor = rotary.factor or max_positions / original

    def scale_of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rotary.attention_factor is not None:
        scale = rotary.attention_factor
    elif rotary.mscale and rotary.mscale_all_dim:
        scale = scale_of(rotary.mscale) / scale_of(rotary.mscale_all_dim)
    else:
        scale = scale_of(1.0)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rotary.rope_theta))

    low, high = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as the reference: no division by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), scale
