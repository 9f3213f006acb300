"""optax's updates mix integers and floats, which the suite's strict type promotion forbids: they alone run without it."""

import jax
import optax

from jaxft.train import optimizer as optimizers


def lenient(optimizer):
    """Returns the optimizer with updates under standard promotion."""

    def update(*arguments, **named):
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(optimizer).update(*arguments, **named)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def make_optimizer(config, steps):
    """Returns jaxft's optimizer, lenient."""
    return lenient(optimizers.make_optimizer(config, steps))
