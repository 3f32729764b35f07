"""The commands, `python -m experiments.NAME`."""

from omniopd_jax import huge_pages

huge_pages.restart()
