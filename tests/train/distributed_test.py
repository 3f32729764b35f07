"""What the others of several processes hear of a failure; tests/multi_process_test.py has the exchange itself."""

import errno
import signal

import jax
import pytest

from configs import base
from omniopd_jax.config import ConfigError, from_mapping
from omniopd_jax.teacher.protocol import BudgetExhausted
from omniopd_jax.train import distributed
from omniopd_jax.train.distributed import PeerFailed, PeerStopped, collect
from omniopd_jax.train.stops import CheckpointError, Interrupted


@pytest.mark.parametrize(
    ("failure", "heard", "exit_code"),
    [
        (Interrupted(signal.SIGTERM), PeerStopped, 143),
        (BudgetExhausted("The cap is reached."), PeerStopped, 4),
        (CheckpointError("No room."), PeerFailed, 6),
        (OSError(errno.ENOSPC, "No space left on device"), PeerFailed, 6),  # a CheckpointError where it happened
        (ConfigError("No such file."), PeerFailed, 2),
        (KeyError("a bug"), PeerFailed, 1),
    ],
)
def test_the_others_end_with_the_exit_code_of_the_one_that_failed(monkeypatch, failure, heard, exit_code):
    """This process is the second of two; the first one fails."""

    def gather(own):
        sent.append(own)
        return [(None, distributed._described(failure)), own]

    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    with pytest.raises(heard, match=type(failure).__name__) as raised:
        collect(lambda: 7)
    assert raised.value.exit_code == exit_code
    assert sent == [(7, None)]


@pytest.mark.parametrize("field", ["max_calls", "max_tokens", "requests_per_minute", "tokens_per_minute"])
def test_the_shares_of_a_cap_never_come_to_more_than_the_cap(monkeypatch, field):
    teacher = base.get_config().teacher

    def share(total):
        settings = from_mapping(base.get_config().to_dict() | {"teacher": teacher.to_dict() | {field: total}}).teacher
        return getattr(distributed.teacher_share(settings), field)

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert share(0) == 0
    assert share(4) == 1
    assert share(11) == 2
    with pytest.raises(
        ConfigError, match=rf"teacher.{field}=3 is less than one for each of 4 processes.*0 for no limit"
    ):
        share(3)
