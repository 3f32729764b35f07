"""What is saved comes back, and what is damaged or of another run does not."""

import contextlib
import dataclasses
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omniopd_jax.config import to_dict
from omniopd_jax.train import checkpoint
from omniopd_jax.train.checkpoint import Checkpoints, check_same_config, differing_fields, fingerprint
from omniopd_jax.train.stops import CheckpointError, WorkdirError
from omniopd_jax.types import TrainState


def make_state(step: int, *, width: int = 64) -> TrainState:
    params = {
        "a": jnp.arange(width * width, dtype=jnp.float32).reshape(width, width) + step,
        "b": jnp.ones(3, jnp.bfloat16),
    }
    return TrainState(step=jnp.int32(step), params=params, opt_state=(jax.tree.map(jnp.zeros_like, params),))


@pytest.fixture
def saved(make_config, tmp_path):
    """Steps 1, 2 and 3, of which two are kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", make_config(), keep=2)
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), {"spent": {"calls": step}})
    checkpoints.close()
    return tmp_path / "checkpoints"


def restore(folder, config, like=None):
    checkpoints = Checkpoints(folder, config, keep=2)
    try:
        return checkpoints.restore(make_state(0) if like is None else like)
    finally:
        checkpoints.close()


def test_the_newest_comes_back_with_its_progress(saved, make_config):
    state, progress = restore(saved, make_config())
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
    assert progress == {"spent": {"calls": 3}}
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_nothing_to_restore(make_config, tmp_path):
    assert restore(tmp_path / "checkpoints", make_config()) is None


def test_the_best_and_those_of_every_so_many_steps_stay(make_config, tmp_path):
    scores = {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.8, 6: 0.1, 7: 0.2}

    def opened():
        return Checkpoints(tmp_path / "checkpoints", make_config(), keep=1, keep_every=3, keeps_best=True)

    checkpoints = opened()
    for step, score in scores.items():
        assert checkpoints.is_best(score) == (score is not None and step in (1, 2)), step
        checkpoints.save(make_state(step), {}, score=score)
        checkpoints.wait()
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 3, 6, 7]
    again = opened()
    assert not again.is_best(0.85), "a resumed run knows the best one before it"
    assert again.is_best(0.95)
    state, _ = again.restore(make_state(0))
    assert int(state.step) == 7, "a run goes on from the newest, not from the best"
    again.close()


def damage(folder, how):
    data = max((folder / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 0xFF
        data.write_bytes(bytes(content))
    elif how == "other numbers":
        shutil.rmtree(folder / "state")
        shutil.copytree(folder.with_name("2") / "state", folder / "state")
    elif how == "no description":
        (folder / "meta" / "metadata").unlink()
    elif how == "half a description":
        path = folder / "meta" / "metadata"
        path.write_text(path.read_text()[:50])


@pytest.mark.parametrize("how", ["truncated", "flipped", "other numbers", "no description", "half a description"])
def test_a_damaged_one_falls_back_to_the_one_before_and_says_so(saved, make_config, caplog, how):
    damage(saved / "3", how)
    state, progress = restore(saved, make_config())
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    assert progress == {"spent": {"calls": 2}}
    assert "The checkpoint of step 3" in caplog.text
    assert "trying the one before it" in caplog.text
    assert not (saved / "3").exists()  # step 3 is taken again, and saved again


def test_when_all_are_damaged_nothing_starts_from_scratch_in_silence(saved, make_config):
    damage(saved / "2", "truncated")
    damage(saved / "3", "no description")
    with pytest.raises(CheckpointError, match=r"None of the checkpoints .* \(steps \[2, 3\]\) can be read"):
        restore(saved, make_config())


def test_another_model_is_refused_by_name(saved, make_config):
    with pytest.raises(
        WorkdirError, match=r"another model or optimizer: .*a is float32\[64, 64\] there and float32\[32, 32\]"
    ):
        restore(saved, make_config(), make_state(0, width=32))


def test_another_optimizer_is_refused(saved, make_config):
    like = dataclasses.replace(make_state(0), opt_state=())
    with pytest.raises(WorkdirError, match=r"opt_state.* and absent in this run"):
        restore(saved, make_config(), like)


def test_another_config_is_refused_and_what_may_change_may(saved, make_config):
    with pytest.raises(WorkdirError, match=r"train\.seed was 0, now 1\); use another work directory"):
        restore(saved, make_config(**{"train.seed": 1}))
    changed = {"train.steps": 99, "eval.every": 7, "teacher.max_dollars": 5.0, "teacher.base_url": "http://localhost:1"}
    assert restore(saved, make_config(**changed)) is not None


def test_steps_may_change_only_under_a_constant_schedule(make_config):
    for schedule, names in (("constant", []), ("cosine", ["train.steps"])):
        before = make_config(**{"optimizer.schedule": schedule})
        assert (
            differing_fields(to_dict(before), make_config(**{"optimizer.schedule": schedule, "train.steps": 9}))
            == names
        )


def test_many_differences_are_counted(make_config, tmp_path):
    before = to_dict(make_config())
    after = make_config(
        **{"train.seed": 1, "audit.num_chunks": 1, "audit.chunk_tokens": 3, "optimizer.b1": 0.5, "optimizer.b2": 0.5}
    )
    with pytest.raises(WorkdirError, match="and 1 more"):
        check_same_config(before, after, tmp_path)


def save_and_wait(checkpoints, state):
    """It is written in the background, so the error may show only at the end."""
    checkpoints.save(state, {})
    checkpoints.wait()


def test_a_failed_write_leaves_the_last_one_intact(saved, make_config):
    """Files may grow to 2 kB from here on, as on a disk that is full."""
    checkpoints = Checkpoints(saved, make_config(), keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*the checkpoint of step 3 is intact"):
            save_and_wait(checkpoints, make_state(4))
    finally:
        with contextlib.suppress(CheckpointError):
            checkpoints.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state, _ = restore(saved, make_config())
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))


def test_no_room_is_told_before_anything_is_computed(monkeypatch, tmp_path):
    usage = dataclasses.make_dataclass("Usage", ["free"])(30_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"0 MiB free, and two checkpoints of this model take 0 MiB"):
        checkpoint.check_room(tmp_path, make_state(0))


def test_a_damaged_config_file_is_named(make_config, tmp_path):
    checkpoint.claim_workdir(tmp_path, make_config())
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 6
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"config\.json is not JSON"):
        checkpoint.check_workdir(tmp_path, make_config())


def test_looking_at_a_work_directory_claims_nothing(make_config, tmp_path):
    checkpoint.check_workdir(tmp_path / "run", make_config())
    assert list((tmp_path / "run").iterdir()) == []


def test_a_fingerprint_sees_one_bit_and_not_the_order_of_leaves():
    tree = {"a": jnp.ones((3, 2)), "b": jnp.arange(4), "c": jnp.ones(3, jnp.bfloat16)}
    changed = tree | {"a": tree["a"].at[1, 1].set(1.0000001)}
    assert int(fingerprint(tree)) == int(fingerprint(dict(reversed(tree.items()))))
    assert int(fingerprint(tree)) != int(fingerprint(changed))
