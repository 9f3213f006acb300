"""How a batch is cut, what the backward pass keeps, and two devices: none of it changes what virtual tokens and bottlenecks learn."""

import pytest
from method_checks import check_cuts, check_two_devices

from jaxft.methods import Bottleneck, Prefix, Prompt, PTuning

METHODS = {
    "prefix and bottleneck": Prefix(5, projection=True, projection_hidden=7) + Bottleneck(reduction=4.0, trained_scale="learned"),
    "prompt": Prompt(5),
    "p-tuning": PTuning(5, hidden_size=12),
}


@pytest.mark.parametrize(
    ("name", "remat"),
    [("prefix and bottleneck", "dots"), ("prefix and bottleneck", "full"), ("prompt", "dots"), ("p-tuning", "full")],
)
def test_packed_accumulated_and_computed_again_it_is_the_same(name, remat):
    check_cuts(METHODS[name], remat=remat)


@pytest.mark.parametrize("name", METHODS)
def test_two_devices_are_one(name):
    check_two_devices(METHODS[name])
