"""What a comparison runs: arms, each at a few learning rates on one seed and at the best of them on every seed.

A study is plain data in a config file (`get_study`), beside the run that all arms share (`get_config`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omniopd_jax.config import Config, from_mapping
from omniopd_jax.study import search
from omniopd_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the table."""

    name: str  # of its folder
    title: str
    settings: Mapping[str, Any]  # {"section.knob": value} on top of the study's common run
    rate_of: str = ""  # the arm whose learning rate it takes; "": it has a search of its own
    is_control: bool = False
    more_seeds: tuple[int, ...] = ()  # beside the study's: narrower intervals where they matter most


@dataclasses.dataclass(frozen=True)
class Claim:
    """An ordering to be tested: `better` is more accurate than `worse`."""

    text: str
    better: str  # an arm's name, or "before"
    worse: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison."""

    name: str  # of its folder
    title: str
    about: str  # sentences for the reader of the results
    seeds: tuple[int, ...]  # of the world, the models and every draw, for every arm; the search uses the first
    learning_rates: tuple[float, ...]  # the grid, in equal ratios
    extensions: int  # further rates tried while the best one lies at the grid's edge
    curve_every: int  # updates between points of the curves
    curve_problems: int
    kl_problems: int
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    references: tuple[str, ...]  # arms (or "before") that every arm is compared with, beside its own self-teacher
    curves: tuple[str, ...]  # arms whose curves are drawn

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def self_of(self, arm: Arm) -> Arm | None:
        """The control that is this arm with the student as its own teacher: what of its gain is mere sharpening."""
        controls = (one for one in self.arms if one.is_control and one.rate_of == arm.name)
        return next((one for one in controls if one.settings.get("teacher.kind") == "self"), None)

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """Seeds of one arm."""
        return (*self.seeds, *arm.more_seeds)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Seeds of any arm: the worlds there are."""
        return tuple(sorted({seed for arm in self.arms for seed in self.seeds_of(arm)}))


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """One arm at one learning rate on one seed."""

    arm: str
    learning_rate: float
    seed: int

    @property
    def path(self) -> str:
        """Its place below the study's folder; also its name on the command line."""
        return f"runs/{self.arm}/{self.learning_rate:.2e}/seed-{self.seed}"


Scores = Mapping[Run, float]  # of finished runs: what the search maximises


def parse(path: str) -> Run:
    """The run of a `Run.path`.

    Raises:
      InputError: no such form.
    """
    parts = path.split("/")
    if len(parts) != 4 or parts[0] != "runs" or not parts[3].startswith("seed-"):
        raise InputError(f"{path!r} is no run: its form is runs/ARM/LEARNING_RATE/seed-SEED.")
    return Run(parts[1], float(parts[2]), int(parts[3].removeprefix("seed-")))


def study_from(values: Mapping[str, Any]) -> Study:
    """Checks and freezes the plain data of a config file.

    Raises:
      InputError: an unknown or missing field, an arm named twice, an unknown `rate_of`, a claim about no arm.
    """
    study = _frozen(
        Study,
        dict(values)
        | dict(
            arms=tuple(_arm(arm) for arm in values.get("arms", ())),
            claims=tuple(_frozen(Claim, claim) for claim in values.get("claims", ())),
            seeds=tuple(values.get("seeds", ())),
            learning_rates=tuple(values.get("learning_rates", ())),
            references=tuple(values.get("references", ())),
            curves=tuple(values.get("curves", ())),
        ),
    )
    names = [arm.name for arm in study.arms]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"Study {study.name!r}: its arms must have different names, got {names}.")
    searched = {arm.name for arm in study.arms if not arm.rate_of}
    for arm in study.arms:
        if arm.rate_of and arm.rate_of not in searched:
            raise InputError(
                f"Study {study.name!r}: {arm.name} takes the learning rate of {arm.rate_of!r}, no such arm."
            )
    for claim in study.claims:
        for name in (claim.better, claim.worse):
            if name not in (*names, "before"):
                raise InputError(f"Study {study.name!r}: the claim {claim.text!r} is about {name!r}, no such arm.")
    for name in (*study.references, *study.curves):
        if name not in (*names, "before"):
            raise InputError(f"Study {study.name!r}: there is no arm {name!r}, named in its references or curves.")
    for arm in study.arms:
        if len(set(study.seeds_of(arm))) < len(study.seeds_of(arm)):
            raise InputError(f"Study {study.name!r}: {arm.name} has a seed twice, {study.seeds_of(arm)}.")
    if not study.seeds or not study.learning_rates or list(study.learning_rates) != sorted(study.learning_rates):
        raise InputError(f"Study {study.name!r} needs seeds and learning rates in ascending order.")
    for learning_rate in study.learning_rates:
        if (
            parse(Run("", learning_rate, 0).path).learning_rate != learning_rate
        ):  # its run would never be found finished
            raise InputError(f"Study {study.name!r}: learning rates have at most three digits, got {learning_rate!r}.")
    return study


