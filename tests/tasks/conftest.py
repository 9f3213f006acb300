"""What whole runs need, as in tests/train."""

from train.conftest import as_launched

__all__ = ["as_launched"]
