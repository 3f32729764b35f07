"""What can be known to be wrong before the first step: templates, stop tokens, vocabularies, prompts that are too long.

Each of these errors is silent in training: a template that drops the thinking marks, a stop token that nobody emits, a
vocabulary of another model. Here each is a row of a short table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from omniopd_jax.data.prompts import PromptStream
from omniopd_jax.data.tokenizer import Tokenizer, TokenizerError
from omniopd_jax.types import InputError, Prompt

_ANSWER = "  An answer, with white space around it.  "
_SHOWN = 5  # names listed before an ellipsis


@dataclasses.dataclass(frozen=True)
class Side:
    """A model as far as its text goes."""

    tokenizer: Tokenizer
    vocab_size: int  # rows of the model's embedding
    num_parameters: int = 0  # 0: not known


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table."""

    level: Literal["ok", "warning", "error"]
    name: str  # what was looked at
    text: str  # what was found, one sentence


def preflight(
    student: Side,
    teacher: Side | None,
    stream: PromptStream,
    *,
    max_prompt_tokens: int,
    template_args: Mapping[str, Any] | None = None,
    use_chat_template: bool = True,
) -> list[Finding]:
    """Looks at everything before anything is computed.

    Args:
      student: who is trained.
      teacher: a local teacher; None where the teacher is reached over the network (its own probe looks at it).
      stream: the prompts, those that are too long already set aside.
      max_prompt_tokens: the limit that set them aside, for the message.
      template_args: arguments of the chat templates.
      use_chat_template: False where prompts are raw texts.
    """
    findings = [_prompts(stream, max_prompt_tokens)]
    for name, side in (("student", student), ("teacher", teacher)):
        if side is None:
            continue
        findings += [_vocabulary(name, side), *_stop_tokens(name, side)]
        prompt = stream.prompts[0]
        if use_chat_template and not prompt.is_raw:
            findings += _template(name, side.tokenizer, prompt, template_args)
        else:
            findings.append(_round_trip(f"{name} raw text", side.tokenizer, prompt, template_args))
    if teacher is not None:
        findings += _pair(student, teacher)
    return findings


def table(findings: Sequence[Finding]) -> str:
    """The findings as aligned lines, errors first."""
    order = {"error": 0, "warning": 1, "ok": 2}
    width = max((len(finding.name) for finding in findings), default=0)
    rows = sorted(findings, key=lambda finding: order[finding.level])
    return "\n".join(f"{finding.level:<7}  {finding.name:<{width}}  {finding.text}" for finding in rows)


def raise_errors(findings: Sequence[Finding]) -> None:
    """Raises InputError with the sentences of all errors, if there is one."""
    errors = [f"{finding.name}: {finding.text}" for finding in findings if finding.level == "error"]
    if errors:
        raise InputError(" ".join(errors))


def _prompts(stream: PromptStream, max_prompt_tokens: int) -> Finding:
    if not stream.too_long:
        return Finding("ok", "prompts", f"{len(stream)} prompts, none longer than {max_prompt_tokens} tokens.")
    total = len(stream) + len(stream.too_long)
    shown = ", ".join(f"{name} ({length})" for name, length in stream.too_long[:_SHOWN])
    rest = ", …" if len(stream.too_long) > _SHOWN else ""
    return Finding(
        "warning",
        "prompts",
        f"{len(stream.too_long)} of {total} prompts have more than data.max_prompt_tokens={max_prompt_tokens} tokens "
        f"and are left out: {shown}{rest}.",
    )


def _vocabulary(name: str, side: Side) -> Finding:
    known = side.tokenizer.vocab_size
    if known > side.vocab_size:
        return Finding(
            "error",
            f"{name} vocabulary",
            f"the tokenizer has ids up to {known - 1}, the model {side.vocab_size} rows; they do not belong together.",
        )
    spare = f", {side.vocab_size - known} rows of the model stand for none and are never drawn"
    return Finding("ok", f"{name} vocabulary", f"{known} tokens{spare if side.vocab_size > known else ''}.")


