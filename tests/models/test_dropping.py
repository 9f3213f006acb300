"""What is dropped: each number by itself, as often as the rate says, and the same ones for the same key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.dropout import dropped, kept

ROWS, COLUMNS = 256, 512
KEYS = {"one": jax.random.key(0), "next": jax.random.key(1), "folded": jax.random.fold_in(jax.random.key(0), 1)}


def centred(key, share, shape=(ROWS, COLUMNS)):
    """Returns the draws as numbers of mean 0 and variance 1, if they are what they should be."""
    return (np.asarray(kept(key, share, shape)) - share) / np.sqrt(share * (1 - share))


def deviations(products):
    """Returns how many standard deviations the mean of products of independent draws is from 0."""
    return products.mean() * np.sqrt(products.size)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_the_share_that_stays(key, share):
    draws = centred(key, share)
    assert abs(deviations(draws)) < 4.5
    for axis, size in ((0, ROWS), (1, COLUMNS)):  # the sums of rows and of columns spread as those of independent draws do
        spread = (draws.sum(axis) / np.sqrt(size)).var()
        assert abs(spread - 1) < 4.5 * np.sqrt((2 + 1 / (size * share * (1 - share))) / draws.shape[1 - axis])


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_neighbours_hang_not_together(key):
    draws = centred(key, 0.9)
    along = np.array([deviations(draws[:, lag:] * draws[:, :-lag]) for lag in range(1, 65)])
    across = np.array([deviations(draws[lag:] * draws[:-lag]) for lag in range(1, 65)])
    assert np.abs([along, across]).max() < 5
    assert 0.7 < along.std() < 1.3
    assert 0.7 < across.std() < 1.3


def test_keys_hang_not_together():
    draws = [centred(key, 0.9) for key in KEYS.values()]
    for number, one in enumerate(draws):
        for other in draws[number + 1 :]:
            assert abs(deviations(one * other)) < 4.5


def test_leading_axes_are_one():
    key = KEYS["folded"]
    assert np.array_equal(kept(key, 0.9, (4, 3, 8, 5)), np.reshape(kept(key, 0.9, (96, 5)), (4, 3, 8, 5)))


def test_everything_stays_at_rate_zero_and_the_rate_may_be_traced():
    x = jnp.arange(1.0, 4097.0).reshape(64, 64)
    run = jax.jit(lambda x, rate: dropped(x, rate, KEYS["one"]))
    assert np.array_equal(run(x, jnp.float32(0.0)), x)
    assert dropped(x, 0.0, KEYS["one"]) is x
    assert dropped(x, None, KEYS["one"]) is x
    assert dropped(x, 0.5, None) is x
    found = np.asarray(run(x, jnp.float32(0.25)))
    np.testing.assert_allclose(found, dropped(x, 0.25, KEYS["one"]), rtol=1e-6)
    np.testing.assert_allclose(found[found != 0], np.asarray(x)[found != 0] / 0.75, rtol=1e-6)
    assert run._cache_size() == 1
    assert dropped(x.astype(jnp.bfloat16), 0.5, KEYS["one"]).dtype == jnp.bfloat16
