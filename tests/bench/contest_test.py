"""Contestants take turns behind the protocol; records, ratios and tables say what happened."""

import sys
from pathlib import Path

import pytest

from configs import base
from omniopd_jax.bench import contest, peers, shapes, suites, tables
from omniopd_jax.types import InputError

# A contestant that needs no library: `seconds` of pretended work, `mib` of real memory, a device for one process alone.
PLAYER = """
import atexit, os, time
from omniopd_jax.bench.protocol import Work, serve

def prepare(spec):
    if spec["seconds"] < 0:
        raise ValueError("cannot be prepared")
    if spec["device"]:
        os.mkdir(spec["device"])
        atexit.register(lambda: (time.sleep(0.5), os.rmdir(spec["device"])))
    if spec["seconds"] == 0:
        raise ValueError("ran out of memory")
    def run():
        print("noise on stdout")
        block = b"1" * (spec["mib"] * 2**20)
        return {"wall_s": spec["seconds"], "cpu_s": 2 * spec["seconds"], "tokens": 100,
                "xla_flops_per_s": 1e9, "bytes_per_s": 1e9, "seen": len(block) > 0}
    return Work(run, about={"versions": {"player": "1"}, "platform": spec["platform"]})

serve(prepare)
"""


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    path = tmp_path_factory.mktemp("player") / "player.py"
    path.write_text(PLAYER, encoding="utf-8")

    def entrant(name, seconds, mib=0, device="", platform="cpu"):
        spec = {"seconds": seconds, "mib": mib, "device": str(device), "platform": platform}
        return contest.Entrant(name, spec, (sys.executable, str(path)))

    return entrant


@pytest.fixture(scope="module")
def records(player):
    settings = contest.Settings(repeats=3, cores=(), clock="cpu")
    held = contest.Contest(
        "play",
        "A",
        {"batch": 2},
        [player("ours", 0.5, 1), player("slow", 1.0, 32), player("slower", 2.0), player("broken", -1.0)],
        tokens=0,
        cost=shapes.Cost(((1e9, 0.0), (0.0, 5e8))),
        bar=1.5,
    )
    machine = contest.Machine(player("machine", 0.1), settings)
    try:
        return contest.hold(held, machine, lambda text: None)
    finally:
        machine.close()


def test_ratios_are_of_tokens_a_second_on_the_clock_asked_for(records):
    ours, slow, slower, _ = records
    assert ours["median_s"] == 1.0
    assert ours["median_wall_s"] == 0.5
    assert ours["tokens_per_s"] == 100
    assert ours["bound_s"] == pytest.approx(1.5)  # a second of arithmetic, then half a second of reading
    assert ours["multiple_of_bound"] == pytest.approx(1 / 1.5)
    assert slow["ours_is_faster"] == 2
    assert slower["ours_is_faster"] == 4
    assert ours["faster_than_best"] == 2
    assert ours["bar"] == 1.5
    assert ours["versions"] == {"player": "1"}


def test_memory_is_what_exists_during_the_work(records):
    assert records[1]["extra_memory_mib"] == pytest.approx(32, abs=6)
    assert records[0]["extra_memory_mib"] < 10


def test_a_contestant_that_fails_is_named_and_the_others_go_on(records):
    assert records[3]["entrant"] == "broken"
    assert "cannot be prepared" in records[3]["error"]
    assert "broken" in tables.summary(records)


def test_ours_may_not_fail(player):
    settings = contest.Settings(repeats=1, cores=(), clock="wall")
    held = contest.Contest("play", "A", {}, [player("ours", -1.0)], tokens=0, cost=None)
    machine = contest.Machine(player("machine", 0.1), settings)
    with pytest.raises(contest.ContestError, match="cannot be prepared"):
        contest.hold(held, machine, lambda text: None)
    machine.close()


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_tpu_never_has_two_processes_on_it(player, tmp_path, platform):
    seconds = {"ours": 0.5, "broken": 0.0, "slow": 1.0}
    players = [player(name, taken, device=tmp_path / "chip") for name, taken in seconds.items()]
    held = contest.Contest("play", "A", {}, players, tokens=0, cost=None)
    chip = tmp_path / "chip" if platform == "tpu" else ""
    machine = contest.Machine(player("machine", 0.1, device=chip, platform=platform), contest.Settings(2, (), "wall"))
    ours, broken, slow = contest.hold(held, machine, lambda text: None)
    machine.close()
    assert ours["repeats"] == 2
    assert "error" in broken
    if platform == "tpu":
        assert ours["faster_than_best"] == 2
    else:
        assert "File exists" in slow["error"]


def test_tables_hold_the_last_contest_of_each_kind(records, tmp_path):
    import json

    path = tmp_path / "records.jsonl"
    old = [dict(record, tokens_per_s=1.0) for record in records if "error" not in record]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*old, *records]), encoding="utf-8")
    read = tables.read(path)
    assert read == records
    text = tables.markdown(read)
    assert "| play A | ours | 1.00 s | 100 |" in text
    assert "2.00× the best | 1.50×" in text
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1 is no record"):
        tables.read(path)


def test_tables_go_between_the_marks_of_a_document(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- tables begin -->\nold\n<!-- tables end -->\nafter\n", encoding="utf-8")
    tables.put_into(path, "new\n\n")
    expected = "before\n<!-- tables begin -->\nnew\n<!-- tables end -->\nafter\n"
    assert path.read_text(encoding="utf-8") == expected
    path.write_text("no marks", encoding="utf-8")
    with pytest.raises(InputError, match="needs the lines"):
        tables.put_into(path, "new")


def test_costs_of_a_shape_counted_by_hand():
    c = shapes.read_shape("A")
    layer = 256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 768
    assert shapes.layer_weights(c) == 4 * layer
    assert shapes.head_weights(c) == 256 * 8192
    cost = shapes.update_cost(c, batch=8, tokens=128, predicted=127, itemsize=4)
    forward = 8 * (128 * (2 * 4 * layer + 4 * 4 * 4 * 64 * 64) + 127 * 2 * 256 * 8192)
    assert cost.flops == pytest.approx(4 * forward)
    assert len(shapes.rollout_cost(c, 8, 32, 96, 4).phases) == 96


def test_suites_say_what_they_hold():
    options = suites.Options(
        models=(),
        batch=0,
        prompt_tokens=0,
        new_tokens=0,
        dtype="float32",
        config=base.get_config().to_dict(),
        folder=lambda name: "",
        rivals={"tunix": ("python", "tunix_peer.py")},
    )
    held = list(suites.contests("all", options))
    assert {"rollout", "audit", "score, dense jax", "update", "branch update"} <= {one.work for one in held}
    assert all(one.entrants[0].name == "ours" or one.entrants[1].name == "ours" for one in held)
    assert [entrant.name for entrant in held[0].entrants] == ["ours", "tunix"]
    with pytest.raises(InputError, match="--suite=speed is none of rollout, audit"):
        list(suites.contests("speed", options))
    with pytest.raises(InputError, match="neither one of tiny, A, B"):
        shapes.read_shape("C")


def test_an_environment_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("trl", "tunix"):
        (scripts / f"{name}.txt").write_text("a package that is none\n", encoding="utf-8")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="No environment for"):
        peers.commands(scripts, tmp_path / "cache", lambda text: None)


def test_rivals_scripts_and_requirements_are_there():
    folder = Path(contest.ROOT) / "experiments" / "peers"
    for environment, script in peers.RIVALS.values():
        assert (folder / script).is_file()
        pins = (folder / f"{environment}.txt").read_text(encoding="utf-8").splitlines()
        assert all("==" in line for line in pins if not line.startswith("#"))
