"""Convolution on a CPU behind one function, `convolve`.

XLA's own convolution runs as a plain loop nest in many cases, up to a hundred times slower than it
could. `conv` chooses a form for the convolution and for each gradient; `forms` has the forms.
"""

from bs_jax.models.cpu.conv import convolve

__all__ = ["convolve"]
