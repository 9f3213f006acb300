"""Peak memory of import, measured in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import jaxft

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is the Linux kernel's")

SCRIPT = """
import json, pathlib, re, sys
import jax
import jaxft

def memory(field):
    return int(re.search(field + r":\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

folder, dtype = pathlib.Path(sys.argv[1]), sys.argv[2]
format = jaxft.Format(sys.argv[3]) if len(sys.argv) > 3 else None
jaxft.load_pretrained(folder / "tiny", dtype=dtype, quantization=format)  # everything is imported
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
before = memory("VmRSS")
model, params = jaxft.load_pretrained(folder / "big", dtype=dtype, quantization=format)
sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(json.dumps({"grown": memory("VmHWM") - before, "model": sum(sizes), "largest": max(sizes)}))
"""
SLACK = 40e6  # bytes: one tensor of the file, its transpose, the allocator's and the compiler's own


def _measure(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(jaxft.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model, and one of 80 million parameters in bfloat16: 160 MB on disk, 320 MB in float32."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models")
    for name, hidden, layers in (("tiny", 32, 2), ("big", 640, 12)):
        config = transformers.LlamaConfig(
            vocab_size=16000, hidden_size=hidden, intermediate_size=4 * hidden - 64, num_hidden_layers=layers, num_attention_heads=8
        )
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_holds_one_copy_and_the_largest_leaf(dtype, models):
    found = _measure(models, dtype)
    assert found["model"] > 150e6
    assert found["grown"] <= found["model"] + found["largest"] + SLACK, found


@pytest.mark.slow
def test_quantized_import_holds_the_quantized_model_and_two_dense_tensors(models):
    found = _measure(models, "bfloat16", "nf4")
    dense = 16000 * 640 * 2  # bytes of the largest tensor of the file, the embeddings
    assert found["model"] < 85e6  # 40 MB of codes and scales, and 41 MB of embeddings and head
    assert found["grown"] <= found["model"] + 2 * dense, found
