"""The start-up probe: a few short calls that prove how this teacher can be asked, before anything depends on it."""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from omniopd_jax.teacher.capabilities import Capability
from omniopd_jax.teacher.dialect import Dialect, Manner, Mode, Reply, Sample
from omniopd_jax.teacher.modes import align, begun_text
from omniopd_jax.teacher.protocol import ContinuationRequest, TeacherStopped
from omniopd_jax.teacher.retry import CallFailed
from omniopd_jax.types import Message

PROBE_TOKENS = 24
_PREFIX = "Here is one short sentence about something picked at random, unlike any other:"
_MORE_SAMPLES = 4  # before equal texts are called greedy decoding
_MAX_RELAXATIONS = 6  # refused calls cost nothing
_DATED = re.compile(r"[-@:](\d{3,8}|\d{4}-\d{2}-\d{2}|latest|main|preview.*)$")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the probe found out."""

    manner: Manner
    answered: str  # the model's name as the teacher gave it, "" where it gives none
    notes: tuple[str, ...]  # what did not work, in words

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Finding:
        return Finding(Manner(**values["manner"]), values["answered"], tuple(values["notes"]))

    def sentence(self, asked: str) -> str:
        manner = self.manner
        sampling = {
            "both": "temperature and top_p are sent",
            "one": "temperature or top_p is sent",
            "fixed": "its sampling is fixed by the provider",
        }[manner.sampling]
        answered = f"answers as {self.answered}" if self.answered else "does not name itself"
        calls = f"up to {manner.max_n} samples a call" if manner.max_n > 1 else "one sample a call"
        text = f"{asked} {answered}; mode {manner.mode}, {calls}, {sampling}."
        return " ".join([text, *self.notes])


Ask = Callable[[Mapping[str, Any], int, int | None], Awaitable[Reply]]  # (body, n, seed) → Reply, raises CallFailed


async def find_manner(
    dialect: Dialect,
    capability: Capability,
    ask: Ask,
    *,
    asked: str,
    mode: str,
    temperature: float,
    top_p: float,
    is_raw: bool,
) -> Finding:
    """Tries the modes in order until one brings two different continuations.

    Args:
      ask: one call with the client's retries and accounting.
      asked: the model's name as configured.
      mode: "auto" for the capability record's order, else the only one to try.
      is_raw: prompts of this run are raw texts.

    Raises:
      TeacherStopped: it is down, is another model, or no mode works; the message tells what each try met.
    """
    request = ContinuationRequest(
        messages=(Message("user", f"Write one short sentence about something random. (Request {uuid.uuid4().hex}.)"),),
        prefix=" " + _PREFIX if is_raw else _PREFIX,
        n=2,
        max_tokens=PROBE_TOKENS,
        temperature=temperature,
        top_p=top_p,
        seed=0,
        is_raw=is_raw,
    )
    notes: list[str] = []
    for name in capability.modes if mode == "auto" else (mode,):
        finding = await _try_mode(dialect, _first_manner(capability, name), ask, request, asked, capability, notes)
        if finding is not None:
            return finding
    raise TeacherStopped(f"The teacher {asked} cannot be used: " + " ".join(notes))


def is_same_model(asked: str, answered: str, answers_as: Sequence[str] = ()) -> bool:
    """Whether the name answered is the one asked for, or a dated version or a path of it."""
    import fnmatch

    if not answered or asked == answered or any(fnmatch.fnmatchcase(answered, pattern) for pattern in answers_as):
        return True
    if asked.endswith("-latest"):
        return True  # an alias by its name; the probe's sentence tells what it stands for
    asked_stem, answered_stem = (_DATED.sub("", name.removeprefix("models/")) for name in (asked, answered))
    if asked_stem != asked and answered_stem != answered and asked.removeprefix("models/") != answered:
        return _version(asked) == _version(answered) and asked_stem.rsplit("/", 1)[-1] == answered_stem
    return answered_stem in (asked_stem, asked_stem.rsplit("/", 1)[-1])


def _version(name: str) -> str:
    found = _DATED.search(name)
    return found.group(1) if found else ""


def _first_manner(capability: Capability, mode: Mode | str) -> Manner:
    is_completions = mode == "completions"
    return Manner(
        mode=mode,  # type: ignore[arg-type]
        max_n=capability.max_n,
        seed=capability.seed,
        sampling=capability.sampling,  # type: ignore[arg-type]
        prefill=capability.prefill,  # type: ignore[arg-type]
        max_tokens_name=capability.max_tokens_name,
        extra=capability.extra_completions if is_completions else capability.extra_chat,
    )


async def _try_mode(
    dialect: Dialect,
    manner: Manner,
    ask: Ask,
    request: ContinuationRequest,
    asked: str,
    capability: Capability,
    notes: list[str],
) -> Finding | None:
    """The finding for one mode, or None with a note that says why it does not work."""
    begun = begun_text(request)
    for _ in range(_MAX_RELAXATIONS):
        try:
            body = dialect.body(request, manner)
        except ValueError as error:
            notes.append(f"{manner.mode}: {error}")
            return None
        try:
            replies, manner = await _samples(ask, body, manner, 2)
            texts = _usable(replies, begun, manner.mode)
            if len(texts) == 2 and texts[0] == texts[1] and request.temperature > 0:
                replies, manner = await _samples(ask, body, manner, _MORE_SAMPLES)
                texts += _usable(replies, begun, manner.mode)
        except CallFailed as failure:
            if failure.action != "reject":
                raise TeacherStopped(f"The teacher {asked} does not answer: {failure}") from None
            relaxed = _relax(manner, str(failure))
            if relaxed is None:
                notes.append(f"{manner.mode} is refused ({failure}).")
                return None
            notes.append(f"{manner.mode} {_difference(manner, relaxed)} ({failure}).")
            manner = relaxed
            continue
        answered = {reply.model for reply in replies}
        if len(answered) > 1 or not is_same_model(asked, next(iter(answered)), capability.answers_as):
            raise TeacherStopped(
                f"The teacher was asked for model {asked!r} and answered as {', '.join(map(repr, sorted(answered)))}. "
                'If that is right, add the name to "answers_as" of its record in config.teacher.capabilities.'
            )
        if len(texts) < 2:
            notes.append(f"{manner.mode} brought no text.")
            return None
        if manner.mode == "prefill" and any(_echoes(sample, begun) for reply in replies for sample in reply.samples):
            notes.append("prefill repeats the prefix instead of going on from it.")
            return None
        if request.temperature > 0 and len(set(texts)) == 1:
            if manner.mode == "completions" and "generation_config" not in manner.extra and dialect.kind == "openai":
                # `transformers serve` decodes greedily unless this field, a JSON string, says otherwise.
                manner = dataclasses.replace(
                    manner, extra={**manner.extra, "generation_config": '{"do_sample": true, "top_k": 0}'}
                )
                notes.append("It decoded greedily at first and is told to sample in each request.")
                continue
            notes.append(
                f"{manner.mode} cannot be made to sample: {len(texts)} texts at temperature {request.temperature:g} "
                "are all equal, and equal texts carry no probabilities (some servers need do_sample=true in the "
                "model's generation_config.json)."
            )
            return None
        if request.temperature > 0:
            notes.append("Two samples differ.")
        else:
            notes.append("config.teacher.temperature=0: all continuations of a chunk will be equal.")
        return Finding(manner, next(iter(answered)), tuple(notes))
    notes.append(f"{manner.mode}: too many refusals.")
    return None


async def _samples(ask: Ask, body: Mapping[str, Any], manner: Manner, count: int) -> tuple[list[Reply], Manner]:
    """`count` samples in as few calls as the manner allows; a server that ignores n is asked one by one afterwards."""
    replies = [await ask(body, min(count, manner.max_n), 1 if manner.seed else None)]
    got = len(replies[0].samples)
    if manner.max_n > 1 and got < min(count, manner.max_n):
        manner = dataclasses.replace(manner, max_n=1)
    while got < count:
        reply = await ask(body, min(count - got, manner.max_n), 1 + got if manner.seed else None)
        replies.append(reply)
        got += max(1, len(reply.samples))
    return replies, manner


def _usable(replies: Sequence[Reply], begun: str, mode: Mode) -> list[str]:
    samples = [sample for reply in replies for sample in reply.samples if sample.finish in ("stop", "length")]
    return [text for text in (align(begun, sample.text, mode) for sample in samples) if text.strip()]


def _echoes(sample: Sample, begun: str) -> bool:
    return sample.text.lstrip().startswith(begun.strip())


def _relax(manner: Manner, message: str) -> Manner | None:
    """The same manner without what the refusal names; None where the mode itself is refused."""
    text = message.lower()
    if text.startswith("http 404"):
        return None  # no such route
    named_extra = [name for name in manner.extra if name.lower() in text]
    if named_extra or (manner.extra and "thinking" in text):
        return dataclasses.replace(manner, extra={})
    if "max_completion_tokens" in text and manner.max_tokens_name == "max_tokens":
        return dataclasses.replace(manner, max_tokens_name="max_completion_tokens")
    if re.search(r"temperature|top_p|sampling", text) and manner.sampling != "fixed":
        takes_one = "top_p" in text and manner.sampling == "both"  # refused together, or top_p alone
        return dataclasses.replace(manner, sampling="one" if takes_one else "fixed")
    if "seed" in text and manner.seed:
        return dataclasses.replace(manner, seed=False)
    if re.search(r"prefill|assistant|last message|final message|role", text):
        return None
    if manner.max_n > 1:
        return dataclasses.replace(manner, max_n=1)
    return None


def _difference(before: Manner, after: Manner) -> str:
    if before.extra != after.extra:
        return f"goes without {', '.join(before.extra)}"
    if before.max_tokens_name != after.max_tokens_name:
        return f"calls max_tokens {after.max_tokens_name}"
    if before.sampling != after.sampling:
        return "takes temperature or top_p, not both" if after.sampling == "one" else "refuses sampling parameters"
    if before.seed != after.seed:
        return "takes no seed"
    return "is asked for one sample a call"
