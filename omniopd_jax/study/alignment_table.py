"""The alignment study from end to end: references, estimators, and the document that is written from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omniopd_jax.study import alignment
from omniopd_jax.study.alignment import REFERENCES, Alignment, Gradients
from omniopd_jax.study.figure import Line, Panel, svg
from omniopd_jax.train.experiment import prepare

_MOST_LINES = 16  # as many as the figure has looks for

Progress = Callable[[str, int, int], None]  # (what, batches done, batches in all)

_HEAD = """# Alignment of gradients

Written by this command from what it measured; nothing here was typed by hand:

    python -m experiments.align --config=configs/align_small.py --workdir=runs/align --results=docs/alignment.md

At the student before any training, each estimator's gradient against the exact gradient of the KL to the teacher over
the full vocabulary, averaged over the tokens of the student's own responses: reverse, KL(student ‖ teacher), and
forward, KL(teacher ‖ student). *cosine*: what the teacher tokens of the second column buy, noise included; an estimator
whose teacher writes nothing has one batch of responses. *noise removed*: the cosine of the expectations, ± one standard
error, from products of independent batches alone; – where no signal stands out of the noise. *halves*: the cosine of an
estimator's own two halves: how much of all batches together is signal.

The student is the base model still, so the anchor's gradient is 0: settings of the anchor cannot be told apart here.
A direction at the start does not predict the order after training: this is a filter, not a verdict.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One estimator, measured."""

    title: str
    found: Mapping[str, Alignment]  # by reference


def measure_all(common: Mapping[str, Any], plan: Mapping[str, Any], root: Path, *, progress: Progress) -> Iterator[Row]:
    """Measures what is not measured yet, in the order of the plan, and gives each row when it is there.

    Args:
      common: nested settings that all estimators share; the world is built in `root` unless it has a path.
      plan: {"batches", "reference_batches", "budget", "estimators": [{"name", "title", "settings"}]}.
      root: every measurement is kept there, with the settings that it belongs to.
      progress: told about batches.
    """
    common = dict(common) | dict(world=common["world"] | dict(path=common["world"]["path"] or str(root / "world")))
    references = {
        kind: _reference(common, kind, plan["reference_batches"], root / f"reference-{kind}", progress)
        for kind in REFERENCES
    }
    for estimator in plan["estimators"]:
        file = root / "estimators" / f"{estimator['name']}.json"
        config = alignment.configured(common, estimator["settings"])
        key = dict(config=dataclasses.asdict(config)) | {
            name: plan[name] for name in ("batches", "budget", "reference_batches")
        }
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if known.get("key") != json.loads(json.dumps(key)):
            gradients = _gather(config, file.with_suffix(""), plan["batches"], estimator["title"], progress)
            found = {
                kind: dataclasses.asdict(alignment.align(gradients, reference, budget=plan["budget"]))
                for kind, reference in references.items()
            }
            known = dict(key=key, found=found)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known) + "\n", encoding="utf-8")
        yield Row(estimator["title"], {kind: Alignment(**known["found"][kind]) for kind in REFERENCES})


def _reference(common: Mapping[str, Any], kind: str, batches: int, folder: Path, progress: Progress) -> Gradients:
    config = alignment.reference_config(common, kind)
    file = folder.with_suffix(".npz")
    key = json.dumps(dict(config=dataclasses.asdict(config), batches=batches), sort_keys=True)
    if file.is_file():
        with np.load(file) as held:
            if str(held["key"]) == key:
                return Gradients(held["gradient_KxD"], held["tokens_K"])
    found = _gather(config, folder, batches, f"exact {kind}", progress)
    np.savez(file, key=key, gradient_KxD=found.gradient_KxD, tokens_K=found.tokens_K)
    return found


def _gather(config: Any, folder: Path, batches: int, title: str, progress: Progress) -> Gradients:
    shutil.rmtree(folder, ignore_errors=True)  # left behind by a call that was stopped
    experiment = prepare(config, folder)
    try:
        return alignment.gather(experiment, batches, lambda done, total: progress(title, done, total))
    finally:
        experiment.close()
        shutil.rmtree(folder, ignore_errors=True)


def write(rows: Sequence[Row], path: Path) -> Path:
    """Writes the document and figures/alignment.svg beside it; best plain cosine with the reverse KL first."""
    picture = path.parent / "figures" / "alignment.svg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(_figure(rows), encoding="utf-8")
    caption = f"![Cosine with the exact gradients against teacher tokens](figures/{picture.name})"
    path.write_text("\n".join([_HEAD, *table(rows), "", caption, ""]), encoding="utf-8")
    return path


def _figure(rows: Sequence[Row]) -> str:
    """The plain cosines of the best rows whose teacher writes, against the tokens that it wrote."""
    paid = [row for row in _ordered(rows) if row.found[REFERENCES[0]].tokens > 0]
    panels = []
    for kind in REFERENCES:
        lines = []
        for row in paid[:_MOST_LINES]:
            x, y = map(list, zip(*row.found[kind].curve, strict=True))
            lines.append(Line(row.title.replace("`", ""), x, y, y, y))
        panels.append(Panel(f"Cosine with the {kind.replace('_kl', ' KL')}", "teacher tokens written", lines))
    return svg(panels, columns=len(panels), title="Cosine with the exact gradients against teacher tokens")


def _ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row.found[REFERENCES[0]].cosine)


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines, best plain cosine with the reverse KL first."""
    head = ["", "teacher tokens"]
    for kind in REFERENCES:
        name = kind.replace("_kl", " KL")
        head += [f"{name}: cosine", f"{name}: noise removed"]
    head.append("halves")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in _ordered(rows):
        first = row.found[REFERENCES[0]]
        cells = [row.title, f"{first.tokens:,.0f}"]
        for kind in REFERENCES:
            one = row.found[kind]
            error = "" if one.corrected_error is None else f" ± {one.corrected_error:.2f}"
            cells += [f"{one.cosine:.2f}", "–" if one.corrected is None else f"{one.corrected:.2f}{error}"]
        lines.append("| " + " | ".join([*cells, f"{first.halves:.2f}"]) + " |")
    return lines
