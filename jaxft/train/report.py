"""What a run ends with: a table against the untuned model and the majority answer, examples, a model card."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft import console
from jaxft.config import Experiment, ModelConfig
from jaxft.data.examples import Examples, NextTokens
from jaxft.errors import UserError, expanded
from jaxft.hub.bitsandbytes_config import BLOCK_SIZE, CODES
from jaxft.hub.load import compute_type
from jaxft.hub.quantized import PATTERNS
from jaxft.hub.save import auto_class
from jaxft.hub.sources import BUNDLED, find
from jaxft.methods import Prefix
from jaxft.methods.base import Method
from jaxft.models.heads import CAUSAL_LM, is_causal
from jaxft.tasks.base import Report
from jaxft.train.evaluate import Evaluation
from jaxft.train.logs import number
from jaxft.train.setup import Setup

_LIBRARIES = {"peft": "peft", "adapterhub": "adapter-transformers", "hf": "transformers", "bitsandbytes": "transformers"}  # the hub's names
_PIPELINES = {  # of transformers
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "masked_lm": "fill-mask",
}
_SHOWN = 3  # answers
_PROMPT_CHARACTERS = 400
_MODELS = {  # of a summary's eval
    "before": "untuned model",
    "majority": "majority answer",
    "linear": "TF-IDF + logistic regression",
    "commonest": "commonest tag of each word",
    "after": "tuned model",
}
_TITLES = {
    "general_loss": "loss on general text",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "mcc": "MCC",
    "f1": "F1",
    "exact_match": "exact match",
    "exact_match_answered": "of answered",
    "answered_f1": "F1 of answered",
    "exact_match_unanswerable": "of unanswerable",
}


def comparison(summary: Mapping[str, Any], fields: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns the columns and rows of the closing table: untuned model, majority answer, a simple model of words, tuned model.

    Args:
      summary: of the run.
      fields: of generated answers, empty where none are.
    """
    found = summary["eval"]
    metrics = {f"exact_match_{name}": name for name in fields} if len(fields) > 1 else {}
    if "exact_match" in found["after"] and "f1" not in found["after"]:  # of generated answers
        metrics |= {"exact_match": "all" if metrics else "exact match", "loss": "loss"}
        metrics |= {name: _TITLES[name] for name in ("general_loss",) if name in found["after"]}
    else:
        metrics = {name: _TITLES.get(name, name) for name in found["after"]}
    rows = []
    for key, title in _MODELS.items():
        if of_one := found.get(key):
            rows.append([title, *(_cell(name, of_one) for name in metrics)])
    return ["", *metrics.values()], rows


def _cell(name: str, found: Mapping[str, float]) -> str:
    if name not in found:
        return "-"
    return f"{found[name]:.3f}" if name in ("loss", "general_loss") else number(name, found[name])


def print_comparison(summary: Mapping[str, Any], fields: Sequence[str], title: str) -> None:
    """Prints the closing table."""
    columns, rows = comparison(summary, fields)
    console.table(title, columns, rows)


def print_answers(examples: Examples, found: Evaluation, setup: Setup) -> None:
    """Prints some texts with the true answer, and the generated or predicted one."""
    model, task, tokenizer = setup.model, setup.experiment.task, setup.tokenizer
    if found.answers:
        assert isinstance(examples, NextTokens)
        pairs = [(examples.answer(i), answer) for i, answer in enumerate(found.answers[:_SHOWN])]
        texts = [examples.prompt(i) for i in range(len(pairs))]
    else:
        numbers = np.unique(examples.rows, return_index=True)[1][:_SHOWN].tolist()  # of rows in several windows the first
        pairs = task.shown(model, examples, found.outputs, numbers)
        texts = [examples.tokens_of(i) for i in numbers]
    for tokens, (true, made) in zip(texts, pairs, strict=False):
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        text = text if len(text) <= _PROMPT_CHARACTERS else f"{text[:_PROMPT_CHARACTERS]}..."
        console.say(f"{text}\n  true:  {_one_line(true)}\n  tuned: {_one_line(made)}\n")


def print_report(report: Report, folder: pathlib.Path) -> None:
    """Prints a task's tables, and writes its pictures."""
    for table in report.tables:
        console.table(table.title, table.columns, table.rows)
    for name, picture in report.pictures.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(picture)
        except OSError as error:
            raise UserError(f"{folder / name} can't be written ({error.strerror}). Make room, or choose another --workdir.") from error
        console.say(f"{folder / name} is a picture of it.\n")


def _one_line(text: str) -> str:
    return " | ".join(text.strip().splitlines())


