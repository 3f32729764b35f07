"""Settings: what differs."""

from omniopd_jax.report.settings import differences, settings

BASE = {"audit": {"num_chunks": 10, "similarity": "edit"}, "data": {"template_args": {"enable_thinking": False}}}


def test_changes_are_told_from_defaults():
    config = {"audit": {"num_chunks": 5, "similarity": "edit"}, "data": {"template_args": {"enable_thinking": True}}}
    found = settings(config, BASE)
    assert found["changed"] == [
        ["audit.num_chunks", "5", "10"],
        ["data.template_args.enable_thinking", "true", "false"],
    ]
    assert len(found["all"]) == 3


def test_an_unchanged_config_has_no_changes_and_unknown_defaults_no_opinion():
    assert settings(BASE, BASE)["changed"] == []
    assert settings(BASE, None)["changed"] is None


def test_a_setting_without_a_default_is_shown():
    assert settings({"new": {"knob": 1}}, BASE)["changed"] == [["new.knob", "1", "–"]]


def test_differences_hold_only_what_is_not_the_same_everywhere():
    found = differences([BASE, BASE | {"audit": {"num_chunks": 5, "similarity": "edit"}}])
    assert found == {"audit.num_chunks": ["10", "5"]}
