"""What a config file offers beside `get_config`, wherever the file lies."""

import pytest

from experiments import sections
from omniopd_jax.types import InputError


@pytest.fixture
def named(monkeypatch):
    """Puts a text behind --config."""

    def named(text):
        monkeypatch.setattr(sections.flags, "FLAGS", {"config": None})
        monkeypatch.setattr(sections.config_flags, "get_config_filename", lambda flag: text)

    return named


def test_a_file_of_the_user_s_own_is_read_where_it_lies(named, tmp_path):
    file = tmp_path / "my-study.py"
    text = "KEY = 'name'\ndef get_study(section='whole'):\n    return {KEY: section}\n"
    file.write_text(text, encoding="utf-8")
    named(str(file))
    assert sections.of_config("get_study") == {"name": "whole"}
    named(f"{file}:part,fast")
    assert sections.of_config("get_study") == {"name": "part,fast"}
    with pytest.raises(InputError, match="has no function get_estimators"):
        sections.of_config("get_estimators")
