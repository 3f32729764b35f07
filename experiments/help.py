"""What --help prints: the command's own words, its flags, and every setting as configs/base.py has it."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from absl import flags

_TERMS = (
    ("response", "what the student writes to a prompt"),
    ("chunk", "a stretch of a response that is audited; it starts where the student hesitates (entropy)"),
    ("continuation", "what the teacher writes from a chunk's start, without seeing the chunk"),
    ("branch", "what the student itself writes from there, once more"),
    ("similarity", "of two texts, 0 to 1; against the continuations it is what is learned from"),
    ("anchor", "the KL to the base model that holds the student near where it began"),
)
EXIT_CODES = (
    "0 done, 1 out of memory or a bug, 2 bad input, 3 the teacher stopped, 4 a budget is spent, 5 a number is not "
    "finite, 6 a checkpoint cannot be written or read, 130 Ctrl-C, 143 SIGTERM"
)
_SECTION = re.compile(r"^ {12}(\w+)=dict\($")
_KNOB = re.compile(r"^ {16}(\w+)=(.*?),(?:\s*# (.*))?$")
_REMARK = re.compile(r"^ {16}# (.*)$")


def help_text() -> str:
    """The help of the main that is running."""
    main = sys.modules["__main__"]
    parts = [(main.__doc__ or "").strip()]
    found = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(main)}
    lines = [_entry(f"--{name}", found[name].help or "", found[name].default) for name in sorted(found)]
    if "config" in flags.FLAGS:
        settings = (
            "Config file, e.g. configs/gsm8k.py; --config.SECTION.SETTING=VALUE changes one setting of it (below)."
        )
        lines.insert(0, _entry("--config", settings, flags.FLAGS["config"].default))
    shared = flags.FLAGS.flags_by_module_dict().get("experiments.command", [])
    lines += [_entry(f"--{flag.name}", flag.help or "", flag.default) for flag in shared if "config" in flags.FLAGS]
    if lines:
        parts.append("Flags\n" + "\n".join(lines))
    if "config" in flags.FLAGS:
        parts.append("Words\n" + "\n".join(_entry(word, meaning, None) for word, meaning in _TERMS))
        parts.append("Settings, with their defaults (configs/base.py)\n" + "\n".join(setting_lines()))
    parts.append(textwrap.fill("Exit codes: " + EXIT_CODES, 120, subsequent_indent="  "))
    return "\n\n".join(parts)


def setting_lines() -> list[str]:
    """One line a setting: its name, its default and what configs/base.py says about it."""
    source = Path(__file__).resolve().parents[1] / "configs" / "base.py"
    lines, section = [], ""
    for line in source.read_text(encoding="utf-8").splitlines():
        if match := _SECTION.match(line):
            section = match[1]
        elif match := _KNOB.match(line):
            name, value, remark = match.groups()
            lines.append(f"  {section}.{name}={value}" + (f"  {remark}" if remark else ""))
        elif (match := _REMARK.match(line)) and lines:
            lines[-1] += f" {match[1]}"
    return lines


def _entry(name: str, text: str, default: object) -> str:
    shown = "" if default in (None, "", False) else f" (default: {default})"
    return textwrap.fill(text + shown, 120, initial_indent=f"  {name:<24} ", subsequent_indent=" " * 27)
