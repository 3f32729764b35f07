"""A work directory in a bucket: what lands there is what a folder would hold. The bucket is a folder in disguise."""

import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils.epath import backend, gpath

from omniopd_jax.train import loop, mirror
from omniopd_jax.train.mirror import Mirror
from omniopd_jax.train.stops import CheckpointError, WorkdirError
from tests.train.conftest import read_lines


class Bucket(backend._OsPathBackend):
    """gs://… as a folder of this machine; without appending, as an object store."""

    def __init__(self, folder):
        self.folder = folder
        self.is_closed = False

    def at(self, path):
        path = os.fspath(path)
        if self.is_closed:
            raise PermissionError(13, "403 you shall not write", path)
        return str(self.folder / path.removeprefix("gs://")) if path.startswith("gs://") else path

    def open(self, path, mode):
        assert "a" not in mode
        return super().open(self.at(path), mode)

    def __getattribute__(self, name):
        if name in ("exists", "isdir", "listdir", "makedirs", "mkdir", "rmtree", "remove", "stat"):
            plain = getattr(backend._OsPathBackend, name)
            return lambda path, *rest, **options: plain(self, self.at(path), *rest, **options)
        return super().__getattribute__(name)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    found = Bucket(tmp_path / "bucket")
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return found


def test_what_changed_goes_there_and_comes_back(bucket, tmp_path):
    one = Mirror("gs://b/run")
    one.pull()
    (one.local / "world").mkdir()
    (one.local / "world" / "rows.jsonl").write_text("1\n")
    (one.local / "teacher_cache.sqlite").write_bytes(b"open")
    one.push()
    there = bucket.folder / "b" / "run"
    assert sorted(path.name for path in there.rglob("*")) == ["rows.jsonl", "world"]
    (there / "world" / "rows.jsonl").unlink()
    one.push()
    assert not (there / "world" / "rows.jsonl").exists(), "what has not changed is not copied again"
    (one.local / "world" / "rows.jsonl").write_text("1\n2\n")
    one.push()

    shutil.rmtree(tmp_path / "home")
    other = Mirror("gs://b/run")
    other.pull()
    assert (other.local / "world" / "rows.jsonl").read_text() == "1\n2\n"
    (other.local / "left.jsonl").write_text("of a run that was killed")
    other.pull()
    assert not (other.local / "left.jsonl").exists(), "the bucket decides"


def test_a_folder_is_its_own_mirror(tmp_path):
    own = Mirror(tmp_path)
    assert own.local == tmp_path
    assert own.checkpoints == tmp_path / "checkpoints"
    own.pull()
    own.push()
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_cannot_be_written_is_one_sentence(bucket):
    bucket.is_closed = True
    with pytest.raises(WorkdirError, match=r"gs://b/run cannot be read: .*you shall not write"):
        Mirror("gs://b/run").pull()


def test_a_bucket_that_fails_later_ends_the_run_as_a_checkpoint_that_cannot_be_written(bucket):
    """Bad input would tell a launcher that another try ends the same way."""
    one = Mirror("gs://b/run")
    one.pull()
    (one.local / "metrics.jsonl").write_text("1\n")
    bucket.is_closed = True
    experiment = SimpleNamespace(mirror=one, checkpoints=SimpleNamespace(last="the checkpoint of step 3 is intact"))
    with pytest.raises(CheckpointError, match=r"gs://b/run cannot be written: .*the checkpoint of step 3 is intact\.$"):
        loop.push(experiment)


def test_a_run_in_a_bucket_resumes_on_another_machine(
    bucket, monkeypatch, tmp_path, make_config, model, tokenizer, prompts, teacher
):
    # Checkpoints are orbax's, which has clients of its own for buckets.
    monkeypatch.setattr(mirror.Mirror, "checkpoints", property(lambda self: tmp_path / "checkpoints"))

    def distil(workdir, steps):
        config = make_config(**{"train.steps": steps, "train.compilation_cache": str(tmp_path / "compiled")})
        return loop.run(config, workdir, student=model, tokenizer=tokenizer, teacher=teacher, prompts=prompts)

    distil("gs://b/run", 1)
    shutil.rmtree(tmp_path / "home")
    resumed = distil("gs://b/run", 2)
    there = bucket.folder / "b" / "run"
    assert [line["step"] for line in read_lines(there / "metrics.jsonl")] == [1, 2]
    assert {"config.json", "audits.jsonl", "rollouts.jsonl", "model"} <= {path.name for path in there.iterdir()}
    monkeypatch.undo()
    alone = distil(tmp_path / "folder", 2)
    jax.tree.map(np.testing.assert_array_equal, resumed.model.params, alone.model.params)
