"""The house: floors, bounds and names, each read from the source.

Each rule is a function from a directory of sources to its violations, so that a planted violation can prove it.
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROLES = ("darwin_serve", "download", "cleanup", "k8s_client")
PACKAGE = "darwin_runtime"

# A room imports from floors below its own; modules of one room may import each other, without cycles.
FLOORS = (
    ("errors", "job_metrics", "logs", "mlflow_import", "redact", "resources", "role", "settings"),
    ("schema",),
    ("protocols",),
    ("storage",),
    ("model",),
    ("engine",),
    ("http",),
    ("__main__", *ROLES),
)
# The libraries that one room alone knows.
KNOWN_BY = {
    "uvicorn": ("http", "darwin_serve"),
    "httptools": ("http",),
    "starlette": ("http",),
    "kubernetes": (),
    "pyarrow": ("protocols", "schema"),
}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
# Imports from other rooms. A role puts rooms together; the init container's two strategies touch most of storage.
MAX_IMPORTS, MAX_IMPORTS_OF = 8, {"darwin_serve": 12, "download": 18, "cleanup": 11}
MAX_ROLE_LINES = {"darwin_serve": 300, "download": 320, "cleanup": 400, "k8s_client": 250}
# So large these are now. What lets them grow needs an argument.
MAX_CLOSURE_LINES = {"cleanup": 3100, "download": 5300, "darwin_serve": 14500}


def modules(root: Path) -> dict[str, Path]:
    """Each module of ours by its dotted name."""
    found = {path.stem: path for path in root.glob("*.py")}
    for path in (root / PACKAGE).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


def parse(path: Path) -> ast.Module:
    """The source in `path`; each text is parsed once, for a copy of the house has the same ones."""
    return _parse(path.read_text())


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that the file imports, wherever in it, except for types alone."""
    found = set()
    for names in _imported(path.read_text()):
        found |= (set(names[1:]) & known.keys()) or {names[0]}
    return found & known.keys()


