"""Runs untrusted Python in a service that speaks like SandboxFusion: POST /run_code, one file of Python a call.

The tests of a function run there as in `eval/inside.py`: the file that is sent holds the tests, deletes itself, and
starts the program in a process of its own; the verdict is a line that begins with a token made for this one call. The
service puts the wall around both; between the two stands only what the service's operating system puts between
processes of one user (no reading of each other's memory, unless the service runs programs as root).
"""

from __future__ import annotations

import http.client
import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from omniopd_jax.eval.sandbox import SOURCE, Limits, NotStartedError, SandboxError, insist
from omniopd_jax.eval.verdict import Verdict
from omniopd_jax.types import InputError

ATTEMPTS = 3
_PAUSE_S = 0.5  # before the second attempt; doubled for the third
_MOST = 64 << 20  # bytes of a reply that are read


class ServiceSandbox:
    """Programs on another machine (or in a container of this one).

    Args:
      url: of the service, without /run_code.

    Raises:
      InputError: not an address.
    """

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"eval.sandbox={url!r} is no address of a service: expected http://HOST:PORT.")
        self._url = url.rstrip("/") + "/run_code"
        is_here = parts.hostname in ("localhost", "127.0.0.1", "::1")
        # A proxy of the environment knows nothing of this machine; a redirect would carry the tests elsewhere.
        handlers = [_NoRedirect(), *([urllib.request.ProxyHandler({})] if is_here else [])]
        self._open = urllib.request.build_opener(*handlers).open

    def run_tests(self, program: str, tests: str, limits: Limits) -> Verdict:
        """As LocalSandbox.run_tests.

        Raises:
          SandboxError: the service does not answer, says that it failed itself, or twice started no program.
        """
        token = secrets.token_hex(16)
        bounds = dict(
            cpu_s=int(limits.timeout_s) + 2, file_mb=limits.file_mb, files=limits.files, memory_mb=limits.memory_mb
        )
        job = dict(program=program, tests=tests, limits=bounds, call_s=limits.call_s)
        source = json.dumps(SOURCE)
        code = (
            f"import json\nsource = json.loads({source!r})\nscope = {{'__name__': 'inside', '__file__': __file__}}\n"
            f"exec(source, scope)\nscope['service'](source, json.loads({json.dumps(job)!r}), {token!r})\n"
        )

        def judged() -> Verdict:
            result, outcome = self._run(code, "", limits)
            lines = [line for line in str(result.get("stdout") or "").splitlines() if line.startswith(token)]
            if len(lines) != 1:
                return Verdict(False, outcome or "the tests ended without a verdict")
            found = json.loads(lines[0].removeprefix(token))
            if "failed" in found:
                raise NotStartedError(found["failed"])
            return Verdict(found["passed"] is True, str(found["reason"]))

        return insist(judged, f"at {self._url}")

    def run_program(self, program: str, text: str, limits: Limits) -> tuple[str, str]:
        """As LocalSandbox.run_program."""
        result, outcome = self._run(program, text, limits)
        out = str(result.get("stdout") or "")
        if len(out) > limits.output_bytes:
            outcome = outcome or f"output: more than {limits.output_bytes} bytes"
        if not outcome and result.get("return_code"):
            said = str(result.get("stderr") or "").strip().splitlines()
            outcome = f"exit status {result['return_code']}" + (f": {said[-1][:300]}" if said else "")
        return out, outcome

    def _run(self, code: str, text: str, limits: Limits) -> tuple[dict[str, Any], str]:
        """(run_result, "" or why the run did not come to its end)."""
        request = dict(
            code=code, language="python", stdin=text, compile_timeout=limits.timeout_s, run_timeout=limits.timeout_s,
            memory_limit_MB=limits.memory_mb,
        )  # fmt: skip
        reply = self._post(json.dumps(request).encode(), timeout_s=2 * limits.timeout_s + 30)
        result = reply.get("run_result") or reply.get("compile_result") or {}
        if not isinstance(result, dict):
            raise SandboxError(f"{self._url} answered without a run_result.")
        is_late = result.get("status") == "TimeLimitExceeded"
        return result, f"timeout: more than {limits.timeout_s:g} s" if is_late else ""

    def _post(self, body: bytes, timeout_s: float) -> dict[str, Any]:
        said = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_S * 2 ** (attempt - 1))
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
            try:
                with self._open(request, timeout=timeout_s) as answer:
                    reply = json.loads(answer.read(_MOST))
                if not isinstance(reply, dict):
                    said = "the reply is no object"
                elif reply.get("status") in ("Success", "Failed"):
                    return reply
                else:
                    said = str(reply.get("message") or reply.get("status"))[:300]
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}"
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                said = str(error)[:300]
        raise SandboxError(f"The sandbox at {self._url} cannot run programs: {said}. Nothing was judged by that.")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
