"""A folder of 4-bit weights as transformers and bitsandbytes save it: read without quantizing anew, and written.

Beside the codes of a weight, `X.weight`, lie its scales and a JSON text of the rest, in tensors whose names go on from it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.errors import UserError
from jaxft.hub.checkpoint import FLOATS, QUANTIZATION, SafetensorsFolder
from jaxft.hub.names import Entry, listed
from jaxft.hub.sources import Source
from jaxft.models.node import is_quantized
from jaxft.quant import codes
from jaxft.quant.blockwise import BLOCK_SIZES, NESTED_BLOCK, Format, QuantizedKernel, from_bitsandbytes, to_bitsandbytes

BYTES = "U8"  # safetensors' name of the type of codes
STATE = ".quant_state.bitsandbytes__"  # with the code's name behind it
_DTYPES = ("float32", "bfloat16", "float16")  # that a weight has where it is dense


class BitsandbytesFolder:
    """A folder whose linear layers bitsandbytes holds in 4 bits, as a `Checkpoint`: a quantized weight is one tensor of its dense shape."""

    def __init__(self, source: Source) -> None:
        """Reads the configuration, every file's header, and each weight's state; raises `UserError` for what is missing or broken."""
        self._folder, self._name = SafetensorsFolder(source, (*FLOATS, BYTES)), source.name
        self.config = {name: value for name, value in self._folder.config.items() if name != QUANTIZATION}
        stored = dict(self._folder.shapes)
        self._states: dict[str, dict[str, Any]] = {}
        for key in [key for key in stored if STATE in key]:
            self._states[key.partition(STATE)[0]] = self._state(key, stored)
        self.formats = {name: state["format"] for name, state in self._states.items()}
        if lost := sorted(
            name for name in stored if name.rpartition(".")[2] in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        ):
            raise self._broken(f"it lacks the quant_state of {listed(lost)}")
        self.shapes = stored | {name: state["shape"] for name, state in self._states.items()}

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor that isn't quantized."""
        array = self._folder.read(name)
        if array.dtype == np.uint8:
            raise self._broken(f"'{name}' holds bytes, and no quant_state says what they are")
        return array

    def read_quantized(self, name: str) -> QuantizedKernel:
        """Returns a weight as a kernel, its codes as they are."""
        state = self._states[name]
        format: Format = state["format"]
        self._check_book(f"{name}.quant_map", codes.BOOKS[format.code])
        nested = None
        if format.double_quantization:
            self._check_book(f"{name}.nested_quant_map", codes.INT8)
            nested = self._read(f"{name}.nested_absmax", np.float32)
        packed = self._read(name, np.uint8)
        absmax = self._read(f"{name}.absmax", np.uint8 if format.double_quantization else np.float32)
        return from_bitsandbytes(state | {"packed": packed, "absmax": absmax, "nested_absmax": nested})

    def _state(self, key: str, stored: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """What a weight's JSON says; its parts are taken out of `stored`, and checked against it."""
        weight, _, code = key.partition(STATE)
        stored.pop(key)
        try:
            found = json.loads(self._folder.read(key).tobytes().decode("utf-8"))
            state = _parsed(found, code)
        except (ValueError, TypeError, KeyError) as error:  # of json, of unicode, and of what is missing or of another type
            raise self._broken(f"'{key}' isn't what bitsandbytes writes ({error})") from error
        format: Format = state["format"]
        values = math.prod(state["shape"])
        blocks = -(-values // format.block_size)
        shapes: dict[str, tuple[int, ...]] = {"": (-(-values // 2), 1), ".absmax": (blocks,), ".quant_map": (len(codes.BOOKS[code]),)}
        if format.double_quantization:
            shapes |= {".nested_absmax": (-(-blocks // NESTED_BLOCK),), ".nested_quant_map": (len(codes.INT8),)}
        have = {suffix: stored.pop(weight + suffix, None) for suffix in shapes}
        if missing := [weight + suffix for suffix, shape in have.items() if shape is None]:
            raise self._broken(f"it lacks {listed(missing)}")
        if wrong := [f"{weight + suffix} {have[suffix]} for {shape}" for suffix, shape in shapes.items() if have[suffix] != shape]:
            raise self._broken(f"shapes aren't those of the quant_state: {listed(wrong)}")
        return state

    def _read(self, name: str, dtype: Any) -> np.ndarray:
        array = self._folder.read(name)
        if array.dtype != dtype:
            raise self._broken(f"'{name}' is {array.dtype}; it has to be {np.dtype(dtype).name}")
        return array

    def _check_book(self, name: str, book: np.ndarray) -> None:
        if not np.array_equal(self._read(name, np.float32), book):
            raise self._broken(f"'{name}' is another code book than bitsandbytes'")

    def _broken(self, what: str) -> UserError:
        return UserError(f"'{self._name}' holds no 4-bit weights as bitsandbytes saves them: {what}. Download or export the model again.")


def _parsed(state: Mapping[str, Any], code: str) -> dict[str, Any]:
    """The JSON of a weight; raises `ValueError` for what jaxft doesn't know, `KeyError` for what is missing."""
    known = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
    if unknown := sorted(set(state) - known):
        raise ValueError(f"a key that jaxft doesn't know, '{unknown[0]}'")
    double = "nested_offset" in state
    given = {"quant_type": (state["quant_type"], (code,)), "blocksize": (state["blocksize"], BLOCK_SIZES)}
    given["dtype"] = (state["dtype"], _DTYPES)
    if double:
        given |= {"nested_blocksize": (state["nested_blocksize"], (NESTED_BLOCK,))}
        given |= {"nested_dtype": (state["nested_dtype"], ("float32",))}
    for name, (value, choices) in given.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, not {' or '.join(map(str, choices))}")
    rows, columns = map(int, state["shape"])
    offset = float(state["nested_offset"]) if double else None
    format = Format(code, state["blocksize"], double)
    return {"format": format, "shape": (rows, columns), "dtype": np.dtype(state["dtype"]), "offset": offset}


def tensors_of(entry: Entry) -> dict[str, np.ndarray]:
    """Returns what a folder holds of one quantized weight: its name, that of the codes, and the names that go on from it."""
    parts = to_bitsandbytes(entry.leaf.value, entry.index)
    format: Format = parts["format"]
    state = {"quant_type": format.code, "blocksize": format.block_size, "dtype": parts["dtype"].name, "shape": list(parts["shape"])}
    held = {"": parts["packed"], ".absmax": parts["absmax"], ".quant_map": codes.BOOKS[format.code]}
    if format.double_quantization:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": parts["offset"]}
        held |= {".nested_absmax": parts["nested_absmax"], ".nested_quant_map": codes.INT8}
    held[f"{STATE}{format.code}"] = np.frombuffer(json.dumps(state).encode("utf-8"), np.uint8)
    return {f"{entry.name}{suffix}": array for suffix, array in held.items()}


def note(found: Sequence[Entry]) -> str:
    """Returns what to know of a folder of such weights before bitsandbytes computes with it on a CPU; empty where it computes rightly.

    Its version 0.50 takes each row of a weight, (out, in), for a whole number of blocks on a Xeon with AVX-512, and not on all other CPUs.
    """
    kernels = [entry for entry in found if is_quantized(entry.leaf.value) and entry.leaf.shape[0] % entry.leaf.value.format.block_size]
    if not kernels:
        return ""
    inputs, block = kernels[0].leaf.shape[0], kernels[0].leaf.value.format.block_size
    fitting = [str(size) for size in BLOCK_SIZES if all(entry.leaf.shape[0] % size == 0 for entry in kernels)]
    remedy = f"Blocks of {' or '.join(fitting)} fill these rows." if fitting else "Leave them out of what is quantized."
    names = listed([entry.name for entry in kernels])
    return (
        f"bitsandbytes can't compute on a CPU that has AVX-512 with {names}: their rows, of {inputs} values in the first, "
        f"aren't whole blocks of {block}, and it stops there, or takes wrong values. jaxft reads them rightly. {remedy}"
    )