def adapter_command(folder: pathlib.Path, model: ModelConfig, format: str, trained: Any, method: Method | None = None) -> str:
    """Returns where the adapter is, and how peft, or adapters, uses it, on the base in the form it was trained on.

    Args:
      folder: of the adapter.
      model: the base.
      format: peft or adapterhub.
      trained: of it the task and the labels.
      method: that the adapter is of.
    """
    source = expanded(model.source)
    revision = f', revision="{model.revision}"' if model.revision != ModelConfig.revision else ""
    base = f'"{source}"{revision}'
    if source.startswith(BUNDLED) or pathlib.Path(source).is_file():
        found = find(source, "", ())
        base = f'"{found.folder}", gguf_file="{found.gguf.name}"' if found.gguf else f'"{found.folder}"'
    auto, options = auto_class(trained.task), _head_options(trained)
    names, written, note = auto, "", ""
    of_base = dtype = f", dtype=torch.{compute_type(model.dtype).name}"  # 4 bits hang on the type that they are made of
    if model.quantization in CODES and _is_made_by_transformers(model, trained, "gguf_file" in base):
        names += ", BitsAndBytesConfig"
        settings = f'load_in_4bit=True, bnb_4bit_quant_type="{model.quantization}", bnb_4bit_use_double_quant={model.double_quantization}'
        settings += f", bnb_4bit_compute_dtype=torch.{compute_type(model.dtype).name}"
        base = f"{base}, quantization_config=BitsAndBytesConfig({settings})"
    elif model.quantization in CODES:
        base, written, dtype = '"base"', _base_command(model, trained), ""
    elif model.quantization != "none":
        note = f" transformers holds no kernels in {model.quantization}: this is the base whole, which differs a little."
    if format == "adapterhub":
        # the transformers of adapters takes 4 bits for float16 where nothing is said, and adapters puts float32 beside any type
        dtype, cast = (of_base, "    base.adapter_to(name, dtype=base.dtype)\n") if model.quantization in CODES else ("", "")
        return (
            f"The adapter is in {folder}. With adapters:{note}\n\n"
            f"{written}"
            "    import adapters\n"
            f"{'    import torch' + chr(10) if dtype else ''}"
            f"    from transformers import {names}\n\n"
            f"    base = {auto}.from_pretrained({base}{dtype}{options})\n"
            "    adapters.init(base)\n"
            f'    name = base.load_adapter("{folder}", with_head={bool(trained.head)}, set_active=True, use_safetensors=True)\n'
            f"{cast}"
        )
    if any(isinstance(part, Prefix) for part in getattr(method, "methods", (method,))) and not is_causal(trained):
        return (
            f"The adapter is in {folder}, in PEFT's form. PEFT reads it and can't run it: in transformers 5 encoders take no keys and "
            "values from before the text. jaxft runs it: --mode=eval, and jaxft.load_adapter.\n"
        )
    return (
        f"The adapter is in {folder}. With peft:{note}\n\n"
        f"{written}"
        f"{'    import torch' + chr(10) if dtype else ''}"
        "    from peft import PeftModel\n"
        f"    from transformers import {names}\n\n"
        f"    base = {auto}.from_pretrained({base}{dtype}{options})\n"
        f'    model = PeftModel.from_pretrained(base, "{folder}")\n'
    )


def _is_made_by_transformers(model: ModelConfig, trained: Any, is_gguf: bool) -> bool:
    """Whether transformers, asked for 4 bits, makes the base that was trained on: it has one block size, and its own choice of layers.

    Of other tasks than language modelling it quantizes heads with a bias too, and an encoder's pooler.
    """
    whole = not is_gguf and model.block_size == BLOCK_SIZE and tuple(model.quantized) == PATTERNS
    return whole and trained.task == CAUSAL_LM


def _base_command(model: ModelConfig, trained: Any) -> str:
    """How the 4-bit base that was trained on is written for transformers."""
    dtype = compute_type(model.dtype).name
    settings = f'jaxft.Format("{model.quantization}", {model.block_size}, {model.double_quantization})'
    wanted = f'dtype="{dtype}", revision="{model.revision}", quantization={settings}, quantized={tuple(model.quantized)!r}'
    if trained.task != CAUSAL_LM:
        wanted += f', task="{trained.task}"'
    if trained.config.labels:
        wanted += f", labels={tuple(trained.config.labels)!r}"
        wanted += f', problem_type="{trained.config.problem_type}"' if trained.config.problem_type else ""
    return (
        "    import jaxft\n"
        f'    model, params = jaxft.load_pretrained("{expanded(model.source)}", {wanted})\n'
        f'    tokenizer = jaxft.load_tokenizer("{expanded(model.source)}", "{model.revision}")\n'
        '    jaxft.save_pretrained("base", model, params, tokenizer, format="bitsandbytes")\n\n'
    )


def _head_options(trained: Any) -> str:
    """What transformers has to know of a new head."""
    names = trained.config.labels
    options = f", id2label={dict(enumerate(names))!r}, label2id={ {name: i for i, name in enumerate(names)}!r}" if names else ""
    return f'{options}, problem_type="{trained.config.problem_type}"' if names and trained.config.problem_type else options


def model_command(folder: pathlib.Path, trained: Any) -> str:
    """Returns where the model is, and how transformers uses it."""
    if (pipeline := _PIPELINES.get(trained.task)) is not None:
        return (
            f"The model is in {folder}. With transformers:\n\n"
            "    from transformers import pipeline\n\n"
            f'    model = pipeline("{pipeline}", "{folder}")\n'
        )
    auto = auto_class(trained.task)
    return (
        f"The model is in {folder}. With transformers:\n\n"
        f"    from transformers import {auto}\n\n"
        f'    model = {auto}.from_pretrained("{folder}")\n'
    )


def card(experiment: Experiment, summary: Mapping[str, Any], format: str) -> str:
    """Returns a model card with the measured figures, as the hub reads it."""
    source = expanded(experiment.model.source)
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
