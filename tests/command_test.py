"""How a main ends one of several processes whose failure the others do not know of."""

import pytest

from experiments import command
from omniopd_jax.train import distributed
from omniopd_jax.types import InputError


class Left(BaseException):
    """Instead of the end of the test's own process."""


@pytest.mark.parametrize(
    ("failure", "code", "shown"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GiB"), 1, "Out of memory on the device"),
        (KeyError("a bug"), 1, "Traceback"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_one_of_several_does_not_wait_for_processes_that_wait_for_it(monkeypatch, capsys, failure, code, shown):
    def leave(exit_code):
        raise Left(exit_code)

    def main():
        raise failure

    monkeypatch.setattr(distributed, "has_peers", lambda: True)
    monkeypatch.setattr(distributed, "leave", leave)
    with pytest.raises(Left) as left:
        command._guarded(main)
    assert left.value.args == (code,)
    assert shown in capsys.readouterr().err


def test_what_all_know_of_ends_with_its_own_code(monkeypatch, capsys):
    def main():
        raise InputError("No such file.")

    monkeypatch.setattr(distributed, "has_peers", lambda: True)
    with pytest.raises(SystemExit) as ended:
        command._guarded(main)
    assert ended.value.code == 2
    assert "InputError: No such file." in capsys.readouterr().err
