"""Kernel-backed preference optimization for causal language models.

Importing this package needs torch alone; triton and transformers are imported when something asks for them.
"""

__version__ = "0.1.0"

__all__: list[str] = []
