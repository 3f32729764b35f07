"""Logit-free on-policy distillation of language models in JAX (OmniOPD, arXiv 2606.01476)."""

__version__ = "0.1.0"
