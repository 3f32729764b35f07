"""The import rules of the architecture: data flows one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "omniopd_jax"

# room → rooms it may import. `types` and `prng` hold no logic of a room.
MAY_IMPORT = {
    "types": set(),
    "prng": {"types"},
    "gathering": {"types"},
    "quiet": set(),
    "heap": set(),
    "config": {"types"},
    "algo": {"types"},
    "models": {"types", "gathering"},
    "data": {"types"},
    "worlds": {"types"},
    "similarity": {"quiet"},
    "rollout": {"models", "types", "prng", "algo", "gathering"},
    "teacher": {"data", "similarity", "types", "prng", "config"},
    "eval": {"rollout", "data", "types", "prng", "models", "worlds", "config", "gathering"},
    "train": {
        "types", "prng", "config", "algo", "models", "rollout", "data", "worlds", "similarity", "teacher", "eval",
        "quiet", "gathering",
    },
    "study": {"types", "prng", "config", "algo", "models", "rollout", "data", "worlds", "eval", "train"},
    "plan": {"types", "prng", "config", "models", "rollout", "teacher", "train", "worlds"},
    "report": set(),
    "bench": {
        "types", "prng", "config", "algo", "models", "rollout", "data", "similarity", "teacher", "train",
        "worlds", "heap",
    },
}  # fmt: skip
LOCAL_TEACHER = {"models", "rollout"}  # teacher/local.py is a model of ours
HEAVY = {"torch", "tensorflow", "tensorflow_text", "sentence_transformers", "openai", "anthropic", "google"}


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the room in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_lies_upstream(path):
    room = _room(path)
    allowed = MAY_IMPORT[room] | {room}
    if path.relative_to(PACKAGE).as_posix() == "teacher/local.py":
        allowed = allowed | LOCAL_TEACHER
    for name in _imports(path):
        if name.split(".")[0] in ("experiments", "configs", "tests"):
            pytest.fail(f"{path.name} imports {name}: the library does not know its callers")
        if name.startswith("omniopd_jax."):
            other = name.split(".")[1]
            assert other in allowed or other == "__version__", f"{room} may not import {other} ({path.name})"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path):
    heavy = {name for name in _imports(path, top_level_only=True) if name.split(".")[0] in HEAVY}
    assert not heavy, f"{path.name} imports {heavy} at module level"


def test_only_the_local_teacher_touches_jax():
    for path in (PACKAGE / "teacher").glob("*.py"):
        if path.name != "local.py":
            assert not {name for name in _imports(path) if name.split(".")[0] in ("jax", "flax")}, path.name


def test_the_paper_is_pure():
    for path in (PACKAGE / "algo").glob("*.py"):
        for name in _imports(path):
            assert name.split(".")[0] in ("__future__", "collections", "jax", "functools", "typing", "omniopd_jax"), (
                f"{path.name} imports {name}"
            )
