"""Reports from a work directory's files only: `write_report` of one run, `write_comparison` of several."""

from omniopd_jax.report.comparison import write_comparison
from omniopd_jax.report.run import write_report

__all__ = ["write_comparison", "write_report"]
