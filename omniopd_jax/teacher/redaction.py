"""Secrets: read from the environment only, and kept out of every message, log and file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from omniopd_jax.config import ConfigError

_SECRET_NAME = re.compile(r"(_API_KEY|_KEY|_TOKEN|_SECRET|_PASSWORD)$")
_MIN_SECRET = 12  # shorter values are words, not keys
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MARK = "[redacted]"


class Redactor:
    """Replaces every known secret in a text."""

    def __init__(self, secrets: Sequence[str] = (), environment: Mapping[str, str] = os.environ):
        found = {secret for secret in secrets if secret}
        found |= {
            value for name, value in environment.items() if _SECRET_NAME.search(name) and len(value) >= _MIN_SECRET
        }
        self._secrets = sorted(found, key=len, reverse=True)  # a secret that contains another goes first

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, MARK)
        return text


def key_from_environment(name: str, fallbacks: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The API key, "" where none is set.

    Args:
      name: `teacher.api_key_env`, the variable that holds the key; "" for the SDK's own names.
      fallbacks: the SDK's own names, in order.

    Raises:
      ConfigError: the named variable is not set, or `name` cannot be a variable's name (somebody put the key itself
        into the config; the message does not repeat it).
    """
    if name:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                "config.teacher.api_key_env must be the name of an environment variable, not the key itself."
            )
        if not environment.get(name):
            raise ConfigError(f"config.teacher.api_key_env names {name}, which is not set in the environment.")
        fallbacks = (name,)
    found = next((fallback for fallback in fallbacks if environment.get(fallback)), None)
    if found is None:
        return ""
    key = environment[found].strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        # An HTTP library would refuse it as a header, in a message that repeats it.
        raise ConfigError(f"The environment's {found} holds no key: spaces, line breaks or other scripts are in it.")
    return key
