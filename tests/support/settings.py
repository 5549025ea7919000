"""Which settings each role reads, and their defaults, as its source says."""

from __future__ import annotations

import ast

from tests.conftest import ROOT

GETTERS = ("text", "required", "choice", "flag", "integer", "number", "raw")

# Which model to fetch, and from where, is read alike by the roles that fetch one.
ROLES = {
    "main": [
        "darwin_runtime/http/settings.py",
        "darwin_runtime/storage/access.py",
        "darwin_runtime/http/auth.py",
        "darwin_runtime/http/tls.py",
        "darwin_runtime/http/cors.py",
        "darwin_runtime/storage/digest.py",
    ],
    "init": ["download.py", "darwin_runtime/storage/access.py", "darwin_runtime/storage/digest.py"],
    "cleanup": ["cleanup.py"],
    "every": ["darwin_runtime/logs.py"],
}


def read_by(role: str) -> dict[str, str | None]:
    """Name -> default as text, of every variable a role passes to its `Reader`; None where it is none, or computed."""
    found: dict[str, str | None] = {}
    for file in ROLES[role]:
        tree = ast.parse((ROOT / file).read_text())
        constants = _constants(tree)
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in GETTERS):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "read" and node.args):
                continue
            name = _value(node.args[0], constants)
            default = _value(node.args[1], constants) if len(node.args) > 1 else None
            if name is not None and (found.get(name) is None):
                found[name] = default
    return found


def _constants(tree: ast.AST) -> dict[str, str]:
    """Names bound once to a string: `name = "SERVING_MODEL_CONFIG"`."""
    return {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _value(node: ast.expr, constants: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    if not isinstance(node, ast.Constant):
        return None
    if isinstance(node.value, bool):
        return str(node.value).lower()
    return f"{node.value:g}" if isinstance(node.value, float) else str(node.value)
