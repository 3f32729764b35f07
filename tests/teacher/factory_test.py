"""What a config makes, and the sentences for configs that cannot work."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from omniopd_jax.config import ConfigError
from omniopd_jax.teacher.capabilities import find_capability
from omniopd_jax.teacher.factory import chat_renderer, make_teacher
from omniopd_jax.teacher.transport import check_address, is_loopback
from omniopd_jax.types import Message
from tests.teacher.conftest import KEY, config_of
from tests.tiny_tokenizers import save_byte_level


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/v1", "http://localhost:8000", "http://[::1]:8000/v1", "https://api.example.com/v1"]
)
def test_sound_addresses(url):
    check_address(url, allow_insecure_http=False)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://10.0.0.5:8000/v1", "allow_insecure_http=True"),
        ("http://127.0.0.1.example.com/v1", "allow_insecure_http=True"),
        ("http://localhost.example.com/v1", "allow_insecure_http=True"),
        ("https://user:password-1@example.com/v1", "must not hold a user or password"),
        ("ftp://example.com", "must be an address like"),
        ("127.0.0.1:8000", "must be an address like"),
    ],
)
def test_addresses_that_are_refused(url, told):
    with pytest.raises(ConfigError, match=told) as refused:
        check_address(url, allow_insecure_http=False)
    assert "password-1" not in str(refused.value)
    assert not is_loopback(url)


def test_plain_http_can_be_allowed():
    check_address("http://10.0.0.5:8000/v1", allow_insecure_http=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": ""}, "config.teacher.model must name the model"),
        ({"base_url": "http://example.com/v1"}, "allow_insecure_http"),
        ({"base_url": ""}, "No API key: set OPENAI_API_KEY"),
        ({"api_key_env": "NOT_THERE"}, "NOT_THERE, which is not set"),
        ({"cache_path": "off", "replay_only": True}, "replay_only needs a cache"),
        ({"base_url": "https://example.com/v1", "max_dollars": 1.0, "model": "no-price"}, "needs a price"),
        ({"max_dollars": 1.0, "model": "no-price"}, "needs a price for 'no-price': name a file .* or set .*max_calls"),
        ({"capabilities": "/no/such/file.json"}, "must be a JSON object"),
        ({"prices": "/no/such/file.json"}, "must be a JSON object"),
    ],
)
def test_configs_that_cannot_work(changes, told, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=told):
        make_teacher(config_of("openai", "http://127.0.0.1:1", **changes), workdir=tmp_path, run_seed=0)


def test_documented_commands_name_all_that_a_run_needs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m experiments\.train .*", text.replace("\\\n", " "), flags=re.M)
    assert len(commands) == 2
    for command in commands:
        for knob in ("student.path", "data.train", "teacher.kind", "teacher.model"):
            assert f"--config.{knob}=" in command


@pytest.mark.parametrize(
    ("kind", "model", "modes", "sampling"),
    [
        ("anthropic", "claude-haiku-4-5-20251001", ("prefill", "instruct"), "one"),
        ("anthropic", "claude-opus-4-6", ("instruct",), "one"),
        ("anthropic", "claude-opus-4-7", ("instruct",), "fixed"),
        ("anthropic", "claude-haiku-5-5", ("instruct",), "fixed"),
        ("gemini", "gemini-2.5-flash", ("prefill", "instruct"), "both"),
        ("gemini", "gemini-3.5-flash", ("prefill", "instruct"), "both"),
        ("gemini", "gemini-3.5-flash-lite", ("instruct",), "fixed"),
        ("gemini", "gemini-3.6-flash", ("instruct",), "fixed"),
    ],
)
def test_records_of_known_models(kind, model, modes, sampling):
    found = find_capability(kind, model, "")
    assert (found.modes, found.sampling) == (modes, sampling)


def test_servers_are_told_from_openai_itself():
    assert find_capability("openai", "Qwen/Qwen3-32B", "http://127.0.0.1:8000/v1").modes[0] == "completions"
    assert find_capability("openai", "gpt-4.1", "").modes == ("instruct",)
    assert find_capability("openai", "deepseek-chat", "https://api.deepseek.com/beta").prefill == "prefix_flag"


def test_a_users_record_goes_first_and_its_mistakes_are_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"records": [{"kind": "anthropic", "model": "claude-x", "modes": ["prefill"]}]}))
    assert find_capability("anthropic", "claude-x", "", str(path)).modes == ("prefill",)
    assert find_capability("anthropic", "claude-haiku-4-5", "", str(path)).modes[0] == "prefill"
    for record, told in [
        ({"kind": "anthropic", "modes": ["prefil"]}, "modes='prefil' must be one of 'completions', 'prefill'"),
        ({"kind": "anthropic", "mode": "prefill"}, "'mode' is not a field"),
        ({"model": "x"}, 'at least "kind"'),
    ]:
        path.write_text(json.dumps({"records": [record]}))
        with pytest.raises(ConfigError, match=told):
            find_capability("anthropic", "claude-x", "", str(path))


def test_prompts_are_rendered_by_the_teachers_template(tmp_path, make, server, ask):
    folder = save_byte_level(tmp_path / "tokenizer")
    render = chat_renderer(str(folder or tmp_path / "tokenizer"), {})
    text = render((Message("user", "2 + 2"),))
    assert "2 + 2" in text
    teacher = make("openai", path=str(tmp_path / "tokenizer"), is_raw=False)
    teacher.continue_texts([ask(prefix="The sum", is_raw=False)])
    assert server.calls[-1]["call"].body["prompt"] == text + "The sum"


def test_proxies_of_the_environment_are_respected_but_not_for_this_machine(tmp_path, make, server, ask, monkeypatch):
    pytest.importorskip("openai")
    seen = []

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.path)
            self.rfile.read(int(self.headers["content-length"]))
            body = b'{"error": {"message": "through the proxy"}}'
            self.send_response(401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    proxy = HTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    make().continue_texts([ask()])  # loopback: straight to the server
    assert not seen
    config = config_of("openai", "http://teacher.invalid", allow_insecure_http=True)
    far = make_teacher(config, workdir=tmp_path, run_seed=0, is_raw=True)
    with pytest.raises(Exception, match="through the proxy"):
        far.probe()
    far.close()
    proxy.shutdown()
    proxy.server_close()
    assert seen == ["http://teacher.invalid/v1/completions"]
    assert KEY not in str(seen)
