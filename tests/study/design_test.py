"""What a comparison runs next follows from what is finished, and from nothing else."""

import dataclasses
from pathlib import Path

import pytest

from configs import compare_small
from omniopd_jax.config import from_mapping, to_dict
from omniopd_jax.study import design, search
from omniopd_jax.study.design import Run
from omniopd_jax.types import InputError

GRID = (1e-4, 4e-4, 1.6e-3)


def plain(**changes):
    arms = [
        dict(name="a", title="A", settings={"objective.arm": "verify"}),
        dict(name="b", title="B", settings={"objective.arm": "branch", "objective.weights.sft": 0.5}),
        dict(name="c", title="C", settings={}, rate_of="a", is_control=True),
    ]
    return dict(
        name="s", title="S", about="", seeds=[0, 1], learning_rates=GRID, extensions=1, curve_every=5,
        curve_problems=10, kl_problems=10, arms=arms, claims=[dict(text="A > B", better="a", worse="b")],
        references=["before"], curves=["a"],
    ) | changes  # fmt: skip


@pytest.fixture(scope="module")
def study():
    return design.study_from(plain())


def test_a_study_survives_json(study):
    assert design.study_from(design.to_plain(study)) == study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(colour="red"), "'colour' is no field of a study"),
        (dict(arms=[dict(name="a", title="A", settings={})] * 2), "must have different names"),
        (dict(arms=[dict(name="a", title="A")]), "An? arm needs the field 'settings'"),
        (dict(arms=[dict(name="a", title="A", settings={}, rate_of="b")]), "learning rate of 'b', no such arm"),
        (dict(claims=[dict(text="t", better="a", worse="z")]), "'z', no such arm"),
        (dict(references=["z"]), "no arm 'z'"),
        (dict(learning_rates=(2.0, 1.0)), "ascending order"),
        (dict(arms=[dict(name="a", title="A", settings={}, more_seeds=[2, 1])], claims=[]), "a has a seed twice"),
        (dict(learning_rates=(1e-4, 3.1623e-4)), "at most three digits, got 0.00031623"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        design.study_from(plain(**changes))


def test_a_run_is_told_by_its_path():
    for rate in (1e-4, 1.25e-5, 3.2e-3):
        run = Run("arm", rate, 3)
        assert design.parse(run.path) == run
    with pytest.raises(InputError, match="is no run"):
        design.parse("runs/a/seed-1")


def test_the_grid_is_tried_and_left_where_its_best_point_lies_at_an_edge():
    assert search.missing(GRID, {}, 1) == list(GRID)
    assert search.missing(GRID, {1e-4: 0.1}, 1) == [4e-4, 1.6e-3]
    inside = dict(zip(GRID, (0.1, 0.3, 0.2), strict=True))
    assert search.missing(GRID, inside, 1) == []
    assert search.best(inside) == 4e-4
    falling = dict(zip(GRID, (0.3, 0.2, 0.1), strict=True))
    assert search.missing(GRID, falling, 1) == [2.5e-5]
    assert search.missing(GRID, falling, 0) == []
    assert search.missing(GRID, falling | {2.5e-5: 0.4}, 1) == []  # one extension and no more
    assert search.missing(GRID, falling | {2.5e-5: 0.4}, 2) == [6.25e-6]
    rising = dict(zip(GRID, (0.1, 0.2, 0.3), strict=True))
    assert search.missing(GRID, rising, 1) == [6.4e-3]
    assert search.missing(GRID[:1], {1e-4: 0.0}, 1) == []  # a single point has no ratio
    assert search.best({1e-4: 0.2, 4e-4: 0.2}) == 1e-4  # a tie changes the student least


def test_the_search_comes_first_then_every_seed_then_the_controls(study):
    first = design.wanted(study, {})
    assert first == [Run(arm, rate, 0) for arm in ("a", "b") for rate in GRID]
    scores = {Run("a", rate, 0): score for rate, score in zip(GRID, (0.1, 0.3, 0.2), strict=True)}
    assert design.rate(study, study.arm("a"), scores) == 4e-4
    assert design.rate(study, study.arm("b"), scores) is None
    later = design.wanted(study, scores)
    assert later[0] == Run("a", 4e-4, 1)  # seed 0 was done in the search
    assert [run for run in later if run.arm == "c"] == [Run("c", 4e-4, 0), Run("c", 4e-4, 1)]
    assert design.final_runs(study, scores) == {"a": [Run("a", 4e-4, 0)]}


def test_a_study_comes_to_an_end(study):
    """Doing what is wanted, whatever comes out, ends with every arm on every seed."""
    scores = {}
    for _ in range(20):
        runs = design.wanted(study, scores)
        if not runs:
            break
        scores |= {run: -run.learning_rate for run in runs}
    assert {name: len(runs) for name, runs in design.final_runs(study, scores).items()} == {"a": 2, "b": 2, "c": 2}


def test_an_arm_with_more_seeds_has_runs_and_worlds_for_them():
    arms = plain()["arms"]
    study = design.study_from(plain(arms=[arms[0] | dict(more_seeds=[7]), *arms[1:]]))
    scores = {Run("a", rate, 0): score for rate, score in zip(GRID, (0.1, 0.3, 0.2), strict=True)}
    later = design.wanted(study, scores)
    assert [run.seed for run in later if run.arm == "a"] == [1, 7]
    assert [run.seed for run in later if run.arm == "c"] == [0, 1]  # a control takes the rate, not the seeds
    assert study.all_seeds == (0, 1, 7)
    assert design.only(study, ["b"]).all_seeds == (0, 1)  # nobody needs that world


def test_an_arm_knows_the_control_that_is_its_own_teacher():
    arms = plain()["arms"]
    own = dict(name="d", title="D", settings={"teacher.kind": "self"}, rate_of="a", is_control=True)
    study = design.study_from(plain(arms=[*arms, own]))
    assert study.self_of(study.arm("a")) == study.arm("d")
    assert study.self_of(study.arm("b")) is None


def test_only_keeps_the_arms_whose_rates_are_taken(study):
    assert [arm.name for arm in design.only(study, ["c"]).arms] == ["a", "c"]
    with pytest.raises(InputError, match="no arm 'z'; there are a, b, c"):
        design.only(study, ["z"])


def test_a_run_has_its_own_settings_seed_and_world(study):
    common = to_dict(from_mapping(compare_small.get_config()))
    before = str(common)
    config = design.run_config(common, study, Run("b", 3e-4, 1), Path("/study"))
    assert str(common) == before
    assert config.objective.arm == "branch"
    assert config.objective.weights.sft == 0.5
    assert (config.train.seed, config.world.seed, config.optimizer.learning_rate) == (1, 1, 3e-4)
    assert config.world.path == "/study/worlds/seed-1"
    assert config.data.eval == "/study/worlds/seed-1/validation.jsonl"  # curves never see the held-out problems
    assert config.eval.every == 5


@pytest.mark.parametrize("section", [*compare_small.SECTIONS, "fast", "rewriting,fast"])
def test_every_run_of_every_section_is_a_valid_config(section):
    study = design.study_from(compare_small.get_study(section))
    common = to_dict(from_mapping(compare_small.get_config(section)))
    configs = {arm.name: design.run_config(common, study, Run(arm.name, 1e-4, 0), Path("/study")) for arm in study.arms}
    assert len({str(dataclasses.asdict(config)) for config in configs.values()}) == len(configs), "two arms are one"
