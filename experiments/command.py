"""What every main shares: flags that fail in one sentence, and exit codes (`help.EXIT_CODES`)."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import cast

from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_flags

from omniopd_jax import heap
from omniopd_jax.config import Config, from_mapping
from omniopd_jax.types import InputError

_OUT_OF_MEMORY = (
    "Out of memory on the device: lower train.micro_batch_size (the responses of one pass of the update), "
    "rollout.slots (those decoded at once) or eval.batch_size, set train.remat=full, spread the model with mesh.fsdp, "
    "or, where a local teacher works beside the update, set pipeline.micro_batches=1."
)

_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0 of several; empty: what the cluster says, if any; auto; off."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Processes in all; 0: as the cluster says.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this one, from 0; -1: as the cluster says.")
_COORDINATOR_TIMEOUT_S = flags.DEFINE_integer("coordinator_timeout_s", 600, "How long the processes wait to meet.")


def join_processes() -> bool:
    """Joins the other processes of the run, if there are any; the first thing a main does that trains.

    Returns:
      Whether this process is the first: the one that prints and writes the report.
    """
    from omniopd_jax.train import distributed

    distributed.start(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, timeout_s=_COORDINATOR_TIMEOUT_S.value
    )
    return distributed.is_first()


def define_config(default: str | None = None) -> flags.FlagHolder:
    """The --config flag: a file of configs/, its knobs overridden by --config.section.knob=value."""
    return config_flags.DEFINE_config_file("config", default, "Config file, e.g. configs/gsm8k.py.", lock_config=True)


def read_config(holder: flags.FlagHolder) -> Config:
    """The frozen, validated config behind --config."""
    try:
        return from_mapping(holder.value)
    except OSError as error:  # ml_collections reports an absent file on first use
        raise InputError("--config: " + " ".join(str(error.__cause__ or error).split())) from error


def workdir(value: str | None, default: str) -> Path:
    """The work directory as an absolute path, or as an address (gs://…); not created here."""
    if "://" in (value or default):
        return cast(Path, epath.Path(value or default))
    return Path(os.path.expanduser(value or default)).absolute()


def write_report(folder: Path) -> Path:
    """report.html of a work directory, in which the settings that differ from configs/base.py come first."""
    from configs import base
    from omniopd_jax import report

    return report.write_report(folder, defaults=base.get_config().to_dict())


def run(main: Callable[[], None]) -> None:
    """Runs a main. Errors that carry an exit code end the process with it and one sentence, without a traceback."""
    # XLA's banners are noise to a reader of training logs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    heap.keep_freed_memory()
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def _guarded(main: Callable[[], None]) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().python_handler.stream = _StandardError()
    # What this project has to say (the pre-flight, the teacher's probe) is for the user; other libraries stay quiet.
    ours = logging.getLogger("omniopd_jax")
    ours.setLevel(logging.INFO)
    ours.addHandler(logging.StreamHandler(_StandardError()))
    ours.propagate = False
    try:
        main()
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None and "RESOURCE_EXHAUSTED" in str(error):
            print(f"{_OUT_OF_MEMORY}\n\n{str(error)[:600]}", file=sys.stderr)
            _leave_processes(1, error)
            sys.exit(1)
        if code is None:
            _leave_processes(1, error, is_bug=True)
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt as error:
        print("Interrupted.", file=sys.stderr)
        _leave_processes(130, error)
        sys.exit(130)


def _leave_processes(code: int, error: BaseException, *, is_bug: bool = False) -> None:
    """A failure that the other processes do not know of: they must not wait for this one, nor it for them."""
    if "omniopd_jax.train.distributed" in sys.modules:
        from omniopd_jax.train import distributed

        if distributed.has_peers() and not distributed.is_known_to_all(error):
            if is_bug:
                traceback.print_exception(error)
            distributed.leave(code)


class _StandardError:
    """sys.stderr as it is at the moment: a screen that redraws itself puts lines above its bars."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def close(self) -> None:
        """Left open: it is not ours."""


def _parse(argv: list[str]) -> list[str]:
    if {"--help", "-help", "-h", "-?"} & set(argv[1:]):
        from experiments.help import help_text

        print(help_text())
        sys.exit(0)
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, FileNotFoundError, ImportError, KeyError, TypeError, ValueError) as error:
        # ml_collections raises these while it reads the config file or meets an unknown --config.key.
        message = str(error).strip("'\"").replace("\\'", "'").replace("\\n", "; ")
        print(f"FATAL Flags parsing error: --config: {message}", file=sys.stderr)
        sys.exit(2)
