"""Peak memory of import and export, measured in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import jaxft

SCRIPT = """
import json, pathlib, resource, sys
import jax, numpy as np, psutil, safetensors.numpy, transformers
import jaxft

folder, dtype, export = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
jaxft.load_pretrained(folder / "tiny", dtype=dtype)  # everything is imported and compiled
before, peak = psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert peak < before + 60e6, "the start itself peaked: what follows couldn't be seen"
model, params = jaxft.load_pretrained(folder / "big", dtype=dtype)
if export:
    jaxft.save_pretrained(export, model, params, max_shard_size="50MB")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(json.dumps({"grown": peak - before, "model": sum(sizes), "largest": max(sizes)}))
"""
SLACK = 40e6  # bytes: one tensor of the file, its transpose, the allocator's and the compiler's own


def _measure(folder, dtype, export=""):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(jaxft.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), dtype, export], env=environment, capture_output=True, text=True)
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
def test_export_holds_one_shard_beside_the_model(models, tmp_path):
    found = _measure(models, "float32", str(tmp_path / "out"))
    shard = 50e6
    assert found["grown"] <= found["model"] + max(found["largest"], 2 * shard) + SLACK, found