def to_plain(study: Study) -> dict[str, Any]:
    """What `study_from` reads back, for JSON."""
    return dataclasses.asdict(study)


def only(study: Study, names: Sequence[str]) -> Study:
    """The study with these arms alone, and those whose learning rates they take.

    Raises:
      InputError: no such arm.
    """
    known = {arm.name for arm in study.arms}
    for name in names:
        if name not in known:
            raise InputError(f"--only: there is no arm {name!r}; there are {', '.join(sorted(known))}.")
    kept = {*names, *(study.arm(name).rate_of for name in names)}
    return dataclasses.replace(study, arms=tuple(arm for arm in study.arms if arm.name in kept))


def world_path(folder: Path, seed: int) -> Path:
    """Where the world of a seed stands."""
    return folder / "worlds" / f"seed-{seed}"


def run_config(common: Mapping[str, Any], study: Study, run: Run, folder: Path) -> Config:
    """The config of one run.

    Args:
      common: nested settings that all arms share.
      study, run: what to run.
      folder: the study's.
    """
    values = with_settings(common, study.arm(run.arm).settings)
    world = world_path(folder, run.seed)
    values["world"] = values["world"] | dict(seed=run.seed, path=str(world))
    values["train"] = values["train"] | dict(seed=run.seed)
    values["optimizer"] = values["optimizer"] | dict(learning_rate=run.learning_rate)
    values["data"] = values["data"] | dict(eval=str(world / "validation.jsonl"))
    values["eval"] = values["eval"] | dict(every=study.curve_every, problems=study.curve_problems)
    return from_mapping(values)


def with_settings(common: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested settings with {"section.knob": value} on top."""
    values = copy.deepcopy(dict(common))
    for name, value in settings.items():
        *groups, knob = name.split(".")
        place = values
        for group in groups:
            place = place[group]
        place[knob] = value
    return values


def rate(study: Study, arm: Arm, scores: Scores) -> float | None:
    """The learning rate chosen for an arm; None while its search goes on."""
    name = arm.rate_of or arm.name
    found = {
        run.learning_rate: score for run, score in scores.items() if run.arm == name and run.seed == study.seeds[0]
    }
    return None if search.missing(study.learning_rates, found, study.extensions) else search.best(found)


def wanted(study: Study, scores: Scores) -> list[Run]:
    """Runs that can be started now and are not finished: arm by arm, in the order in which they are listed."""
    runs: list[Run] = []
    for arm in study.arms:
        chosen = rate(study, arm, scores)
        if chosen is not None:
            runs += [Run(arm.name, chosen, seed) for seed in study.seeds_of(arm)]
        elif not arm.rate_of:
            found = {
                run.learning_rate: s for run, s in scores.items() if run.arm == arm.name and run.seed == study.seeds[0]
            }
            missing = search.missing(study.learning_rates, found, study.extensions)
            runs += [Run(arm.name, learning_rate, study.seeds[0]) for learning_rate in missing]
    return [run for run in runs if run not in scores]


def final_runs(study: Study, scores: Scores) -> dict[str, list[Run]]:
    """Finished runs at the chosen learning rate, by arm; arms without any are left out."""
    found: dict[str, list[Run]] = {}
    for arm in study.arms:
        chosen = rate(study, arm, scores)
        runs = [Run(arm.name, chosen, seed) for seed in study.seeds_of(arm)] if chosen is not None else []
        if finished := [run for run in runs if run in scores]:
            found[arm.name] = finished
    return found


def _arm(values: Mapping[str, Any]) -> Arm:
    return _frozen(Arm, dict(values) | dict(more_seeds=tuple(values.get("more_seeds", ()))))


def _frozen(kind: type, values: Mapping[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise InputError(f"{name!r} is no field of a {kind.__name__.lower()}; there are {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"A {kind.__name__.lower()} needs the field {name!r}, got {dict(values)}.")
    return kind(**values)
