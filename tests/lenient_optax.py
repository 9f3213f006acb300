"""optax's updates mix integers and floats, which the suite's strict type promotion forbids: they alone run without it."""

import jax
import optax

from jaxft.train import optimizer as optimizers


def lenient(optimizer):
    """Returns the optimizer with updates under standard promotion."""

    def update(*arguments):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*arguments)

    return optax.GradientTransformation(optimizer.init, update)


def make_optimizer(config, steps):
    """Returns jaxft's optimizer, lenient."""
    return lenient(optimizers.make_optimizer(config, steps))
