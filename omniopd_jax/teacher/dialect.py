"""What the clients of the three APIs have in common: how they are asked, and what they bring back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from omniopd_jax.teacher.protocol import ContinuationRequest

Mode = Literal["completions", "prefill", "instruct"]
MODES: tuple[Mode, ...] = ("completions", "prefill", "instruct")
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a teacher is asked. The probe finds it; a run keeps it; the cache key follows from it."""

    mode: Mode
    max_n: int  # samples a call
    seed: bool  # a seed is sent
    sampling: Literal["both", "one", "fixed"]  # which of temperature and top_p are sent
    prefill: Literal["trailing", "continue_final_message", "prefix_flag"] = "trailing"
    max_tokens_name: str = "max_tokens"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further fields of every call


@dataclasses.dataclass(frozen=True)
class Sample:
    """One text as the API gave it, not yet aligned with the prefix."""

    text: str
    finish: Literal["stop", "length", "refused", "unusable"]


@dataclasses.dataclass(frozen=True)
class Reply:
    """What one call brought."""

    samples: tuple[Sample, ...]
    model: str  # as answered, "" where the server does not say
    prompt_tokens: int
    completion_tokens: int  # all samples together, thoughts included


class Dialect(Protocol):
    """One API. The client owns retries, limits, money and the cache; a dialect speaks and listens."""

    kind: str

    def body(self, request: ContinuationRequest, manner: Manner) -> dict[str, Any]:
        """What is sent, but for the number of samples and the seed: the content that a cached answer is filed under.

        Raises:
          ValueError: the request cannot be put in this manner.
        """
        ...

    async def call(self, body: Mapping[str, Any], *, n: int, seed: int | None) -> Reply:
        """One attempt at `n` samples.

        Raises:
          CallFailed: no usable reply.
        """
        ...

    async def close(self) -> None: ...


def whole_text(text: str) -> str:
    """The text with U+FFFD for each lone surrogate: JSON may carry halves of characters, UTF-8 and sqlite cannot."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)


def common_sampling(request: ContinuationRequest, manner: Manner) -> dict[str, float]:
    """The sampling parameters that this manner sends."""
    both = {"temperature": request.temperature, "top_p": request.top_p}
    if manner.sampling == "fixed":
        return {}
    if manner.sampling == "one":  # the API takes either; top_p = 1 says nothing
        if request.top_p == 1.0:
            return {"temperature": request.temperature}
        if request.temperature == 1.0:
            return {"top_p": request.top_p}
        raise ValueError(
            "This API takes config.teacher.temperature or config.teacher.top_p, not both: set one of them to 1.0."
        )
    return both
