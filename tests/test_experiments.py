"""Every experiment that comes with jaxft, and each of its variants."""

import json

import pytest

import experiments
from jaxft import overrides
from jaxft.errors import UserError

EVERY = [(name, variant) for name in experiments.names() for variant in ("", *experiments.entry(name).variants)]


@pytest.mark.parametrize(("name", "variant"), EVERY)
def test_it_is_well_formed(name, variant):
    found = experiments.load(name, variant)
    assert found.name == (f"{name}:{variant}" if variant else name)
    assert overrides.from_dict(json.loads(json.dumps(overrides.to_dict(found)))) == found
    assert overrides.parse_flags(found, []) == found


@pytest.mark.parametrize("name", experiments.names())
def test_its_docstring_says_what_it_is_and_how_to_run_it(name):
    module = __import__(f"experiments.{name}", fromlist=["get_config"])
    assert experiments.entry(name).summary
    mode = " --mode=sweep" if experiments.entry(name).sweeps else ""
    assert f"python launch.py --experiment={name}{mode}\n" in module.__doc__
    assert "Hardware:" in module.__doc__
    for variant in experiments.entry(name).variants:
        assert f"python launch.py --experiment={name}:{variant}\n" in module.__doc__


@pytest.mark.parametrize("name", experiments.names())
def test_an_unknown_variant_is_refused(name):
    module = __import__(f"experiments.{name}", fromlist=["get_config"])
    with pytest.raises(UserError, match="There is no"):
        module.get_config("9x")
