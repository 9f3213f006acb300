"""BERT (Devlin et al. 2018, arXiv:1810.04805) and models of its architecture, as MiniLM (Wang et al. 2020, arXiv:2002.10957)."""

from collections.abc import Mapping
from typing import Any

from jaxft.models import encoder, heads
from jaxft.models.encoder import PLACEMENT, EncoderConfig
from jaxft.models.heads import Architecture

__all__ = ["ALSO_NAMED", "ARCHITECTURES", "HF_IGNORED", "HF_NAMES", "OTHER_HEADS", "PLACEMENT", "BertConfig"]

_OTHERS = ("ForNextSentencePrediction", "ForMultipleChoice", "LMHeadModel")
ARCHITECTURES = heads.architectures("Bert", "bert", "bert", encoder.TASKS, _OTHERS) | {
    "BertForPreTraining": Architecture("bert", heads.MASKED_LM, "bert")  # which has a head for the next sentence too
}

LAYER_NAMES = (
    ("{base}.encoder.layer.{layer}.attention.self.query.weight", "layers/{layer}/attention/query/kernel", "transpose"),
    ("{base}.encoder.layer.{layer}.attention.self.query.bias", "layers/{layer}/attention/query/bias", ""),
    ("{base}.encoder.layer.{layer}.attention.self.key.weight", "layers/{layer}/attention/key/kernel", "transpose"),
    ("{base}.encoder.layer.{layer}.attention.self.key.bias", "layers/{layer}/attention/key/bias", ""),
    ("{base}.encoder.layer.{layer}.attention.self.value.weight", "layers/{layer}/attention/value/kernel", "transpose"),
    ("{base}.encoder.layer.{layer}.attention.self.value.bias", "layers/{layer}/attention/value/bias", ""),
    ("{base}.encoder.layer.{layer}.attention.output.dense.weight", "layers/{layer}/attention/output/kernel", "transpose"),
    ("{base}.encoder.layer.{layer}.attention.output.dense.bias", "layers/{layer}/attention/output/bias", ""),
    ("{base}.encoder.layer.{layer}.attention.output.LayerNorm.weight", "layers/{layer}/attention_norm/scale", ""),
    ("{base}.encoder.layer.{layer}.attention.output.LayerNorm.bias", "layers/{layer}/attention_norm/bias", ""),
    ("{base}.encoder.layer.{layer}.intermediate.dense.weight", "layers/{layer}/intermediate/kernel", "transpose"),
    ("{base}.encoder.layer.{layer}.intermediate.dense.bias", "layers/{layer}/intermediate/bias", ""),
    ("{base}.encoder.layer.{layer}.output.dense.weight", "layers/{layer}/output/kernel", "transpose"),
    ("{base}.encoder.layer.{layer}.output.dense.bias", "layers/{layer}/output/bias", ""),
    ("{base}.encoder.layer.{layer}.output.LayerNorm.weight", "layers/{layer}/output_norm/scale", ""),
    ("{base}.encoder.layer.{layer}.output.LayerNorm.bias", "layers/{layer}/output_norm/bias", ""),
)
BASE_NAMES = (
    ("{base}.embeddings.word_embeddings.weight", "embed/embedding", ""),
    ("{base}.embeddings.position_embeddings.weight", "position_embed/embedding", ""),
    ("{base}.embeddings.token_type_embeddings.weight", "token_type_embed/embedding", ""),
    ("{base}.embeddings.LayerNorm.weight", "embed_norm/scale", ""),
    ("{base}.embeddings.LayerNorm.bias", "embed_norm/bias", ""),
    *LAYER_NAMES,
)
CLASSIFIER_NAMES = (  # of token classification and question answering, in all these families
    ("classifier.weight", "classifier/kernel", "transpose"),
    ("classifier.bias", "classifier/bias", ""),
    ("qa_outputs.weight", "qa_outputs/kernel", "transpose"),
    ("qa_outputs.bias", "qa_outputs/bias", ""),
)

# (name in Hugging Face's files, path in ours, transform); {layer} is the layer's number, {base} the base's own name within a model with a
# head. Linear weights are (out, in) there.
HF_NAMES = (
    *BASE_NAMES,
    ("{base}.pooler.dense.weight", "pooler/kernel", "transpose"),
    ("{base}.pooler.dense.bias", "pooler/bias", ""),
    *CLASSIFIER_NAMES,
    ("cls.predictions.transform.dense.weight", "lm_head/dense/kernel", "transpose"),
    ("cls.predictions.transform.dense.bias", "lm_head/dense/bias", ""),
    ("cls.predictions.transform.LayerNorm.weight", "lm_head/norm/scale", ""),
    ("cls.predictions.transform.LayerNorm.bias", "lm_head/norm/bias", ""),
    ("cls.predictions.bias", "lm_head/bias", ""),
    ("cls.predictions.decoder.weight", "lm_head/decoder/kernel", "transpose"),
    ("cls.predictions.decoder.bias", "lm_head/decoder/bias", ""),
)
# A second name that files may have for a tensor, beside the first or in its place.
ALSO_NAMED = {
    "{base}.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight",
    "cls.predictions.bias": "cls.predictions.decoder.bias",
}
HF_IGNORED = (r"(.*\.)?embeddings\.(position_ids|token_type_ids)",)  # in old files; counted, not a parameter
CLASSIFIERS = (r"(\w+\.)?pooler\.dense\.\w+", r"classifier\.((dense|out_proj)\.)?\w+", r"qa_outputs\.\w+")  # in all these families
OTHER_HEADS = (r"cls\..+", *CLASSIFIERS)  # that another task's files may hold


class BertConfig(EncoderConfig):
    """The shape of a BERT."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> EncoderConfig:
        """Reads a config.json, completed by transformers' config class (`PreTrainedConfig.to_dict()`)."""
        return cls(**encoder.common_fields(hf, ARCHITECTURES) | {"lm_act": encoder.activation(hf["hidden_act"])})
