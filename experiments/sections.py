"""What a --config file offers beside `get_config`: functions called with the same section, the part after the colon."""

import runpy
from typing import Any

from absl import flags
from ml_collections import config_flags

from omniopd_jax.types import InputError


def of_config(function: str, flag: str = "config") -> Any:
    """Calls a function of the config file behind a flag.

    Raises:
      InputError: the file has no such function, or no such section.
    """
    path, _, section = config_flags.get_config_filename(flags.FLAGS[flag]).partition(":")
    found = runpy.run_path(path).get(function)
    if found is None:
        raise InputError(f"--config={path} has no function {function}: it describes one run.")
    return found(section) if section else found()
