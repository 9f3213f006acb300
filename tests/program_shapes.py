"""What a traced program makes."""


def shapes_of(jaxpr):
    """Yields the shape of every array that a program makes, inner programs included."""
    for equation in jaxpr.eqns:
        for made in equation.outvars:
            yield made.aval.shape
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from shapes_of(inner)
