"""What whole runs are made of, as in tests/train."""

from train.conftest import as_launched, material, reviews

__all__ = ["as_launched", "material", "reviews"]
