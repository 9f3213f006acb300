"""Which method? Eleven of them on the BERT of full_bert_sentiment, each over three learning rates and three seeds.

    python launch.py --experiment=ablation_methods --mode=sweep

MiniLM-L6 on the bundled reviews, two epochs of 118 steps a run, 99 runs: a rate is chosen for each method by the loss on validation,
figures are of the test reviews. Every method meets the same data, steps and number of tuning runs.

Hardware: two CPU cores, 6 GB of memory for two runs at a time (--sweep.workers=2), which took two hours and a half on an AMD EPYC with
AVX-512. A sweep that is stopped goes on where it was.
On the test, mean of three seeds, loss: LoRA 0.714, rsLoRA 0.731, bottleneck adapters 0.737, DoRA 0.739, partial 0.767, full tuning 0.798,
the others 0.81 to 0.85, about what the majority class has (0.849). Seed by seed LoRA is 0.085 (+- 0.097) below full tuning, rsLoRA 0.068
(0.013), DoRA 0.059 (0.058); intervals of 95%. The report is in benchmarks/results/ablation_methods.
"""

import dataclasses

from experiments import full_bert_sentiment
from jaxft.config import Experiment
from jaxft.errors import unknown
from jaxft.methods import IA3, BitFit, Bottleneck, Full, LoRA, Partial, Prefix, Prompt
from jaxft.sweep import Sweep, grid, product, seeds

VARIANTS = ()

_LORA = (2e-4, 6e-4, 2e-3)
# Each method, what else it needs, and its rates: about a third, one and three times what suits it in so few steps
_METHODS = (
    ({"method": Full()}, (5e-5, 1.5e-4, 5e-4)),
    ({"method": Partial(last=2)}, (1e-4, 3e-4, 1e-3)),
    ({"method": BitFit()}, (3e-4, 1e-3, 3e-3)),
    ({"method": LoRA(rank=8, alpha=16.0)}, _LORA),
    ({"method": LoRA(rank=8, alpha=16.0, dora=True)}, _LORA),
    ({"method": LoRA(rank=32, alpha=16.0, rslora=True)}, _LORA),
    ({"method": LoRA(rank=8, alpha=16.0), "model.quantization": "nf4"}, _LORA),
    ({"method": Bottleneck.seq_bn()}, (3e-4, 1e-3, 3e-3)),
    ({"method": Prefix(virtual_tokens=20)}, (1e-3, 3e-3, 1e-2)),
    ({"method": Prompt(virtual_tokens=20)}, (3e-3, 1e-2, 3e-2)),
    ({"method": IA3()}, (1e-3, 3e-3, 1e-2)),
)


def get_config(variant: str = "") -> Experiment:
    """Returns full_bert_sentiment's experiment, with two epochs and evaluations in between."""
    if variant:
        raise unknown("ablation_methods variant", variant, VARIANTS)
    found = full_bert_sentiment.get_config()
    return dataclasses.replace(
        found,
        name="ablation_methods",
        train=dataclasses.replace(found.train, epochs=2.0, batch_size=2, eval_every=80),  # with 4 LoRA ends at a loss of 0.78, not 0.75
        eval=dataclasses.replace(found.eval, gap=False),
    )


def sweep(variant: str = "") -> Sweep:
    """Returns every method at every one of its rates, with three seeds."""
    runs = [run for method, rates in _METHODS for run in product([method], grid({"optimizer.learning_rate": rates}), seeds(3))]
    return Sweep(runs, metric="loss", vary=("method", "model.quantization"))
