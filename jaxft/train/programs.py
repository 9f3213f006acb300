"""What a traced program does, read from its equations."""

import math
from collections.abc import Iterator
from typing import Any


def operations(program: Any) -> int:
    """Returns the floating-point operations of a program's matrix products: two for each multiplication and addition.

    Loops count as often as they run, where that is known (scans); of branches, the longest counts. Elementwise work isn't counted.

    Args:
      program: a jaxpr.

    >>> import jax
    >>> a, b = jax.numpy.ones((3, 4)), jax.numpy.ones((4, 5))
    >>> operations(jax.make_jaxpr(lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0, length=7))(a, b).jaxpr)
    840
    """
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
            continue
        inside = [operations(part) for part in _programs(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inside)
        else:
            total += equation.params.get("length", 1) * sum(inside) if equation.primitive.name == "scan" else sum(inside)
    return total


_DRAWS = ("random_bits", "random_unwrap")  # jax.random's own, and what reads a key's words


def draws(program: Any) -> int:
    """Returns at how many places a program, a jaxpr, draws random numbers, from a key or from a hash of its words.

    >>> import jax
    >>> draws(jax.make_jaxpr(lambda key: jax.random.uniform(key))(jax.random.key(0)).jaxpr)
    1
    >>> draws(jax.make_jaxpr(lambda key: jax.random.fold_in(key, 1))(jax.random.key(0)).jaxpr)
    0
    >>> draws(jax.make_jaxpr(jax.random.key_data)(jax.random.key(0)).jaxpr)
    1
    """
    return sum((found.primitive.name in _DRAWS) + sum(map(draws, _programs(found.params))) for found in program.eqns)


def _programs(parameters: dict[str, Any]) -> Iterator[Any]:
    """The programs among an equation's parameters."""
    for value in parameters.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(inner := getattr(part, "jaxpr", part), "eqns"):
                yield inner
