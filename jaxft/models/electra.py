"""ELECTRA (Clark et al. 2020, arXiv:2003.10555): the discriminator, and the generator, which is its masked_lm.

BERT's layers; embeddings may be narrower than the layers, and the classifier has a dense layer of its own.
"""

from collections.abc import Mapping
from typing import Any

from jaxft.models import bert, encoder, heads
from jaxft.models.bert import HF_IGNORED
from jaxft.models.encoder import PLACEMENT, EncoderConfig

__all__ = ["ALSO_NAMED", "ARCHITECTURES", "HF_IGNORED", "HF_NAMES", "OTHER_HEADS", "PLACEMENT", "ElectraConfig"]

_OTHERS = ("ForPreTraining", "ForMultipleChoice", "ForCausalLM")
ARCHITECTURES = heads.architectures("Electra", "electra", "electra", encoder.TASKS, _OTHERS)

# (name in Hugging Face's files, path in ours, transform), as BERT's.
HF_NAMES = (
    *bert.BASE_NAMES,
    ("{base}.embeddings_project.weight", "embed_projection/kernel", "transpose"),
    ("{base}.embeddings_project.bias", "embed_projection/bias", ""),
    *bert.CLASSIFIER_NAMES,
    *encoder.DENSE_HEAD_NAMES,
    ("generator_predictions.dense.weight", "lm_head/dense/kernel", "transpose"),
    ("generator_predictions.dense.bias", "lm_head/dense/bias", ""),
    ("generator_predictions.LayerNorm.weight", "lm_head/norm/scale", ""),
    ("generator_predictions.LayerNorm.bias", "lm_head/norm/bias", ""),
    ("generator_lm_head.bias", "lm_head/bias", ""),
    ("generator_lm_head.weight", "lm_head/decoder/kernel", "transpose"),
    ("generator_lm_head.bias", "lm_head/decoder/bias", ""),
)
ALSO_NAMED = {"{base}.embeddings.word_embeddings.weight": "generator_lm_head.weight"}
OTHER_HEADS = (r"(generator_predictions|generator_lm_head|discriminator_predictions|sequence_summary)\..+", *bert.CLASSIFIERS)


class ElectraConfig(EncoderConfig):
    """The shape of an ELECTRA."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> EncoderConfig:
        """Reads a config.json, completed by transformers' config class (`PreTrainedConfig.to_dict()`)."""
        fields = {"embedding_size": hf["embedding_size"], "pooling_head": "dense", "pooling_act": "gelu"}
        return cls(**encoder.common_fields(hf, ARCHITECTURES) | fields)
