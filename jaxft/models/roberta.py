"""RoBERTa, XLM-R and CamemBERT.

Liu et al. 2019 (arXiv:1907.11692); Conneau et al. 2019 (arXiv:1911.02116); Martin et al. 2019 (arXiv:1911.03894). BERT's
layers; the table of positions begins after the padding token's number, and the classifier has a dense layer of its own.
"""

from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError
from jaxft.models import bert, encoder, heads
from jaxft.models.bert import HF_IGNORED
from jaxft.models.encoder import PLACEMENT, EncoderConfig

__all__ = ["ALSO_NAMED", "ARCHITECTURES", "HF_IGNORED", "HF_NAMES", "OTHER_HEADS", "PLACEMENT", "RobertaConfig"]

_STEMS = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}
_OTHERS = ("ForCausalLM", "ForMultipleChoice")
ARCHITECTURES = {
    name: found
    for kind, stem in _STEMS.items()
    for name, found in heads.architectures(stem, kind, "roberta", encoder.TASKS, _OTHERS).items()
}

# (name in Hugging Face's files, path in ours, transform), as BERT's.
HF_NAMES = (
    *bert.BASE_NAMES,
    *bert.CLASSIFIER_NAMES,
    *encoder.DENSE_HEAD_NAMES,
    ("lm_head.dense.weight", "lm_head/dense/kernel", "transpose"),
    ("lm_head.dense.bias", "lm_head/dense/bias", ""),
    ("lm_head.layer_norm.weight", "lm_head/norm/scale", ""),
    ("lm_head.layer_norm.bias", "lm_head/norm/bias", ""),
    ("lm_head.bias", "lm_head/bias", ""),
    ("lm_head.decoder.weight", "lm_head/decoder/kernel", "transpose"),
    ("lm_head.decoder.bias", "lm_head/decoder/bias", ""),
)
ALSO_NAMED = {
    "{base}.embeddings.word_embeddings.weight": "lm_head.decoder.weight",
    "lm_head.bias": "lm_head.decoder.bias",
}
OTHER_HEADS = (r"lm_head\..+", *bert.CLASSIFIERS)


class RobertaConfig(EncoderConfig):
    """The shape of a RoBERTa."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> EncoderConfig:
        """Reads a config.json, completed by transformers' config class (`PreTrainedConfig.to_dict()`)."""
        if hf["pad_token_id"] is None:
            raise UserError("config.json has no pad_token_id, which says where a RoBERTa's positions begin. RoBERTa's own is 1.")
        before = hf["pad_token_id"] + 1
        fields = {"position_offset": before, "max_position_embeddings": hf["max_position_embeddings"] - before, "pooling_head": "dense"}
        return cls(**encoder.common_fields(hf, ARCHITECTURES) | fields)
