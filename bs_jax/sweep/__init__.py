"""Sweeps: points, the plan of a sweep, the processes that train it, its progress."""
