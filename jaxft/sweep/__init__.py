"""Sweeps: many runs of one experiment, and the report that compares them."""

from jaxft.sweep.space import Draw, Search, Sweep, choice, draws, grid, log_uniform, product, seeds, uniform, zipped

__all__ = ["Draw", "Search", "Sweep", "choice", "draws", "grid", "log_uniform", "product", "seeds", "uniform", "zipped"]
