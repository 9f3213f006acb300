"""What every format of peft promises, checked against peft itself."""

import copy
import json
import tempfile
import warnings

import jax
import numpy as np
import peft
import safetensors.numpy
import torch
from method_checks import IDS, base, logits, outputs, pair
from reference_training import check_gradients, check_losses, our_gradients, our_losses, torch_gradients, torch_losses
from tiny_models import moved, with_adapter

import jaxft
from jaxft.methods.partition import combine

TOLERANCE = 1e-4  # float32 on both sides, logits of order 10


def tuned_by_peft(config, prefix, size=0.1, family="llama"):
    """Returns a model of peft with its adapter's parameters, whose names hold `prefix`, moved at random."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = peft.get_peft_model(copy.deepcopy(pair(family)[0]), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if prefix in name and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * size)
    return model.eval()


def their_logits(model):
    with torch.no_grad():
        return np.asarray(outputs(model(torch.tensor(IDS))))


def load_in_peft(folder, family="llama"):
    """peft only warns of keys and weights that it doesn't expect; here that is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # peft's word on every norm that isn't torch's own
        return peft.PeftModel.from_pretrained(copy.deepcopy(pair(family)[0]), folder).eval()


def tensors(folder):
    return safetensors.numpy.load_file(f"{folder}/adapter_model.safetensors")


def config_of(folder):
    with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
        return json.load(file)


def check_theirs(theirs, folder, family="llama"):
    """Their adapter gives their logits here, merged too, and written again has the same keys and bytes."""
    model, params = base(family)
    theirs.save_pretrained(folder / "theirs")
    tuned, method = jaxft.load_adapter(folder / "theirs", model, params)
    expected = their_logits(theirs)
    assert np.abs(logits(tuned, family) - expected).max() <= TOLERANCE
    assert np.abs(logits(method.merge(model, tuned), family) - expected).max() <= TOLERANCE
    assert np.abs(logits(params, family) - expected).max() > 1e-2
    fresh = method.init(jax.random.key(3), model, params)
    assert jax.tree.structure(fresh) == jax.tree.structure(tuned)
    jaxft.save_adapter(folder / "again", model, tuned, method)
    first, again = tensors(folder / "theirs"), tensors(folder / "again")
    assert {key: (value.dtype, value.shape, value.tobytes()) for key, value in first.items()} == {
        key: (value.dtype, value.shape, value.tobytes()) for key, value in again.items()
    }
    assert config_of(folder / "again").keys() == config_of(folder / "theirs").keys()
    assert np.abs(their_logits(load_in_peft(folder / "again", family)) - expected).max() <= TOLERANCE


def check_ours(method, folder, family="llama", size=0.1):
    """Our adapter gives our logits in peft, and comes back bit for bit."""
    model, params = base(family)
    tuned = moved(method, model, params, size=size)
    jaxft.save_adapter(folder / "ours", model, tuned, method, base_model="owner/base")
    assert np.abs(their_logits(load_in_peft(folder / "ours", family)) - logits(tuned, family)).max() <= TOLERANCE
    back, _ = jaxft.load_adapter(folder / "ours", model, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, tuned, back))


def check_training(theirs, family="llama", steps=True):
    """Gradients of every leaf are theirs, and so are the losses of twenty steps of AdamW."""
    model, params = base(family)
    tuned, method = with_adapter(theirs, model, params)
    expected_loss, expected = torch_gradients(theirs)
    loss, gradients = our_gradients(model, tuned, method)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    _, frozen = jaxft.partition(tuned, method.mask(tuned))
    with tempfile.TemporaryDirectory() as folder:
        jaxft.save_adapter(f"{folder}/adapter", model, combine(gradients, frozen), method)
        found = tensors(f"{folder}/adapter")
    check_gradients({name: found[name] for name in expected}, expected)
    if steps:
        check_losses(our_losses(model, tuned, method), torch_losses(theirs))
