"""Convolutions on a CPU: forms of the derivatives that XLA compiles to quicker code."""
