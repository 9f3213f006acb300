"""The command line: what it lists, and what a mistake gets. Real processes, for their exit code and what they print."""

import pathlib
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch.py"


def launch(folder, *arguments):
    return subprocess.run([sys.executable, LAUNCH, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def test_list_names_each_experiment_once(tmp_path):
    done = launch(tmp_path, "--list")
    assert done.returncode == 0
    assert "lora_llama2: LoRA fine-tuning of a Llama model on medical text. [variants: 7b, 13b, 70b]\n" in done.stdout


def test_help_shows_the_flags(tmp_path):
    done = launch(tmp_path, "--help")
    assert done.returncode == 0
    assert "--workdir" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --experiment=NAME[:VARIANT]. Known: ablation_masking, "),
        (["--experiment=lora_lama2"], "There is no experiment 'lora_lama2'. Did you mean 'lora_llama2'?"),
        (["--experiment=lora_llama2:8b"], "There is no lora_llama2 variant '8b'. Did you mean '7b'?"),
        (["--experment=lora_llama2"], "There is no flag '--experment'. Did you mean '--experiment'?"),
        (
            ["--experiment=lora_llama2", "--mode=trian"],
            "There is no mode 'trian'. Did you mean 'train'? Known: eval, export, generate, inspect, plan, sweep, train.",
        ),
        (["--experiment=lora_llama2", "--prompt=Hello"], "--prompt belongs to --mode=generate."),
        (["--experiment=lora_llama2", "--mode=eval", "--output=x"], "--output belongs to --mode=generate or export."),
        (["--experiment=lora_llama2", "--mode=generate"], "--mode=generate takes --prompt=TEXT or --prompts=FILE.jsonl, one of them."),
        (
            ["--experiment=lora_llama2", "--config.train.stpes=1"],
            "There is no field 'config.train.stpes'. Did you mean 'config.train.steps'?",
        ),
        (["--experiment=lora_llama2", "--config.train.steps=many"], "config.train.steps: expected a whole number, found 'many'."),
        (["--experiment=lora_llama2", "--config.method.rank=0"], "method.rank: a LoRA's rank is at least 1, not 0."),
    ],
)
def test_a_mistake_gets_one_message_and_code_2(tmp_path, arguments, message):
    done = launch(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_answered_before_heavy_imports(tmp_path):
    script = (
        f"import runpy, sys; sys.argv = ['launch.py', '--experiment=lora_llama2', '--config.train.steps=many']\n"
        f"sys.path.insert(0, {str(LAUNCH.parent)!r})\n"
        f"try:\n    runpy.run_path({str(LAUNCH)!r}, run_name='__main__')\n"
        f"except SystemExit as stop:\n    print(stop.code, sorted({{'transformers', 'torch', 'datasets', 'orbax'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 []\n"
