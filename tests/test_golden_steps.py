"""What each experiment's first step computes stays what it is: its data, template, model, method, objective and draws with it."""

import json

import golden_steps
import jax
import numpy as np
import pytest

STEPS = json.loads(golden_steps.RECORD.read_text())


def test_every_experiment_has_a_record():
    assert golden_steps.names() == list(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_the_first_step_is_the_recorded_one(name):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        found = golden_steps.first_step(name)
    for metric, expected in STEPS[name].items():
        np.testing.assert_allclose(
            found[metric], expected, rtol=1e-3, err_msg=f"{name}: {metric}. If that was meant: python tests/golden_steps.py"
        )
