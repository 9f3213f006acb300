"""Whole runs as a user starts them, on a tiny random model with a tokenizer and a small file of rows.

In processes of their own where that is what a test is about; elsewhere in this one, since a process spends seconds on its imports.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import jaxft
import launch
from jaxft.errors import UserError
from jaxft.models.node import is_quantized
from jaxft.train import run

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=800"  # as in conftest.py


def command(material, workdir, *flags, mode="train"):
    """Returns the command line of a small run."""
    return [
        *(sys.executable, "launch.py", "--experiment=lora_llama2", f"--mode={mode}", f"--workdir={workdir}"),
        *(f"--config.model.source={material / 'model'}", f"--config.data.train={material / 'rows.jsonl'}", "--config.data.test="),
        *(
            "--config.data.split=0.8,0.1,0.1",
            "--config.data.system=",
            "--config.data.prompt=",
            "--config.data.completion=",
            "--config.data.max_length=128",
        ),
        *(
            "--config.train.batch_size=4",
            f"--config.train.steps={STEPS}",
            "--config.train.checkpoint_every=3",
            "--config.train.eval_every=8",
        ),
        *(() if any(flag.startswith("--config.method=") for flag in flags) else ("--config.method.dropout=0.1",)),
        *("--config.train.neftune_alpha=5.0", "--config.eval.max_new_tokens=4", *flags),
    ]


def start(material, workdir, *flags, mode="train", devices=1):
    """Starts a run on so many devices; returns the process."""
    environment = os.environ | {"JAXFT_CACHE": str(material / "cache"), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        command(material, workdir, *flags, mode=mode), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """Returns exit code, standard output and standard error."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def here(material, monkeypatch):
    """Runs a command line in this process, on its two devices; gives exit code, standard output and the message of a mistake.

    tests/test_launch.py sees what `UserError` becomes, an exit code and one line.
    """
    monkeypatch.setenv("JAXFT_CACHE", str(material / "cache"))
    monkeypatch.setattr(run, "_keep_compiled", lambda: None)  # leaves jax's cache of programs as the other tests have it

    def go(workdir, *flags, mode="train"):
        with contextlib.redirect_stdout(io.StringIO()) as out, jax.numpy_dtype_promotion("standard"):  # optax mixes types
            try:
                launch.main(command(material, workdir, *flags, mode=mode)[1:])
            except UserError as error:
                return 2, out.getvalue(), str(error)
        return 0, out.getvalue(), ""

    return go


def logged(workdir):
    """Returns the training steps that metrics.jsonl holds whole lines of."""
    path = workdir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [found for line in text.splitlines() if line.endswith("}") and "loss" in (found := json.loads(line))]


