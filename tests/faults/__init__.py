"""Faults injected into real processes, and what must come out of it."""
