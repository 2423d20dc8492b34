"""Experiments: points -> sweep -> records -> statistics -> report."""
