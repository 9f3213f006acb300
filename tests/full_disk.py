"""A disk that is full: the system refuses to write more."""

import contextlib
import resource


@contextlib.contextmanager
def full_above(size):
    """Lets no file of this process grow above `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
