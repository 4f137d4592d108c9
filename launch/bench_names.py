"""Names of variants that others are compared with. Imports nothing, so that a report needs no torch model."""

BLOCKING = "ordinary_blocking"
"""Ordinary wiring, every exchange waited for at once: what speed-ups are against."""

FREE = "no_communication"
"""The same stages without the exchanges: the bound."""

TENSOR = "tp_"
"""What the names of tensor-parallel variants begin with, these two among them."""
