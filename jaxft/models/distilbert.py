"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's layers, without token types, under names of its own."""

from collections.abc import Mapping
from typing import Any

from jaxft.models import bert, encoder, heads
from jaxft.models.bert import HF_IGNORED
from jaxft.models.encoder import PLACEMENT, EncoderConfig

__all__ = ["ALSO_NAMED", "ARCHITECTURES", "HF_IGNORED", "HF_NAMES", "OTHER_HEADS", "PLACEMENT", "DistilBertConfig"]

ARCHITECTURES = heads.architectures("DistilBert", "distilbert", "distilbert", encoder.TASKS, ("ForMultipleChoice",))

# (name in Hugging Face's files, path in ours, transform), as BERT's.
HF_NAMES = (
    ("{base}.embeddings.word_embeddings.weight", "embed/embedding", ""),
    ("{base}.embeddings.position_embeddings.weight", "position_embed/embedding", ""),
    ("{base}.embeddings.LayerNorm.weight", "embed_norm/scale", ""),
    ("{base}.embeddings.LayerNorm.bias", "embed_norm/bias", ""),
    ("{base}.transformer.layer.{layer}.attention.q_lin.weight", "layers/{layer}/attention/query/kernel", "transpose"),
    ("{base}.transformer.layer.{layer}.attention.q_lin.bias", "layers/{layer}/attention/query/bias", ""),
    ("{base}.transformer.layer.{layer}.attention.k_lin.weight", "layers/{layer}/attention/key/kernel", "transpose"),
    ("{base}.transformer.layer.{layer}.attention.k_lin.bias", "layers/{layer}/attention/key/bias", ""),
    ("{base}.transformer.layer.{layer}.attention.v_lin.weight", "layers/{layer}/attention/value/kernel", "transpose"),
    ("{base}.transformer.layer.{layer}.attention.v_lin.bias", "layers/{layer}/attention/value/bias", ""),
    ("{base}.transformer.layer.{layer}.attention.out_lin.weight", "layers/{layer}/attention/output/kernel", "transpose"),
    ("{base}.transformer.layer.{layer}.attention.out_lin.bias", "layers/{layer}/attention/output/bias", ""),
    ("{base}.transformer.layer.{layer}.sa_layer_norm.weight", "layers/{layer}/attention_norm/scale", ""),
    ("{base}.transformer.layer.{layer}.sa_layer_norm.bias", "layers/{layer}/attention_norm/bias", ""),
    ("{base}.transformer.layer.{layer}.ffn.lin1.weight", "layers/{layer}/intermediate/kernel", "transpose"),
    ("{base}.transformer.layer.{layer}.ffn.lin1.bias", "layers/{layer}/intermediate/bias", ""),
    ("{base}.transformer.layer.{layer}.ffn.lin2.weight", "layers/{layer}/output/kernel", "transpose"),
    ("{base}.transformer.layer.{layer}.ffn.lin2.bias", "layers/{layer}/output/bias", ""),
    ("{base}.transformer.layer.{layer}.output_layer_norm.weight", "layers/{layer}/output_norm/scale", ""),
    ("{base}.transformer.layer.{layer}.output_layer_norm.bias", "layers/{layer}/output_norm/bias", ""),
    ("pre_classifier.weight", "pooler/kernel", "transpose"),
    ("pre_classifier.bias", "pooler/bias", ""),
    *bert.CLASSIFIER_NAMES,
    ("vocab_transform.weight", "lm_head/dense/kernel", "transpose"),
    ("vocab_transform.bias", "lm_head/dense/bias", ""),
    ("vocab_layer_norm.weight", "lm_head/norm/scale", ""),
    ("vocab_layer_norm.bias", "lm_head/norm/bias", ""),
    ("vocab_projector.bias", "lm_head/bias", ""),
    ("vocab_projector.weight", "lm_head/decoder/kernel", "transpose"),
    ("vocab_projector.bias", "lm_head/decoder/bias", ""),
)
ALSO_NAMED = {"{base}.embeddings.word_embeddings.weight": "vocab_projector.weight"}
OTHER_HEADS = (r"(vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier|classifier|qa_outputs)\.\w+",)
_DROPOUTS = {  # the key of config.json of the rate before each head
    heads.SEQUENCE_CLASSIFICATION: "seq_classif_dropout",
    heads.TOKEN_CLASSIFICATION: "dropout",
    heads.QUESTION_ANSWERING: "qa_dropout",
}


class DistilBertConfig(EncoderConfig):
    """The shape of a DistilBERT."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> EncoderConfig:
        """Reads a config.json, completed by transformers' config class (`PreTrainedConfig.to_dict()`)."""
        architecture = ARCHITECTURES[hf["architectures"][0]]
        rate = _DROPOUTS.get(architecture.task)
        return cls(
            **heads.common_fields(hf, architecture),
            family=architecture.model_type,
            vocab_size=hf["vocab_size"],
            hidden_size=hf["dim"],
            embedding_size=hf["dim"],
            intermediate_size=hf["hidden_dim"],
            num_hidden_layers=hf["n_layers"],
            num_attention_heads=hf["n_heads"],
            max_position_embeddings=hf["max_position_embeddings"],
            hidden_act=encoder.activation(hf["activation"]),
            lm_act=encoder.activation(hf["activation"]),
            pooling_act="relu",
            initializer_range=hf["initializer_range"],
            hidden_dropout=hf["dropout"],
            attention_dropout=hf["attention_dropout"],
            classifier_dropout=hf[rate] if rate else 0.0,
            tie_word_embeddings=encoder.is_tied(hf, architecture.task),
        )

    @property
    def dropouts(self) -> dict[str, tuple[str, ...]]:
        """The fields that have the rate of each kind of dropout: there is none behind attention."""
        return super().dropouts | {"hidden_dropout": ("hidden_dropout",)}
