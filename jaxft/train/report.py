"""What a run ends with: a table against the untuned model and the majority answer, examples, a model card."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft import console
from jaxft.config import Experiment, ModelConfig
from jaxft.data.tokenize import Examples
from jaxft.hub.bitsandbytes_config import BLOCK_SIZE, CODES
from jaxft.hub.load import compute_type
from jaxft.hub.quantized import PATTERNS
from jaxft.hub.sources import BUNDLED, find
from jaxft.train.evaluate import Evaluation

_LIBRARIES = {"peft": "peft", "adapterhub": "adapter-transformers", "hf": "transformers", "bitsandbytes": "transformers"}  # the hub's names
_SHOWN = 3  # answers
_PROMPT_CHARACTERS = 400


def comparison(summary: Mapping[str, Any], fields: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of the closing table: untuned model, majority answer, tuned model."""
    metrics = [f"exact_match_{name}" for name in fields] if len(fields) > 1 else []
    metrics += ["exact_match"]
    columns = ["", *(list(fields) if len(fields) > 1 else []), "all" if len(fields) > 1 else "exact match", "loss"]
    rows = []
    for title, key in (("untuned model", "before"), ("majority answer", "majority"), ("tuned model", "after")):
        found = summary["eval"].get(key) or {}
        if found:
            cells = [f"{found[name]:.1%}" if name in found else "-" for name in metrics]
            rows.append([title, *cells, f"{found['loss']:.3f}" if "loss" in found else "-"])
    return columns, rows


def print_comparison(summary: Mapping[str, Any], fields: Sequence[str], title: str) -> None:
    """Prints the closing table."""
    columns, rows = comparison(summary, fields)
    console.table(title, columns, rows)


def print_answers(examples: Examples, found: Evaluation, tokenizer: Any) -> None:
    """Prints some prompts with the true and the generated answer."""
    for i, answer in enumerate(found.answers[:_SHOWN]):
        prompt = tokenizer.decode(examples.prompt(i), skip_special_tokens=True).strip()
        prompt = prompt if len(prompt) <= _PROMPT_CHARACTERS else f"{prompt[:_PROMPT_CHARACTERS]}..."
        console.say(f"{prompt}\n  true:  {_one_line(examples.answer(i))}\n  tuned: {_one_line(answer)}\n")


def _one_line(text: str) -> str:
    return " | ".join(text.strip().splitlines())


def adapter_command(folder: pathlib.Path, model: ModelConfig, format: str) -> str:
    """Returns where the adapter is, and how peft, or adapters, uses it, on the base in the form it was trained on."""
    source = model.source
    base = f'"{source}"'
    if source.startswith(BUNDLED) or pathlib.Path(source).is_file():
        found = find(source, "", ())
        base = f'"{found.folder}", gguf_file="{found.gguf.name}"' if found.gguf else f'"{found.folder}"'
    if format == "adapterhub":
        return (
            f"The adapter is in {folder}. With adapters, for Llama and Mistral:\n\n"
            "    import adapters\n"
            "    from transformers import AutoModelForCausalLM\n\n"
            f"    base = AutoModelForCausalLM.from_pretrained({base})\n"
            "    adapters.init(base)\n"
            f'    base.load_adapter("{folder}", with_head=False, set_active=True, use_safetensors=True)\n'
        )
    names, written, note = "AutoModelForCausalLM", "", ""
    if model.quantization in CODES and _is_made_by_transformers(model, "gguf_file" in base):
        names += ", BitsAndBytesConfig"
        settings = f'load_in_4bit=True, bnb_4bit_quant_type="{model.quantization}", bnb_4bit_use_double_quant={model.double_quantization}'
        base = f"{base}, quantization_config=BitsAndBytesConfig({settings})"
    elif model.quantization in CODES:
        base, written = '"base"', _base_command(model)
    elif model.quantization != "none":
        note = f" transformers holds no kernels in {model.quantization}: this is the base whole, which differs a little."
    return (
        f"The adapter is in {folder}. With peft:{note}\n\n"
        f"{written}"
        "    from peft import PeftModel\n"
        f"    from transformers import {names}\n\n"
        f"    base = AutoModelForCausalLM.from_pretrained({base})\n"
        f'    model = PeftModel.from_pretrained(base, "{folder}")\n'
    )


def _is_made_by_transformers(model: ModelConfig, is_gguf: bool) -> bool:
    """Whether transformers, asked for 4 bits, makes the base that was trained on: it has one block size, and its own choice of layers."""
    return not is_gguf and model.block_size == BLOCK_SIZE and tuple(model.quantized) == PATTERNS


def _base_command(model: ModelConfig) -> str:
    """How the 4-bit base that was trained on is written for transformers."""
    dtype = compute_type(model.dtype).name
    settings = f'jaxft.Format("{model.quantization}", {model.block_size}, {model.double_quantization})'
    wanted = f'dtype="{dtype}", revision="{model.revision}", quantization={settings}, quantized={tuple(model.quantized)!r}'
    return (
        "    import jaxft\n"
        f'    model, params = jaxft.load_pretrained("{model.source}", {wanted})\n'
        f'    tokenizer = jaxft.load_tokenizer("{model.source}", "{model.revision}")\n'
        '    jaxft.save_pretrained("base", model, params, tokenizer, format="bitsandbytes")\n\n'
    )


def model_command(folder: pathlib.Path) -> str:
    """Returns where the model is, and how transformers uses it."""
    return (
        f"The model is in {folder}. With transformers:\n\n"
        "    from transformers import AutoModelForCausalLM\n\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
    )


def card(experiment: Experiment, summary: Mapping[str, Any], format: str) -> str:
    """Returns a model card with the measured figures, as the hub reads it."""
    source = experiment.model.source
    head = ["---", f"library_name: {_LIBRARIES[format]}", "tags: [jaxft]"]
    if "/" in source and not pathlib.Path(source).exists() and ":" not in source:
        head.append(f"base_model: {source}")
    lines = [*head, "---", f"# {experiment.name}", ""]
    lines.append(f"{source}, fine-tuned by jaxft with {experiment.method.title} on {experiment.data.train}.")
    if summary:
        lines += ["", "| set | metric | value |", "|---|---|---|"]
        for when, figures in summary["eval"].items():
            lines += [f"| {when} | {name} | {value:.4f} |" for name, value in figures.items()]
        lines += [
            "",
            f"{summary['steps']} steps, seed {summary['seed']}, {summary['trainable_parameters']:,} trained of "
            f"{summary['total_parameters']:,} parameters, {summary['tokens_per_second']:,.0f} tokens/s.",
        ]
    return "\n".join(lines) + "\n"
