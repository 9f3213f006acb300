"""Methods on classifiers of the families beside BERT: where they start, merged as unmerged, and in peft what they are here."""

import jax
import pytest
from method_checks import TOLERANCE, base, check_merge, check_start, logits
from peft_checks import check_ours
from tiny_models import largest_difference, moved

from jaxft.methods import IA3, BitFit, Bottleneck, LoRA, Prefix

OUTPUT = "layers/[0-9]+/output"
OF_ENCODERS = {
    "lora": LoRA(rank=2, alpha=3.0, targets=("query", "value")),
    "ia3": IA3(("key", "value", OUTPUT), (OUTPUT,)),
    "biases": BitFit(),
    "bottleneck": Bottleneck(reduction=4.0),
    "prefix": Prefix(virtual_tokens=3),
}
METHODS = dict.fromkeys(("roberta", "distilbert", "electra"), OF_ENCODERS) | {
    "gpt2": OF_ENCODERS | {"lora": LoRA(rank=2, alpha=3.0, targets=("c_attn",)), "ia3": IA3()}
}
CASES = [(family, name) for family in METHODS for name in OF_ENCODERS]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_method_on_a_classifier(family, name, tmp_path):
    method, name_of_pair = METHODS[family][name], f"{family} sequence_classification"
    if name in ("lora", "ia3", "biases"):
        check_start(method, name_of_pair)
        check_merge(method, name_of_pair)
    else:
        model, params = base(name_of_pair)
        started = logits(method.init(jax.random.key(0), model, params), name_of_pair)
        if name == "bottleneck":  # a prefix is seen from the start
            assert largest_difference(started, logits(params, name_of_pair)) <= TOLERANCE
        assert largest_difference(logits(moved(method, model, params), name_of_pair), logits(params, name_of_pair)) > 0.01
    if name in ("lora", "ia3"):
        check_ours(method, tmp_path, name_of_pair)
