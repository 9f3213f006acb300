"""Sweeps: many runs of one experiment, and the report that compares them."""
