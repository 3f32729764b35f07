"""Money: what a call costs, what a run may spend, and the ledger that survives it.

Every attempt is one line in the ledger, written the moment its outcome is known; a resumed run counts on from there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import fnmatch
import json
import math
import time
from pathlib import Path
from typing import Any

from omniopd_jax.config import Config, ConfigError, TeacherConfig, mixed_arms
from omniopd_jax.teacher.capabilities import find_capability
from omniopd_jax.teacher.protocol import BudgetExhausted, Usage

API_KINDS = ("openai", "anthropic", "gemini")  # kinds of teachers that may cost money

_OURS = Path(__file__).with_name("prices.json")
_STALE_DAYS = 120
CHARACTERS_A_TOKEN = 3.0  # first guess, low on purpose: English prose has about 4; corrected by what the server counts


@dataclasses.dataclass(frozen=True)
class Price:
    """Dollars for a million tokens, and the day on which somebody looked."""

    input: float
    output: float
    date: str  # ISO day
    source: str = ""

    def dollars(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6

    @property
    def is_stale(self) -> bool:
        age = datetime.date.today() - datetime.date.fromisoformat(self.date)
        return age.days > _STALE_DAYS


@dataclasses.dataclass(frozen=True)
class Caps:
    """What a whole run may spend; 0: no cap."""

    dollars: float = 0.0
    calls: int = 0
    tokens: int = 0


def find_price(model: str, overrides: str = "") -> Price | None:
    """The first entry whose pattern matches the model's name: the user's file before ours; None where none does.

    Raises:
      ConfigError: a price file that cannot be read.
    """
    name = model.rsplit("/", 1)[-1]
    for path in ([Path(overrides)] if overrides else []) + [_OURS]:
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["prices"]
            for entry in entries:
                if fnmatch.fnmatchcase(name, entry["model"]) or fnmatch.fnmatchcase(model, entry["model"]):
                    price = Price(
                        float(entry["input"]), float(entry["output"]), str(entry["date"]), str(entry.get("source", ""))
                    )
                    datetime.date.fromisoformat(price.date)
                    return price
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{path} must be a JSON object with a list "prices" of {{model, input, output, date}}, dollars a '
                f"million tokens and an ISO day: {error!r}."
            ) from error
    return None


def run_price(teacher: TeacherConfig) -> Price | None:
    """The price that the teacher's cap in dollars counts with; None where there is neither.

    Raises:
      ConfigError: a cap in dollars without a price, which would count every call as $0; or an unreadable price file.
    """
    price = find_price(teacher.model, teacher.prices)
    if price is None and teacher.max_dollars:
        raise ConfigError(
            f"config.teacher.max_dollars needs a price for {teacher.model!r}: name a file with one in "
            "config.teacher.prices, or set config.teacher.max_calls or config.teacher.max_tokens instead."
        )
    return price


class Budget:
    """What is spent and what is in flight; nothing is sent that is expected to break a cap.

    A call is admitted only if the worst it can cost still fits beside what is spent and in flight. Calls and completion
    tokens are bounded; prompt tokens are the caller's estimate, so a cap on tokens or dollars can slip by its error.
    Where a call does not fit *now* it waits for the calls in flight, which mostly cost less than their worst; where
    nothing is in flight the budget is exhausted. One event loop; `settle` may be called once a reservation.

    Args:
      price: None counts dollars as 0.
      ledger: file of one JSON object a call, None for none; the lines of an earlier run of the work directory count.
    """

    def __init__(self, price: Price | None, caps: Caps, ledger: Path | None = None):
        self.price = price
        self._caps = caps
        self._in_flight = Usage()
        self._changed: asyncio.Event | None = None
        self._ledger = ledger
        self.spent = _sum_ledger(ledger) if ledger is not None and ledger.exists() else Usage()
        self._file = None

    @property
    def in_flight(self) -> int:
        """Calls admitted and not yet settled."""
        return self._in_flight.calls

    async def reserve(self, prompt_tokens: float, completion_tokens: float) -> Usage:
        """Admits one call of `prompt_tokens` (an estimate) and at most `completion_tokens`.

        Raises:
          BudgetExhausted: it would break a cap.
        """
        worst = Usage(
            math.ceil(prompt_tokens), math.ceil(completion_tokens), 1, self._dollars(prompt_tokens, completion_tokens)
        )
        while (cap := self._broken_cap(self.spent + self._in_flight + worst)) is not None:
            if self._in_flight.calls == 0:
                raise BudgetExhausted(self._sentence(cap))
            if self._changed is None:
                self._changed = asyncio.Event()
            self._changed.clear()
            await self._changed.wait()
        self._in_flight += worst
        return worst

    def settle(
        self, reserved: Usage, *, status: str, prompt_tokens: int = 0, completion_tokens: int = 0,
        is_assumed: bool = False, num_samples: int = 0, latency_s: float = 0.0,
    ) -> Usage:  # fmt: skip
        """Replaces a reservation by what the call cost, and writes its line in the ledger.

        Args:
          is_assumed: no answer came but the call may have been billed; its worst case counts towards the caps.
        """
        self._in_flight += Usage(
            -reserved.prompt_tokens, -reserved.completion_tokens, -reserved.calls, -reserved.dollars
        )
        if is_assumed:
            cost = dataclasses.replace(reserved, calls=1)
        else:
            cost = Usage(prompt_tokens, completion_tokens, 1, self._dollars(prompt_tokens, completion_tokens))
        self.spent += cost
        if self._changed is not None:
            self._changed.set()
        self._write(
            {
                "time": round(time.time(), 3),
                "status": status,
                "samples": num_samples,
                "prompt_tokens": cost.prompt_tokens,
                "completion_tokens": cost.completion_tokens,
                "dollars": cost.dollars,
                "assumed": is_assumed,
                "latency_s": round(latency_s, 4),
            }
        )
        return cost

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _dollars(self, prompt_tokens: float, completion_tokens: float) -> float:
        return self.price.dollars(prompt_tokens, completion_tokens) if self.price is not None else 0.0

    def _broken_cap(self, usage: Usage) -> str | None:
        caps = self._caps
        if caps.calls and usage.calls > caps.calls:
            return "calls"
        if caps.tokens and usage.prompt_tokens + usage.completion_tokens > caps.tokens:
            return "tokens"
        if caps.dollars and usage.dollars > caps.dollars * (1 + 1e-9):
            return "dollars"
        return None

    def _sentence(self, cap: str) -> str:
        spent = self.spent
        return (
            f"The next call could break the cap config.teacher.max_{cap}={getattr(self._caps, cap)}: "
            f"{spent.calls} calls, {spent.prompt_tokens + spent.completion_tokens} tokens and ${spent.dollars:.4f} are "
            "spent. Raise the cap and run the same command to go on; no answer is paid for twice."
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self._ledger is None:
            return
        if self._file is None:
            self._ledger.parent.mkdir(parents=True, exist_ok=True)
            _end_torn_line(self._ledger)
            self._file = self._ledger.open("a", encoding="utf-8", buffering=1)
        self._file.write(json.dumps(line) + "\n")


def _sum_ledger(path: Path) -> Usage:
    prompt_tokens = completion_tokens = calls = 0
    dollars = 0.0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                prompt_tokens += int(entry["prompt_tokens"])
                completion_tokens += int(entry["completion_tokens"])
                dollars += float(entry["dollars"])
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run
            calls += 1
    return Usage(prompt_tokens, completion_tokens, calls, dollars)


def _end_torn_line(path: Path) -> None:
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def projected_cost(config: Config) -> str:
    """One paragraph: about how many calls, tokens and dollars a run of an API teacher needs, before anything is sent.

    An estimate. High where responses end early, cuts are dropped, answers are in the cache or prompts are short; low
    where calls are repeated, the teacher splits texts into more tokens, or the probe finds fewer samples a call.

    Raises:
      ConfigError: a cap in dollars without a price, or a file of prices or capabilities that cannot be read.
    """
    teacher = config.teacher
    calls, prompt_tokens, completion_tokens, assumed = _asked(config)
    steps = config.train.steps
    price = run_price(teacher)
    lines = [
        f"Teacher {teacher.kind} {teacher.model}: about {calls:,} calls, {prompt_tokens:,.0f} prompt and "
        f"{completion_tokens:,.0f} completion tokens a step; {calls * steps:,} calls in {steps} steps."
    ]
    if price is not None:
        dollars = price.dollars(prompt_tokens, completion_tokens)
        lines.append(
            f"At ${price.input:g} and ${price.output:g} a million tokens ({price.date}"
            f"{', out of date: check it' if price.is_stale else ''}) about ${dollars:,.2f} a step, "
            f"${dollars * steps:,.2f} in all."
        )
    else:
        lines.append("No price is known for it; config.teacher.prices may name a file with one.")
    lines.append(f"An estimate: {assumed}, no call repeated, tokens as the student counts them.")
    caps = [f"{value:g} {name}" for name, value in _caps(config).items() if value]
    lines.append(f"The run stops at {' or '.join(caps)}." if caps else "No cap is set.")
    return " ".join(lines)


def _asked(config: Config) -> tuple[int, float, float, str]:
    """(calls, prompt tokens, completion tokens, what that assumes) of a step: whole answers, chunks, or both."""
    teacher, audit, rollout = config.teacher, config.audit, config.rollout
    arms = mixed_arms(config.objective.arm, config.objective.weights)
    calls, prompt_tokens, completion_tokens, assumed = 0, 0.0, 0.0, []
    if {"verify", "branch", "imitate"} & set(arms):
        samples_a_call = find_capability(teacher.kind, teacher.model, teacher.base_url, teacher.capabilities).max_n
        fitting = int(rollout.max_new_tokens * audit.max_fraction // audit.chunk_tokens)
        chunks = rollout.batch_size * max(1, min(audit.num_chunks, fitting))
        calls = chunks * math.ceil(audit.num_continuations / samples_a_call)
        prompt_tokens = calls * (config.data.max_prompt_tokens + rollout.max_new_tokens / 2)
        completion_tokens = chunks * audit.num_continuations * audit.chunk_tokens * teacher.token_slack
        assumed.append(
            f"every chunk of every response is audited, {min(samples_a_call, audit.num_continuations)} of "
            f"{audit.num_continuations} samples a call, prompts of {config.data.max_prompt_tokens} tokens, prefixes of "
            f"{rollout.max_new_tokens // 2} in the mean"
        )
    if "sft" in arms:
        calls += rollout.batch_size
        prompt_tokens += rollout.batch_size * config.data.max_prompt_tokens
        completion_tokens += rollout.batch_size * rollout.max_new_tokens * teacher.token_slack
        assumed.append(
            f"a whole answer for every row, as long as allowed, to prompts of {config.data.max_prompt_tokens} tokens"
        )
    return calls, prompt_tokens, completion_tokens, ", and ".join(assumed) or "no arm asks the teacher"


def _caps(config: Config) -> dict[str, float]:
    teacher = config.teacher
    return {"dollars": teacher.max_dollars, "calls": teacher.max_calls, "tokens": teacher.max_tokens}
