"""QLoRA at the size of Llama-2-7B: a random model of its shapes is quantized, loaded, trained for some steps and exported.

    python benchmarks/qlora_7b.py [--tokens N] [--steps N] [--folder FOLDER] [--output FOLDER] [--small]

On a GPU, LoRA in bfloat16 without quantization is trained beside it, and both are set against the card's rate of bfloat16 products as
measured in the same process; on one that torch computes on, PEFT on bitsandbytes' kernels too, at the same rank and on the same examples
in the same steps. On CPU, QLoRA alone, in float32: what counts there is that it fits the memory; what isn't measured is said, and written
beside the figures. `--small` is a model of two small layers, for a machine without much of either. Each side is a process of its own. The
model's folder takes 13.5 GB; it is kept where --folder names one. PEFT's side needs jaxft's extra `benchmark`. Writes qlora_7b.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import machine
import ml_dtypes
import numpy as np
import safetensors.numpy

import jaxft
from jaxft.config import DataConfig, OptimizerConfig
from jaxft.data.batches import Batches
from jaxft.data.examples import NextTokens
from jaxft.hub.load import describe_pretrained
from jaxft.hub.names import tensors_of
from jaxft.methods.partition import size, size_in_bytes
from jaxft.tasks import SFT
from jaxft.train.optimizer import make_optimizer, make_schedule
from jaxft.train.state import new_state
from jaxft.train.step import make_step

HERE = pathlib.Path(__file__).resolve().parent
PEFT_SIDE = HERE / "qlora_7b_torch.py"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
SHARD_BYTES = 2 * 10**9
RANK, ALPHA = 16, 32.0  # those of lora_llama2:7b
SCHEDULE_STEPS = 100  # that the learning rates are those of the start of
UNMEASURED = {  # side: what is missing without it
    "lora": "LoRA in bfloat16 without quantization beside QLoRA: its seconds and bytes; it takes a GPU",
    "gpu": "the share of a GPU's rate of bfloat16 products, and the peak of a GPU's memory",
    "peft": "QLoRA by PEFT on bitsandbytes' kernels, at the same rank, on the same examples and steps: it takes a GPU of CUDA",
}
DEVICES = """
import importlib.util, json, jax
on_gpu = jax.default_backend() != "cpu"
has_peft = on_gpu and all(importlib.util.find_spec(name) for name in ("torch", "peft", "bitsandbytes"))
print(json.dumps({"lora": on_gpu, "gpu": on_gpu, "peft": has_peft and __import__("torch").cuda.is_available()}))
"""
SIDE = 8192  # of the square matrices whose product gives a GPU's rate


def main() -> None:
    """Writes the model where it isn't there yet, and runs each side in a process of its own."""
    options = _options()
    if options.side:
        print(json.dumps(train(options.folder, options.side == "qlora", options.tokens, options.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary)
        if not (folder / "config.json").exists():
            write_model(folder, SMALL if options.small else LLAMA_2_7B)
        config = json.loads((folder / "config.json").read_text())
        sides, unmeasured = _sides()
        report: dict[str, Any] = {"machine": machine.describe(PACKAGES), "model": config, "unmeasured": unmeasured}
        job = pathlib.Path(temporary) / "job.json"
        job.write_text(json.dumps(peft_job(folder, options.tokens, options.steps, config["vocab_size"])))
        for side in sides:
            numbers = [f"--folder={folder}", f"--tokens={options.tokens}", f"--steps={options.steps}"]
            report[side] = _run(str(PEFT_SIDE), str(job)) if side == "peft" else _run(__file__, f"--side={side}", *numbers)
            print(side, json.dumps(report[side], indent=1), flush=True)
    for missing in unmeasured:
        print(f"Not measured here: {missing}.")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "qlora_7b.json").write_text(json.dumps(report, indent=1) + "\n")


def _sides() -> tuple[list[str], list[str]]:
    """The sides that this machine can run, and what stays unmeasured; asked in a process of its own, for jax keeps a GPU's memory."""
    has = _run("-c", DEVICES)
    return [side for side in ("lora", "qlora", "peft") if has.get(side, True)], [UNMEASURED[name] for name in has if not has[name]]


def _run(*arguments: str) -> dict[str, Any]:
    """Runs Python in a process of its own, and returns what its last line says in JSON."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def peft_job(folder: pathlib.Path, tokens: int, steps: int, vocabulary: int) -> dict[str, Any]:
    """Returns what PEFT's side has to know: the same examples, rank and update."""
    update, (ids, scored) = OptimizerConfig(), _rows(tokens, vocabulary)
    rates = [float(make_schedule(update, SCHEDULE_STEPS)(step)) for step in range(steps)]
    lora = {"model": str(folder), "rank": RANK, "alpha": ALPHA, "ids": ids.tolist(), "scored": scored.tolist()}
    return lora | {"rates": rates, "betas": (update.b1, update.b2), "eps": update.eps, "clip_norm": update.clip_norm}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="in the one packed row of a step")
    parser.add_argument("--steps", type=int, default=3, help="of each side; the first isn't timed where there are more")
    parser.add_argument("--folder", type=pathlib.Path, help="of the model; written where there is none")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results", help="folder for qlora_7b.json")
    parser.add_argument("--small", action="store_true", help="a model of two small layers")
    parser.add_argument("--side", choices=("lora", "qlora"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: pathlib.Path, shape: dict[str, int]) -> None:
    """Writes a random Llama model in bfloat16, a shard at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | shape))
    model, shapes = describe_pretrained(str(folder))
    random, shards, shard, held, total, places = np.random.default_rng(0), 0, {}, 0, 0, {}
    wanted = tensors_of(model, shapes)
    for number, entry in enumerate(wanted):
        norm = entry.name.endswith("norm.weight")
        values = np.ones(entry.shape, np.float32) if norm else random.standard_normal(entry.shape, np.float32) * np.float32(0.02)
        shard[entry.name] = values.astype(ml_dtypes.bfloat16)
        held += shard[entry.name].nbytes
        places[entry.name] = file = f"model-{shards:05d}.safetensors"
        if held > SHARD_BYTES or number + 1 == len(wanted):
            safetensors.numpy.save_file(shard, folder / file, {"format": "pt"})
            shards, shard, held, total = shards + 1, {}, 0, total + held
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))


def train(folder: pathlib.Path, quantized: bool, tokens: int, steps: int) -> dict[str, Any]:
    """Loads, trains and exports; returns seconds and bytes of each."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    started = time.perf_counter()
    model, params = jaxft.load_pretrained(str(folder), dtype=dtype, quantization=jaxft.Format() if quantized else None)
    seconds = {"load": time.perf_counter() - started}
    loaded = machine.peak_memory_bytes()
    model = model.clone(remat="full")
    method = jaxft.methods.LoRA(rank=RANK, alpha=ALPHA)
    params = method.init(jax.random.key(0), model, params)
    trainable, frozen = jaxft.partition(params, method.mask(params))
    counts = {"total_parameters": size(params), "trainable_parameters": size(trainable), "frozen_bytes": size_in_bytes(frozen)}
    del params
    optimizer = make_optimizer(OptimizerConfig(), SCHEDULE_STEPS)
    state = new_state(trainable, optimizer)
    del trainable
    batches = _batches(tokens, model.config.vocab_size)
    batch = jax.device_put(dict(batches.batch(0)))
    started = time.perf_counter()
    step = jax.jit(make_step(model, SFT(), optimizer, 0), donate_argnums=0).lower(state, frozen, batch).compile()
    seconds["compile"] = time.perf_counter() - started
    losses, times = [], []
    for _ in range(steps):
        started = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - started)
    memory = step.memory_analysis()
    seconds["step"] = float(np.median(times[1:] or times))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        jaxft.save_adapter(pathlib.Path(output) / "adapter", model, jaxft.combine(state.trainable, frozen), method)
    seconds["export"] = time.perf_counter() - started
    found = {
        "dtype": dtype,
        "tokens": tokens,
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds["step"],
        "peak_host_bytes": machine.peak_memory_bytes(),
        "peak_host_bytes_after_loading": loaded,
        "step_bytes_by_xla": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        **counts,
    }
    if not on_cpu:
        device = jax.devices()[0]
        rate = _matrix_rate()
        # a frozen kernel takes two products forward and back, and one more where full remat computes the forward pass again
        share = 6 * (counts["total_parameters"] - counts["trainable_parameters"]) * found["tokens_per_second"] / rate
        found |= {"device": device.device_kind, "matrix_flops": rate, "share_of_matrix_rate": share}
        found["peak_device_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return found


def _rows(tokens: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Four examples of random tokens, (4, tokens / 4), and which of them are scored: the last half of each."""
    length = tokens // 4
    ids = np.random.default_rng(1).integers(1, vocabulary, (4, length)).astype(np.int32)
    return ids, np.tile(np.arange(length) >= length // 2, (4, 1))


def _batches(tokens: int, vocabulary: int) -> Batches:
    """The four examples, packed into one row."""
    ids, scored = _rows(tokens, vocabulary)
    zeros, offsets = np.zeros(4, np.int32), np.arange(0, ids.size + 1, ids.shape[1], dtype=np.int64)
    examples = NextTokens(ids.ravel(), offsets, zeros, scored.ravel(), zeros, ("",) * 4)
    return Batches(examples, DataConfig(max_length=tokens, share_prefix=False), 1, 1, 0, False, 0)


def _matrix_rate() -> float:
    """Floating-point operations a second of a large bfloat16 product on the device."""
    square = jnp.ones((SIDE, SIDE), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(square, square))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(product(square, square))
        times.append(time.perf_counter() - started)
    return 2 * SIDE**3 / min(times)


if __name__ == "__main__":
    main()
