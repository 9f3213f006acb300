"""The typed configuration: one frozen dataclass a concern, every field with its meaning and default.

An experiment returns an `Experiment`; `--config.PATH=VALUE` overrides any field of it. Values are checked once, in `check`, before
anything expensive starts.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which pre-trained model, and in which type it computes."""

    source: str = ""  # hub id, local folder, `.gguf` file, or `bundled:NAME`
    revision: str = "main"  # branch, tag or commit of a hub id
    dtype: str = "auto"  # compute type: float32, bfloat16, float16; auto is float32 on CPU and bfloat16 on accelerators
    quantization: str = "none"  # how frozen kernels are held: none (as the model's files have them), nf4, fp4, or int8
    double_quantization: bool = True  # with quantization: the blocks' scales in 8 bits too
    block_size: int = 64  # with quantization: weights that share a scale, a power of two from 32 to 4096
    quantized: tuple[str, ...] = ("layers",)  # patterns of the kernels that are quantized; layers: all but the output head
    hidden_dropout: float = -1.0  # rate on embeddings and on what each sub-layer adds, in training; -1: that of the model's config.json
    attention_dropout: float = -1.0  # the same, on attention's weights
    classifier_dropout: float = -1.0  # the same, before the head of a classification


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which rows, and how they become tokens."""

    train: str = ""  # `owner/name[@config][:split]` on the hub, a .jsonl, .json, .csv, .tsv or .parquet file, or `bundled:NAME[:split]`
    validation: str = ""  # the same; where empty, cut from train by `split`
    test: str = ""  # the same; where empty, cut from train by `split`
    unlabelled: str = ""  # the same, rows to learn from without labels, for an objective that does: labels in it are ignored
    labelled_fraction: float = 1.0  # share of the training rows whose labels are used; the others are rows without labels
    split: tuple[float, float, float] = (0.9, 0.1, 0.0)  # shares of train, validation, test, for those that aren't given
    folds: int = 0  # cross-validation: parts of the training rows, each held out once as validation; 0: none
    fold: int = -1  # with folds: the part held out, from 0; -1: each in its turn, a run each in the run's folder
    limit: int = 0  # use the first so many rows of each set; 0 is all
    system: str = ""  # system message put before each row that has none; may name columns in braces
    prompt: str = ""  # format of the user turn from the columns, "Drug: {drug}"; empty: the row's own format is recognised
    completion: str = ""  # format of the assistant turn, "Condition: {condition}"
    template: str = ""  # chat template in place of the tokenizer's: Jinja text, the path of a file, or plain: roles as headings
    text: str = "{text}"  # format of the text that is classified, from the columns
    text_pair: str = ""  # format of a second text, as "{question}"; empty: the column text_pair, where there is one
    label: str = "label"  # the column of labels
    tokens: str = "tokens"  # the column of a text's words, a list
    tags: str = "tags"  # the column of their tags, a list: names, or numbers of classes
    loss: str = "auto"  # scored tokens: assistant (every assistant turn), completion (the last turn), all; auto: by the row's format
    max_length: int = 512  # tokens a row
    balanced: bool = False  # each class as often as any other in each epoch, by repeating examples of the rarer ones
    packing: bool = True  # several examples a row; attention never crosses them
    share_prefix: bool = True  # with packing: tokens that all examples begin with stand once a row
    cache: bool = True  # keep tokenized rows on disk, by content: those of SFT and multiple choice


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 0  # optimizer steps; 0: by epochs
    epochs: float = 1.0  # passes over the training rows, where steps is 0
    batch_size: int = 8  # rows a micro-batch, over all devices (with packing, a row holds several examples)
    unlabelled_batch_size: int = 0  # the same, of rows without labels; 0: batch_size
    accumulation: int = 1  # micro-batches an optimizer step
    seed: int = 0  # of everything random: (seed, purpose, step)
    log_every: int = 1  # steps between lines of metrics.jsonl
    loggers: tuple[str, ...] = ()  # where the figures go too, beside metrics.jsonl and TensorBoard: wandb, mlflow
    eval_every: int = 0  # steps between evaluations on validation; 0: at the end only
    checkpoint_every: int = 50  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept, beside the best one
    best_metric: str = "loss"  # the validation metric that names the best checkpoint
    best_mode: str = "min"  # min or max
    patience: int = 0  # evaluations without improvement before stopping early; 0: never
    remat: str = "none"  # what the backward pass computes again: none, dots (all but products; offload keeps them on the host), full
    r_drop: float = 0.0  # passes a batch twice, with different dropout: weight of their divergence (Liang et al. 2021, arXiv:2106.14448)
    mixout: float = 0.0  # share of the trainable weights that a step takes as before training (Lee et al. 2020, arXiv:1909.11299)
    neftune_alpha: float = 0.0  # noise on embeddings (Jain et al. 2023, arXiv:2310.05914)
    average: str = "none"  # of the trainable weights over steps, measured and exported in their place: none, ema (exponential), swa (mean)
    ema_decay: float = 0.999  # ema: what of the average stays at a step; less in the first steps
    swa_start: float = 0.5  # swa: share of the steps after which the mean begins (Izmailov et al. 2018, arXiv:1803.05407)
    data_parallel: int = -1  # devices along the mesh's axes; -1: what the others leave
    fsdp_parallel: int = 1  # devices that share the weights, each a part
    tensor_parallel: int = 1  # devices that share each product


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update."""

    name: str = "adamw"  # adamw, adafactor, lion, sgd
    learning_rate: float = 2e-4  # peak
    schedule: str = "cosine"  # constant, linear, cosine, wsd (warmup, stable, decay)
    warmup: float = 0.03  # share of the steps, or a number of steps where 1 or more
    decay: float = 0.2  # wsd: share of the steps that decay
    final_scale: float = 0.0  # rate at the end, as a share of the peak
    weight_decay: float = 0.0  # not on biases, norms and scales
    clip_norm: float = 1.0  # global norm of the trainable gradient; 0: no clipping
    b1: float = 0.9  # first-moment decay; momentum of sgd
    b2: float = 0.999  # second-moment decay
    eps: float = 1e-8  # added to the root of the second moment
    moments: str = "float32"  # what adamw and lion keep between steps: float32, or int8 in blocks of 256, a quarter of the memory
    offload: bool = False  # hold the optimizer's state in the host's memory; a device has it while it updates


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured before and after training, and how text is generated for it."""

    split: str = "test"  # validation, test or train; of folds, each in its turn, the part held out
    limit: int = 0  # examples; 0 is all
    batch_size: int = 16  # rows a batch
    general: str = ""  # plain texts, named as data.train: their loss before and after training tells what is forgotten; SFT alone
    gap: bool = True  # at each evaluation in training, also measure the loss on as many training rows as validation has
    generate: bool = True  # also generate answers and compare them with the true ones
    max_new_tokens: int = 32  # of a generated answer, at most
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run: model, data, method, task, and how it is trained and measured."""

    name: str
    model: ModelConfig
    data: DataConfig
    method: Any  # a value of jaxft.methods, as jaxft.methods.LoRA(rank=8)
    task: Any  # a value of jaxft.tasks, as jaxft.tasks.SFT()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    objective: Any = None  # a value of jaxft.objectives; None: the task's own loss alone
