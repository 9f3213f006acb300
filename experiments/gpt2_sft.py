"""Supervised fine-tuning of GPT-2, by LoRA, on medical text.

    python launch.py --experiment=gpt2_sft

The recipe of lora_llama2 on GPT-2 (124M parameters): the user turn gives the drug and the review of a patient, the assistant turn names
the condition and whether the experience was positive, neutral or negative. GPT-2's tokenizer has no chat template; the turns are written
by the template `plain`, each under its role as a heading:

    Name the condition that the patient takes the drug for, ...

    ### User:
    Drug: ...
    Review: ...

    ### Assistant:
    Condition: ...
    Experience: ...<|endoftext|>

While it trains, the model drops a tenth of its embeddings, attention weights and sub-layers' outputs, as its config.json says.
Adapters go to `peft` (`fan_in_fan_out`, GPT-2's layers are Conv1D); `--mode=export --format=hf` writes the merged model, and the template
with its tokenizer.

The weights are not bundled: `openai-community/gpt2` comes from the hub, 0.5 GB. Without a network, download it elsewhere
(`hf download openai-community/gpt2 --local-dir FOLDER`) and give `--config.model.source=FOLDER`. Larger ones fit in its place:
`--config.model.source=openai-community/gpt2-medium`, `gpt2-large`, `gpt2-xl`, `distilbert/distilgpt2`.

Hardware: two CPU cores. Neither time, memory nor what it reaches is measured here: the machine that measured the other recipes has no
network. Measured with GPT-2's vocabulary alone: a row has 158 tokens in the mean, 341 at most, which max_length holds. Computed:
1,179,648 of 125,619,504 parameters train; 0.5 GB of weights, 19 MB of LoRA with its gradient and moments.
"""

import dataclasses

from experiments import lora_llama2
from jaxft.config import Experiment, ModelConfig
from jaxft.errors import unknown


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment; it has no variants."""
    if variant:
        raise unknown("gpt2_sft variant", variant, ())
    base = lora_llama2.get_config()
    return dataclasses.replace(
        base,
        name="gpt2_sft",
        model=ModelConfig(source="openai-community/gpt2"),
        data=dataclasses.replace(base.data, template="plain"),
    )