@functools.cache
def _imported(text: str) -> list[tuple[str, ...]]:
    """Of each import, the module and the full names that are taken from it."""
    tree = _parse(text)
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    for_types = {id(inner) for node in tests for part in node.body for inner in ast.walk(part)}
    found: list[tuple[str, ...]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in for_types:
            found += [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in for_types:
            found.append((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return found


def room(module: str) -> str:
    """The room, or the module itself on the ground floor and the top."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


def floor(module: str) -> int:
    return next((height for height, rooms in enumerate(FLOORS) if room(module) in rooms), -1)


def closure(module: str, known: dict[str, Path]) -> set[str]:
    """The module with everything that it imports, directly or not, packages included."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            parents = name.split(".")[:-1]
            packages = {".".join(parents[: i + 1]) for i in range(len(parents))}
            waiting += (imports(known[name], known) | packages) & known.keys()
    return found


def without_a_floor(root: Path) -> Iterator[str]:
    for module in modules(root):
        if module != PACKAGE and floor(module) < 0:
            yield f"{module} has no floor"


def upwards(root: Path) -> Iterator[str]:
    known = modules(root)
    for module, path in known.items():
        for other in imports(path, known) - {PACKAGE}:
            if floor(other) > floor(module):
                yield f"{module} imports {other}"


def round_about(root: Path) -> Iterator[str]:
    known = modules(root)
    for module in known:
        for other in imports(known[module], known):
            if other != module and module in closure(other, known):
                yield f"{module} imports {other}, which imports {module}"


def strangers_known(root: Path) -> Iterator[str]:
    for module, path in modules(root).items():
        for node in ast.walk(parse(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for library in {name.split(".")[0] for name in names} & KNOWN_BY.keys():
                if room(module) not in KNOWN_BY[library]:
                    yield f"{module} imports {library}"


def long_files(root: Path) -> Iterator[str]:
    for module, path in modules(root).items():
        if lines(path) > MAX_ROLE_LINES.get(module, MAX_FILE_LINES):
            yield f"{module} has {lines(path)} lines"


def long_functions(root: Path) -> Iterator[str]:
    for module, path in modules(root).items():
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    yield f"{module}.{node.name} has {size} lines"


def many_imports(root: Path) -> Iterator[str]:
    known = modules(root)
    for module, path in known.items():
        count = sum(room(other) != room(module) for other in imports(path, known))
        if count > MAX_IMPORTS_OF.get(module, MAX_IMPORTS):
            yield f"{module} imports {count} modules of other rooms"


def large_closures(root: Path) -> Iterator[str]:
    known = modules(root)
    for module, most in MAX_CLOSURE_LINES.items():
        size = sum(lines(known[name]) for name in closure(module, known))
        if size > most:
            yield f"{module} needs {size} lines"


def others_at_the_top(root: Path) -> Iterator[str]:
    yield from sorted({path.stem for path in root.glob("*.py")} ^ set(ROLES))


def names_with_several_owners(root: Path) -> Iterator[str]:
    """A public class has one owner in the whole project; the settings of each role are that role's own."""
    owners: dict[str, list[str]] = {}
    for module, path in modules(root).items():
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Settings":
                owners.setdefault(node.name, []).append(module)
    for name, where in owners.items():
        if len(where) > 1:
            yield f"{name} is in {', '.join(sorted(where))}"


def words_of_old(root: Path) -> Iterator[str]:
    """Bounds are called max_ and min_."""
    for module, path in modules(root).items():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Name) and re.match(r"_?(MOST|LEAST|LARGEST|LONGEST|SHORTEST)(_|$)", node.id):
                yield f"{module}: {node.id}"


RULES: dict[Callable[[Path], Iterator[str]], dict[str, str]] = {
    # Each with what is planted in a copy of the house, and where, to see that the rule finds it.
    without_a_floor: {"darwin_runtime/attic/thing.py": '"""A thing."""\n'},
    upwards: {
        "darwin_runtime/schema/thing.py": '"""A thing."""\n\n\ndef f():\n    from darwin_runtime.http import tls\n'
    },
    round_about: {
        "darwin_runtime/schema/thing.py": '"""A thing."""\n\nfrom darwin_runtime.schema import other\n',
        "darwin_runtime/schema/other.py": '"""Another."""\n\nfrom darwin_runtime.schema.thing import x\n',
    },
    strangers_known: {"darwin_runtime/model/thing.py": '"""A thing."""\n\nimport starlette.requests\n'},
    long_files: {"darwin_runtime/engine/thing.py": '"""A thing."""\n' + "x = 1\n" * MAX_FILE_LINES},
    long_functions: {
        "darwin_runtime/engine/thing.py": '"""A thing."""\n\n\ndef f():\n' + "    x = 1\n" * MAX_FUNCTION_LINES
    },
    many_imports: {
        "darwin_runtime/engine/thing.py": '"""A thing."""\n\n'
        + "".join(f"from darwin_runtime import thing{number}\n" for number in range(MAX_IMPORTS + 1)),
        **{f"darwin_runtime/thing{number}.py": '"""A thing."""\n' for number in range(MAX_IMPORTS + 1)},
    },
    large_closures: {"darwin_runtime/errors.py": '"""Errors."""\n' + "x = 1\n" * MAX_CLOSURE_LINES["cleanup"]},
    others_at_the_top: {"utils.py": '"""Things."""\n'},
    names_with_several_owners: {
        "darwin_runtime/schema/thing.py": '"""A thing."""\n\n\nclass Thing:\n    pass\n',
        "darwin_runtime/engine/thing.py": '"""A thing."""\n\n\nclass Thing:\n    pass\n',
    },
    words_of_old: {"darwin_runtime/engine/thing.py": '"""A thing."""\n\nMOST_BYTES = 3\n'},
}


def named(rule: Callable[[Path], Iterator[str]]) -> str:
    return rule.__name__


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_house_has_no(rule: Callable[[Path], Iterator[str]]) -> None:
    assert "\n".join(rule(ROOT)) == ""


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_planted_violation_is_found(rule: Callable[[Path], Iterator[str]], tmp_path: Path) -> None:
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    before = {*rule(tmp_path)}
    for file, text in RULES[rule].items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert {*rule(tmp_path)} - before
