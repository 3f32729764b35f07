"""What all tests share: how programs are compiled."""

import os

# Nearly all of the time here is compilation, of programs that then run for milliseconds. LLVM's optimisation costs more
# than it gains: without it the tests take about two thirds of the time. Subprocesses inherit it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