def _stop_tokens(name: str, side: Side) -> list[Finding]:
    stops = side.tokenizer.stop_tokens
    beyond = [token for token in stops if token >= side.vocab_size]
    if beyond:
        text = (
            f"{beyond} are named as stop tokens, but the model has {side.vocab_size} rows; mend generation_config.json."
        )
        return [Finding("error", f"{name} stop tokens", text)]
    return [Finding("ok", f"{name} stop tokens", _spelled(side.tokenizer, stops))]


def _spelled(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return ", ".join(f"{text} ({token})" for token, text in zip(tokens, tokenizer.token_texts(tokens), strict=True))


def _round_trip(name: str, tokenizer: Tokenizer, prompt: Prompt, template_args: Mapping[str, Any] | None) -> Finding:
    """The prompt's tokens spell the prompt's text."""
    text = tokenizer.render(prompt, template_args)
    found = tokenizer.decode_all(tokenizer.encode_prompt(prompt, template_args))
    wanted_words, found_words = text.split(), found.split()
    if found.endswith(text) or wanted_words == found_words:
        return Finding("ok", name, f"prompt {prompt.id!r} comes back as it went in.")
    words = zip([*wanted_words, ""], [*found_words, ""], strict=False)
    wanted, got = next(((a, b) for a, b in words if a != b), ("", ""))
    return Finding(
        "warning", name, f"prompt {prompt.id!r} does not come back as it went in: {wanted!r} became {got!r}."
    )


def _template(
    name: str, tokenizer: Tokenizer, prompt: Prompt, template_args: Mapping[str, Any] | None
) -> list[Finding]:
    name = f"{name} template"
    try:
        findings = [_round_trip(name, tokenizer, prompt, template_args)]
        asked = tokenizer.render(prompt, template_args)
        turns = [*({"role": m.role, "content": m.content} for m in prompt.messages)]
        answered = tokenizer.render_messages(
            [*turns, {"role": "assistant", "content": _ANSWER}], template_args, add_generation_prompt=False
        )
    except TokenizerError as error:
        return [Finding("error", name, str(error))]
    if any(turn["content"] not in asked for turn in turns):
        findings.append(
            Finding("warning", name, f"it changes the text of prompt {prompt.id!r} (white space, or more).")
        )
    before, found, after = answered.partition(_ANSWER)
    if not found:
        before, _, after = answered.partition(_ANSWER.strip())
        findings.append(Finding("warning", name, "it strips white space around an answer."))
    if before.rstrip() != asked.rstrip():
        text = (
            f"an answer begins after {_tail(asked)!r} when it is asked for, but after {_tail(before)!r} when it stands "
            "in a conversation; the model may have learned the other one."
        )
        findings.append(Finding("warning", name, text))
    end = tokenizer.first_special(after)
    if end is not None and end not in tokenizer.stop_tokens:
        text = f"it ends an answer with {_spelled(tokenizer, [end])}, which is no stop token: responses may run on."
        findings.append(Finding("warning", name, text))
    return findings


def _tail(text: str) -> str:
    return text[-40:]


def _pair(student: Side, teacher: Side) -> list[Finding]:
    findings = []
    if student.tokenizer.has_same_vocabulary(teacher.tokenizer):
        findings.append(Finding("ok", "tokenizers", "student and teacher share their vocabulary."))
    else:
        findings.append(
            Finding("ok", "tokenizers", "they differ; the teacher's texts are re-tokenised by the student's.")
        )
    if student.num_parameters > teacher.num_parameters > 0:
        findings.append(
            Finding(
                "warning",
                "sizes",
                f"the student has {student.num_parameters:,} parameters, the teacher {teacher.num_parameters:,}: are "
                "student.path and teacher.path swapped?",
            )
        )
    own = set(student.tokenizer.token_texts(student.tokenizer.stop_tokens))
    emitted = set(teacher.tokenizer.token_texts(teacher.tokenizer.stop_tokens))
    if own & emitted:
        findings.append(
            Finding("ok", "ends", f"the teacher can end as the student does: {', '.join(sorted(own & emitted))}.")
        )
    else:
        findings.append(
            Finding(
                "warning",
                "ends",
                f"the teacher ends with {', '.join(sorted(emitted))} and never with the student's "
                f"{', '.join(sorted(own))}; its ends count as the student's.",
            )
        )
    return findings
