"""LoRA fine-tuning of a Llama model on medical text.

    python launch.py --experiment=lora_llama2

SmolLM2-135M-Instruct, a small Llama model, learns to read a drug review: the user turn gives the drug and the review, the assistant
turn names the condition and whether the experience was positive, neutral or negative. Runs anywhere, with nothing downloaded.

Hardware: two CPU cores, 2.5 GiB of memory; 297 tokens/s, a step of about 1,290 tokens in 4.3 s, 356 s in all (AMD EPYC with AVX-512);
665 s in all (Intel Xeon at 2.5 GHz, 8.1 s a step); before steps kept their memory 359 s in all (Intel Xeon with AMX), 661 s in all (AMD
EPYC without AVX-512), 954 s in all (one of 2017).
Measured result, 50 steps, 48 reviews held out, exact match of condition, rating, both (answer loss): tuned 37.5%, 83.3%, 31.2% (0.514);
majority answer 14.6%, 75.0%, 10.4%; untuned 0% (4.230).

Variants: Llama 2 itself, in bfloat16, on medical flash cards. Their licence has to be accepted on the hub first. Memory is computed:
weights, LoRA with its gradient and moments, the layers' inputs (remat=full) and the work of one layer. All devices share the weights;
their number divides the 8 rows of a micro-batch (70b: the 8 rows, for every 4 devices).

    python launch.py --experiment=lora_llama2:7b
Hardware: one accelerator of 32 GB (weights 13.5 GB, 23 GB in all), or of 24 GB with --config.train.batch_size=4
--config.train.accumulation=4 (19 GB in all). Not measured here.

    python launch.py --experiment=lora_llama2:13b
Hardware: one accelerator of 48 GB (weights 26.0 GB, 40 GB in all), or two of 32 GB (21 GB each). Not measured here.

    python launch.py --experiment=lora_llama2:70b
Hardware: eight accelerators of 80 GB (weights 138.0 GB, 17.2 GB on each; 37 GB in all on each). Not measured here.
"""

from jaxft.config import DataConfig, EvalConfig, Experiment, ModelConfig, OptimizerConfig, TrainConfig
from jaxft.errors import unknown
from jaxft.methods import LoRA
from jaxft.tasks import SFT

VARIANTS = ("7b", "13b", "70b")

_LEARNING_RATES = {"7b": 2e-4, "13b": 2e-4, "70b": 1e-4}  # the largest takes the smaller rate, as in QLoRA (arXiv:2305.14314), table 9


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment: SmolLM2 on drug reviews, or the variant's Llama 2 on medical flash cards."""
    if not variant:
        return _smollm2()
    if variant not in VARIANTS:
        raise unknown("lora_llama2 variant", variant, VARIANTS)
    return _llama2(variant)


def _smollm2() -> Experiment:
    return Experiment(
        name="lora_llama2",
        model=ModelConfig(source="bundled:smollm2-135m-instruct"),
        data=DataConfig(
            train="bundled:drug-reviews:train",
            test="bundled:drug-reviews:test",
            split=(0.9, 0.1, 0.0),
            system="Name the condition that the patient takes the drug for, and whether the experience was positive, neutral or negative.",
            prompt="Drug: {drug}\nReview: {text:.1200}",  # the one review that is longer is cut at 1200 characters
            completion="Condition: {condition}\nExperience: {rating}",
            max_length=384,
        ),
        method=LoRA(rank=8, alpha=16.0),
        task=SFT(),
        train=TrainConfig(steps=50, batch_size=3, remat="dots"),  # 3 packed rows hold about 8 reviews
        optimizer=OptimizerConfig(learning_rate=1e-3),
        eval=EvalConfig(limit=48),
    )


def _llama2(size: str) -> Experiment:
    return Experiment(
        name=f"lora_llama2:{size}",
        model=ModelConfig(source=f"meta-llama/Llama-2-{size}-chat-hf", dtype="bfloat16"),
        data=DataConfig(train="medalpaca/medical_meadow_medical_flashcards:train", split=(0.94, 0.03, 0.03), max_length=2048),
        method=LoRA(rank=16, alpha=32.0),
        task=SFT(),
        train=TrainConfig(
            epochs=2.0,
            batch_size=8,
            accumulation=2,
            eval_every=50,
            remat="full",
            data_parallel=1,
            fsdp_parallel=-1,
            tensor_parallel=4 if size == "70b" else 1,
        ),
        optimizer=OptimizerConfig(learning_rate=_LEARNING_RATES[size]),
        eval=EvalConfig(limit=500, generate=False),  # free text: exact match says nothing
    )