def adapter(workdir):
    """Returns the bytes of the exported adapter."""
    return (workdir / "export" / "peft" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(material):
    """A run that nothing disturbed: its folder and what it printed."""
    workdir = material / "whole"
    code, out, err = finish(start(material, workdir))
    assert code == 0, err
    return workdir, out


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_says(whole):
    workdir, out = whole
    summary = json.loads((workdir / "summary.json").read_text())
    for name in (
        *("experiment", "model", "method", "task", "steps", "seed", "trainable_parameters", "total_parameters", "tokens_per_second"),
        *("compile_seconds", "seconds", "peak_memory_bytes", "train_loss"),
    ):
        assert summary[name] is not None, name
    assert summary["steps"] == STEPS
    assert set(summary["eval"]) >= {"before", "after"}
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert json.loads((workdir / "config.json").read_text())["config"]["method"]["class"] == "LoRA"
    assert [line["step"] for line in logged(workdir)] == list(range(1, STEPS + 1))
    assert any(b"test_loss" in path.read_bytes() for path in (workdir / "tensorboard").glob("events*"))  # the last figures
    assert list((workdir / "checkpoints").iterdir())
    for text in ("What trains", "untuned model", "majority answer", "tuned model", "PeftModel.from_pretrained"):
        assert text in out


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bytes(material, whole):
    workdir = material / "killed"
    for moment in (5, 13):
        process = start(material, workdir)
        while process.poll() is None and len(logged(workdir)) < moment:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    code, out, err = finish(start(material, workdir))
    assert code == 0, err
    assert "Going on from step" in out
    assert adapter(workdir) == adapter(whole[0])
    strip = ("tokens_per_second",)
    lines = [{name: value for name, value in line.items() if name not in strip} for line in logged(workdir)]
    assert lines == [{name: value for name, value in line.items() if name not in strip} for line in logged(whole[0])]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_cleanly(material, whole, number):
    workdir = material / f"stopped{number}"
    process = start(material, workdir)
    while process.poll() is None and len(logged(workdir)) < 4:
        time.sleep(0.01)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 0
    assert "Traceback" not in err
    assert "The same command goes on" in out
    assert not (workdir / "summary.json").exists()
    code, _, err = finish(start(material, workdir))
    assert code == 0, err
    assert adapter(workdir) == adapter(whole[0])


@pytest.mark.slow
def test_a_look_at_the_data_leaves_a_run_as_it_is(material, whole):
    files = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*") if path.is_file() and not path.name.startswith("inspect.")}
    code, out, err = finish(start(material, whole[0], mode="inspect"))
    assert code == 0, err
    assert "Three rows of train as the model reads them" in out
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert json.loads((whole[0] / "inspect.json").read_text(encoding="utf-8"))["sets"]["train"]["rows"] == 32
    assert "Going on from step" in finish(start(material, whole[0]))[1]


@pytest.mark.slow
def test_the_adapter_in_peft_and_the_merged_folder_in_transformers_agree(here, material, whole, tmp_path):
    code, _, err = here(whole[0], "--format=hf", f"--output={tmp_path / 'merged'}", mode="export")
    assert code == 0, err
    base = transformers.AutoModelForCausalLM.from_pretrained(material / "model")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    tokens = tokenizer("Name the number 3, please.", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = base(tokens).logits
        tuned = peft.PeftModel.from_pretrained(base, whole[0] / "export" / "peft")(tokens).logits
        assert (tuned - merged(tokens).logits).abs().max() < 1e-4  # float32, logits of order 1
        assert (tuned - plain).abs().max() > 1e-2
    assert any(tensor.any() for name, tensor in _tensors(whole[0]).items() if "lora_B" in name)


def _tensors(workdir):
    return safetensors.numpy.load(adapter(workdir))


@pytest.mark.slow
def test_a_sum_of_methods_trains_and_is_exported_merged(here, material, tmp_path):
    workdir = tmp_path / "run"
    code, out, err = here(workdir, "--config.method=LoRA(rank=4) + NormTuning()", "--config.eval.generate=false")
    assert code == 0, err
    for text in ("q_proj/kernel/lora_a", "input_norm/scale", "AutoModelForCausalLM"):
        assert text in out
    assert not (workdir / "export" / "peft").exists()
    tuned, base = (transformers.AutoModelForCausalLM.from_pretrained(place) for place in (workdir / "export" / "hf", material / "model"))
    assert (tuned.model.norm.weight != base.model.norm.weight).any()
    assert (tuned.model.layers[0].self_attn.q_proj.weight != base.model.layers[0].self_attn.q_proj.weight).any()
    code, out, err = here(workdir, "--config.method=LoRA(rank=4) + NormTuning()", "--config.eval.generate=false", mode="eval")
    assert code == 0, err
    assert f"{json.loads((workdir / 'summary.json').read_text())['eval']['after']['loss']:.4f}" in out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SparseMask(rank=1, choice='fisher')", "VeRA(rank=8)"])
def test_an_adapter_of_every_kind_comes_back_in_another_process_and_in_peft(here, material, tmp_path, method):
    workdir, flags = (
        tmp_path / "run",
        (f"--config.method={method}", "--config.eval.generate=false", "--config.optimizer.learning_rate=1e-2"),
    )
    code, _, err = here(workdir, *flags)
    assert code == 0, err
    code, out, err = finish(start(material, workdir, *flags, mode="eval"))  # chooses the same weights, or the base would be another
    assert code == 0, err
    assert f"{json.loads((workdir / 'summary.json').read_text())['eval']['after']['loss']:.4f}" in out
    code, _, err = here(workdir, *flags, "--format=hf", f"--output={tmp_path / 'merged'}", mode="export")
    assert code == 0, err
    base, merged = (transformers.AutoModelForCausalLM.from_pretrained(place) for place in (material / "model", tmp_path / "merged"))
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = base(tokens).logits
        tuned = peft.PeftModel.from_pretrained(base, workdir / "export" / "peft")(tokens).logits
        assert (tuned - merged(tokens).logits).abs().max() < 1e-4  # float32, logits of order 1
        assert (tuned - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_eval_and_generate_use_the_best_checkpoint(here, whole, tmp_path):
    code, out, err = here(whole[0], mode="eval")
    assert code == 0, err
    after = json.loads((whole[0] / "summary.json").read_text())["eval"]["after"]
    assert f"{after['loss']:.4f}" in out
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "Name the number 3, please."}\n{"prompt": "Name it."}\n')
    code, out, err = here(whole[0], f"--prompts={prompts}", f"--output={output}", mode="generate")
    assert code == 0, err
    assert [set(json.loads(line)) for line in output.read_text().splitlines()] == [{"prompt", "answer"}] * 2


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused(here, whole):
    code, _, err = here(whole[0], "--config.method.rank=4")
    assert code == 2
    assert "method.rank was 8 and is 4" in err


@pytest.mark.slow
def test_another_base_is_refused(here, material, whole, tmp_path):
    (tmp_path / "material").symlink_to(material)
    workdir = tmp_path / "run"
    code, _, err = here(workdir, "--config.train.steps=3", "--config.eval.generate=false")
    assert code == 0, err
    other = transformers.AutoModelForCausalLM.from_pretrained(material / "model")
    with torch.no_grad():
        other.model.embed_tokens.weight[5, 5] += 1
    weights = material / "model" / "model.safetensors"
    kept = weights.read_bytes()
    try:
        other.save_pretrained(material / "model")
        code, _, err = here(workdir, "--config.train.steps=3", "--config.eval.generate=false")
    finally:
        weights.write_bytes(kept)
    assert code == 2
    assert "another base model" in err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(here, tmp_path):
    flags = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0", "--config.optimizer.name=sgd")
    code, _, err = here(tmp_path / "run", *flags)
    assert code == 2
    assert "rows.jsonl, line" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--config.train.batch_size=0",), "train.batch_size"),
        (("--config.optimizer.schedule=cosin",), "Did you mean 'cosine'"),
        (("--config.optimizer.name=adam",), "Did you mean 'adamw'"),
        (("--config.train.remat=dot",), "Did you mean 'dots'"),
        (("--config.method.targets=q_prj",), "q_proj"),
        (("--config.model.quantization=nf3",), "Did you mean 'nf4'"),
        (("--config.model.quantization=nf4", "--config.method=Full()"), "can't train: it is held in nf4"),
        (("--config.method.rank=33", "--config.method.start=pissa"), "a rank of 33 is above"),
        (("--config.data.train=nowhere.jsonl",), "nowhere.jsonl"),
    ],
)
def test_a_mistake_gets_one_message_and_leaves_nothing_broken(material, tmp_path, monkeypatch, flags, words):
    """In this process: tests/test_launch.py sees what `UserError` becomes, an exit code and one line."""
    monkeypatch.setenv("JAXFT_CACHE", str(material / "cache"))
    monkeypatch.setattr(run, "_keep_compiled", lambda: None)  # leaves jax's cache of programs as the other tests have it
    with pytest.raises(UserError) as caught:
        launch.main(command(material, tmp_path / "run", *flags)[1:])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_ours_is_left_alone(here, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, err = here(tmp_path)
    assert code == 2
    assert "isn't empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_ties_and_early_stopping_end_with_the_best_checkpoint(here, tmp_path):
    flags = ("--config.train.best_metric=accuracy", "--config.train.best_mode=max", "--config.train.eval_every=1", "--config.train.keep=1")
    small = ("--config.optimizer.learning_rate=1e-9", "--config.train.patience=2", "--config.eval.generate=false")
    code, out, err = here(tmp_path / "run", *flags, *small)  # so small a rate that every evaluation ties
    assert code == 0, err
    assert "Stopped early: accuracy hasn't improved for 2 evaluations" in out
    assert "Step 1 was the best on validation" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_generate_takes_the_folders_configuration_and_rows_of_the_data(material, whole, tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text('{"instruction": "Name it.", "input": "3"}\n{"instruction": "Name the number 3, please?", "input": ""}\n')
    process = subprocess.Popen(
        [sys.executable, "launch.py", "--experiment=lora_llama2", f"--workdir={whole[0]}", "--mode=generate", f"--prompts={rows}",
         f"--output={output}"],
        cwd=ROOT, env=os.environ | {"JAXFT_CACHE": str(material / "cache"), "XLA_FLAGS": QUICK},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    code, _, err = finish(process)
    assert code == 0, err
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["Name it.\n\n3", "Name the number 3, please?"]


@pytest.mark.slow
def test_a_start_that_failed_locks_no_folder(here, tmp_path):
    code, _, err = here(tmp_path / "run", "--config.data.split=0.9,0.1,0.0")
    assert (code, "There is no test set" in err) == (2, True), err
    code, _, err = here(tmp_path / "run", "--config.method.targets=qproj")
    assert (code, "Did you mean 'q_proj'" in err) == (2, True), err
    flags = ("--config.optimizer.name=sgd", "--config.optimizer.clip_norm=0", "--config.train.steps=4", "--config.eval.generate=false")
    code, _, err = here(tmp_path / "run", *flags, "--config.optimizer.learning_rate=1e38")
    assert code == 2
    assert "isn't finite" in err
    assert "rows.jsonl, line" in err
    assert "No checkpoint was written before it" in err
    code, _, err = here(tmp_path / "run", *flags, "--config.optimizer.learning_rate=1e-3")
    assert code == 0, err


@pytest.mark.slow
def test_somebodys_files_among_the_exports_are_found_before_it_trains(here, tmp_path):
    flags = ("--config.train.steps=2", "--config.eval.generate=false", "--config.train.eval_every=0")
    code, _, err = here(tmp_path / "run", *flags)
    assert code == 0, err
    notes = tmp_path / "run" / "export" / "peft" / "notes.txt"
    notes.write_text("mine")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    code, _, err = here(tmp_path / "run", *flags)
    assert code == 2
    assert "holds files that jaxft didn't write: notes.txt. Move them" in err
    assert notes.read_text() == "mine"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


@pytest.mark.slow
def test_folders_of_others_are_refused_without_a_traceback(here, tmp_path):
    for content in ('{"model_type": "llama"}', "[]"):
        (tmp_path / "config.json").write_text(content)
        code, _, err = here(tmp_path)
        assert (code, "holds no run of jaxft" in err) == (2, True), err
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = here(tmp_path, f"--output={tmp_path}", mode="export")
    assert code == 2, err


@pytest.mark.slow
def test_a_sum_that_can_not_be_merged_is_exported_as_its_parts(here, tmp_path):
    method = "--config.method=Prefix(virtual_tokens=3) + Bottleneck(size=4)"
    code, _, err = here(tmp_path / "run", method, "--config.train.neftune_alpha=0", "--config.train.steps=4")
    assert code == 0, err
    assert (tmp_path / "run" / "export" / "1-Prefix" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "export" / "2-Bottleneck" / "adapter.safetensors").exists()
    flags = (method, "--config.train.neftune_alpha=0", "--config.train.steps=4", f"--output={tmp_path / 'again'}")
    code, _, err = here(tmp_path / "run", *flags, mode="export")
    assert code == 0, err
    assert sorted(folder.name for folder in (tmp_path / "again").iterdir()) == ["1-Prefix", "2-Bottleneck"]
    code, _, err = here(tmp_path / "other", "--config.method=Partial(targets=('norm',)) + Prefix(virtual_tokens=3)")
    assert (code, "could be written nowhere" in err) == (2, True), err


@pytest.mark.slow
def test_a_quantized_base_trains_and_is_merged_into_four_bits(here, tmp_path, monkeypatch):
    flags = ("--config.model.quantization=nf4", "--config.model.block_size=32", "--config.train.steps=9", "--config.eval.generate=false")
    flags += ("--config.train.batch_size=2",)
    code, out, err = here(tmp_path / "run", *flags)
    assert code == 0, err
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert losses[-1] < losses[0]
    monkeypatch.chdir(tmp_path)  # what is printed writes a folder, `base`: transformers makes no blocks of 32 itself
    given = {}
    exec(textwrap.dedent(out[out.index("    import jaxft") :]), given)
    assert given["base"].model.layers[0].mlp.up_proj.weight.quant_state.blocksize == 32
    assert any("lora_A" in name for name, _ in given["model"].named_parameters())
    output = ("--format=bitsandbytes", f"--output={tmp_path / 'merged'}")
    code, out, err = here(tmp_path / "run", *flags, *output, mode="export")
    assert code == 0, err
    assert "Merged and quantized again" in out
    assert "kernels, mean relative error" in out
    assert "| after, in 4 bits again | loss |" in (tmp_path / "merged" / "README.md").read_text()
    _, params = jaxft.load_pretrained(tmp_path / "merged")
    assert is_quantized(params["layers"]["0-2"]["mlp"]["up_proj"]["kernel"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.blocksize == 32
