"""GGUF: llama.cpp's files, any block type, turned into Hugging Face's names, layout and configuration."""

import pathlib
from typing import Any, Literal

import gguf
import numpy as np

from jaxft.errors import UserError, unknown
from jaxft.hub.checkpoint import complete_config
from jaxft.models import llama
from jaxft.models.heads import CAUSAL_LM
from jaxft.models.registry import architecture_for, described
from jaxft.models.rotary import Rotary, llama3_frequencies, plain_frequencies

ROPE_FACTORS = "rope_freqs.weight"  # (head_dim / 2,): llama.cpp's form of Llama 3's rotary scaling
LLAMA3_POSITIONS = 8192  # of pre-training, for every Llama 3.x; the file doesn't say
_OTHER_ROTARY = {  # settings of a scaling that jaxft doesn't read, and where they change nothing
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
_ROWS = 4096  # rows dequantized at a time: what the arithmetic holds beside the result stays small
_TYPES = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
_PERMUTED = ("llama", "mistral")  # architectures whose q and k rows llama.cpp stores for interleaved rotary pairs
_ATTENTION_BIAS, _MLP_BIAS = "blk.0.attn_output.bias", "blk.0.ffn_down.bias"
_OPTIONAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_SKIPPED = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]


class _Reader(gguf.GGUFReader):
    """Leaves out the words of the vocabulary, which the tokenizer reads for itself: they are nearly all of the time to open a file."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[gguf.GGUFValueType]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item, length = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
        types, start = [gguf.GGUFValueType.ARRAY, item], orig_offs + 12
        if item in self.gguf_scalar_to_np:
            part = self._get(start, self.gguf_scalar_to_np[item], length)
            return start + part.nbytes - orig_offs, [part], [0], types
        if types != _SKIPPED:
            raise ValueError(f"array of {item.name}")
        order: Literal["big", "little"] = "big" if self.byte_order == "S" else "little"
        end, data = start, memoryview(self.data)  # type: ignore[arg-type]  # an array of bytes
        for _ in range(length):
            self._check_within(end, 8)
            end += 8 + int.from_bytes(data[end : end + 8], order)
        self._check_within(end, 0)
        return end - orig_offs, [], [], types

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Literal["I", "S", "<"] | None = None) -> np.ndarray:
        self._check_within(offset, int(count) * np.dtype(dtype).itemsize)
        return super()._get(offset, dtype, count, override_order)

    def _check_within(self, offset: int, length: int) -> None:
        if int(offset) + length > len(self.data):
            raise ValueError(f"expected {length:,} bytes at byte {int(offset):,}, but the file ends after {len(self.data):,}")


def metadata(path: pathlib.Path) -> bytes:
    """Returns the bytes before the tensors: everything but the weights. Raises `UserError` for a broken file."""
    reader = _open(path)
    return reader.data[: reader.data_offset].tobytes()


def _open(path: pathlib.Path) -> _Reader:
    try:
        return _Reader(path)
    except Exception as error:  # the reader checks little: a broken file fails in numpy, anywhere
        raise UserError(f"{path} is no whole GGUF file ({error}). Download it again.") from error


class GGUFFile:
    """A GGUF file as a `Checkpoint`."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the metadata; raises `UserError` for a broken file or one of an architecture that jaxft hasn't."""
        self._path = path
        reader = _open(path)
        self._fields = {name: field.contents() for name, field in reader.fields.items() if field.types != _SKIPPED}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._architecture = str(self._field("general.architecture"))
        if self._architecture not in _TYPES:
            raise unknown("GGUF architecture", self._architecture, _TYPES)
        self.config = self._config()
        self._names = self._hugging_face_names()
        for theirs in self._names.values():
            self._check_type(self._tensors[theirs])
        self.shapes = {name: tuple(int(size) for size in reversed(self._tensors[theirs].shape)) for name, theirs in self._names.items()}

    def _check_type(self, tensor: Any) -> None:
        """Raises `UserError` for numbers in a type that nothing dequantizes."""
        try:
            gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{self._path}: {tensor.name} is stored as {tensor.tensor_type.name}, which jaxft doesn't read.") from error

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, dequantized, float32."""
        tensor = self._tensors[self._names[name]]
        out = np.empty(self.shapes[name], np.float32)
        for start in range(0, len(out), _ROWS):
            out[start : start + _ROWS] = gguf.quants.dequantize(tensor.data[start : start + _ROWS], tensor.tensor_type)
        if self._architecture in _PERMUTED and (heads := self._permuted_heads(tensor.name)):
            return unpermute(out, heads)
        return out

    def _permuted_heads(self, name: str) -> int:
        if ".attn_q." in name:
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if ".attn_k." in name else 0

    def _field(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)

    def _own(self, name: str, default: Any = None) -> Any:
        """A field of the architecture: block_count is llama.block_count."""
        value = self._field(f"{self._architecture}.{name}", default)
        if isinstance(value, str) and name != "rope.scaling.type":
            raise UserError(f"{self._path}: {self._architecture}.{name} is a number, not the text {value!r}. Download the file again.")
        return value

    def _needed(self, name: str) -> Any:
        if (value := self._own(name)) is None:
            raise UserError(f"{self._path} has no {self._architecture}.{name}: it is no whole language model.")
        return value

    def _config(self) -> dict[str, Any]:
        if self._own("expert_count"):
            raise UserError(f"{self._path} is a mixture of experts, which jaxft doesn't have.")
        if (embedding := self._tensors.get("token_embd.weight")) is None:
            raise UserError(f"{self._path} has no token_embd.weight: it is no whole language model.")
        if len(embedding.shape) != 2:
            raise UserError(f"{self._path}: token_embd.weight has {len(embedding.shape)} axes, not 2: it is no whole language model.")
        window = self._own("attention.sliding_window")
        family = "mistral" if self._architecture == "llama" and window else self._architecture
        heads = self._needed("attention.head_count")
        head_dim = self._own("attention.key_length") or self._own("rope.dimension_count") or self._needed("embedding_length") // heads
        if self._own("rope.dimension_count", head_dim) != head_dim or self._own("attention.value_length", head_dim) != head_dim:
            raise UserError(
                f"{self._path}: rotary embeddings over a part of the head, or values of another size, aren't part of the family."
            )
        config = {
            "model_type": family,
            "architectures": [architecture_for(family, CAUSAL_LM)],
            "vocab_size": int(embedding.shape[1]),
            "hidden_size": self._needed("embedding_length"),
            "intermediate_size": self._needed("feed_forward_length"),
            "num_hidden_layers": self._needed("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._own("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self._needed("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": self._needed("context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "rope_parameters": self._rotary(head_dim),
            "attention_bias": _ATTENTION_BIAS in self._tensors,
            "mlp_bias": _MLP_BIAS in self._tensors,
        }
        if window:
            config["sliding_window"] = window
        tokens = {ours: self._field(f"tokenizer.ggml.{theirs}") for ours, theirs in _OPTIONAL.items()}
        config |= {name: value for name, value in tokens.items() if value is not None}
        return complete_config(config, str(self._path))

    def _rotary(self, head_dim: int) -> dict[str, Any]:
        theta = self._own("rope.freq_base", 10000.0)
        if ROPE_FACTORS in self._tensors:
            return self._llama3(theta, head_dim)
        factor = self._own("rope.scaling.factor", self._own("rope.scale_linear", 0.0))  # the older name; 0 and 1 are no scaling
        kind = self._own("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")  # as llama.cpp takes a missing type
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        if kind not in ("linear", "yarn"):
            raise UserError(f"{self._path}: jaxft has no rotary scaling '{kind}' for GGUF files. It has: linear, yarn, and Llama 3's.")
        for name, neutral in _OTHER_ROTARY.items():
            if (value := self._own(name, neutral)) != neutral:
                raise UserError(f"{self._path}: it has {name}={value}, a rotary setting that jaxft doesn't read from GGUF files.")
        settings = {"rope_type": kind, "rope_theta": theta, "factor": factor or self._needed("rope.scaling.factor")}
        if (positions := self._own("rope.scaling.original_context_length")) and kind == "yarn":
            settings["original_max_position_embeddings"] = positions
        for name in ("beta_fast", "beta_slow"):
            if kind == "yarn" and (beta := self._own(f"rope.scaling.yarn_{name}", None)) is not None:
                settings[name] = beta
        return settings

    def _llama3(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The settings that give the file's rotary factors; Llama 3.x differ in the factor alone."""
        factors = self._tensors[ROPE_FACTORS].data
        settings: dict[str, Any] = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max()), "low_freq_factor": 1.0}
        settings |= {"high_freq_factor": 4.0, "original_max_position_embeddings": LLAMA3_POSITIONS}
        plain = plain_frequencies(theta, head_dim)
        if not np.allclose(plain / llama3_frequencies(Rotary(**settings), plain, LLAMA3_POSITIONS), factors, rtol=1e-4):
            raise UserError(f"{self._path}: {ROPE_FACTORS} isn't Llama 3's rotary scaling, the only one of its kind that jaxft has.")
        return settings

    def _hugging_face_names(self) -> dict[str, str]:
        """Returns the file's name of each tensor under Hugging Face's; a tensor without one keeps its own, to be reported."""
        depth = self.config["num_hidden_layers"]
        table = gguf.get_tensor_name_map(_TYPES[self._architecture], depth)
        base = described(self.config["architectures"][0]).base
        names = {}
        for theirs, _, _ in llama.HF_NAMES:
            module, kind = theirs.rsplit(".", 1)
            for layer in range(depth if "{layer}" in module else 1):
                module_name = module.format(layer=layer, base=base)
                names[f"{table.get_name(module_name)}.{kind}"] = f"{module_name}.{kind}"
        return {names.get(name, name): name for name in self._tensors if name != ROPE_FACTORS}


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns (heads * head_dim, ...) rows with each head's interleaved rotary pairs put back into halves, as Hugging Face has them.

    >>> unpermute(np.arange(8), heads=2)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
