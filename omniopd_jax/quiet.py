"""TensorFlow without its banners, and off the accelerator: that belongs to jax."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

# What TensorFlow's C++ half says before its Python half can set a level: "I0000 00:00:1795336025.771137 …".
_BANNER = re.compile(rb"^(WARNING: All log messages before absl::InitializeLog|[IWEF]\d{4} \d\d:\d\d:\d+)")


def tensorflow() -> Any:
    """The module tensorflow, which sees no accelerator.

    Raises:
      ImportError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with without_banners():
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
    return tf


@contextlib.contextmanager
def without_banners() -> Iterator[None]:
    """Holds back the file descriptor of the standard error, then lets through what is no banner of TensorFlow's.

    The descriptor, not sys.stderr: C++ writes past the latter.
    """
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (AttributeError, OSError, ValueError):  # a process without a standard error
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held:
                if not _BANNER.match(line):
                    os.write(2, line)
