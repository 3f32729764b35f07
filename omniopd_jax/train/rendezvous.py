"""How processes find each other before jax does: where one is missing jax ends the process without a sentence.

Process 0 listens at the coordinator's address and greets the others; when all have come it tells them to go on, and
jax's own service takes over the port.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time

from omniopd_jax.config import ConfigError

_HELLO = b"omniopd"
_RETRY_S = 0.2
_MOST_BYTES = 64  # of a greeting


def meet(address: str, num_processes: int, process_id: int, *, timeout_s: float) -> None:
    """Returns once all processes have come.

    Args:
      address: HOST:PORT of process 0.
      num_processes: in all.
      process_id: of this one.
      timeout_s: how long to wait.

    Raises:
      ConfigError: not all came in time, or one of another run did.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ConfigError(f"--coordinator={address} needs the form HOST:PORT.")
    deadline = time.monotonic() + timeout_s
    if process_id == 0:
        _wait_for_all(int(port), address, num_processes, deadline, timeout_s)
    else:
        _announce((host.strip("[]"), int(port)), address, num_processes, process_id, deadline, timeout_s)


def _wait_for_all(port: int, address: str, count: int, deadline: float, timeout_s: float) -> None:
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, reuse_port=False)
    except (OSError, ValueError):  # a machine without IPv6
        try:
            server = socket.create_server(("", port))
        except OSError as error:
            raise ConfigError(f"--coordinator={address}: port {port} cannot be used ({error.strerror}).") from error
    come: dict[int, socket.socket] = {}
    with server, contextlib.ExitStack() as connections, selectors.DefaultSelector() as ready:
        server.setblocking(False)
        ready.register(server, selectors.EVENT_READ)
        while len(come) < count - 1:
            left = deadline - time.monotonic()
            if left <= 0 or not ready.select(left):
                missing = ", ".join(str(index) for index in range(1, count) if index not in come)
                raise ConfigError(
                    f"Of the {count} processes of this run, {missing} did not come to {address} within {timeout_s:g} s."
                )
            connection = connections.enter_context(server.accept()[0])
            connection.settimeout(min(max(left, _RETRY_S), 5.0))
            index = _read_hello(connection, address, count)
            if index is not None:
                come[index] = connection
        for connection in come.values():
            connection.sendall(b"go\n")


def _read_hello(connection: socket.socket, address: str, count: int) -> int | None:
    """The number of the process that says hello; None for anybody else."""
    try:
        words = connection.recv(_MOST_BYTES).split()
    except OSError:
        return None
    if len(words) != 3 or words[0] != _HELLO:
        return None
    theirs, index = int(words[1]), int(words[2])
    if theirs != count or not 0 < index < count:
        raise ConfigError(
            f"A process that calls itself {index} of {theirs} came to {address}, where process 0 of {count} waits: "
            "--num_processes is the same everywhere and every --process_id another."
        )
    return index


def _announce(place: tuple[str, int], address: str, count: int, index: int, deadline: float, timeout_s: float) -> None:
    reason = "nobody listens"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(place, timeout=left) as connection:
                connection.sendall(b"%s %d %d\n" % (_HELLO, count, index))
                if connection.recv(_MOST_BYTES) == b"go\n":
                    return
            reason = "it ended before all had come"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(_RETRY_S)
    raise ConfigError(
        f"Process {index} of {count} did not reach process 0 at {address} within {timeout_s:g} s ({reason})."
    )
