"""The table of routes, against the document that describes it."""

from __future__ import annotations

import inspect
import re

from darwin_runtime.http.endpoints import ROUTES, Endpoints
from darwin_runtime.http.metrics import PROTOCOLS
from tests.conftest import ROOT


def test_the_readme_has_every_route() -> None:
    readme = (ROOT / "README.md").read_text()
    [section] = re.findall(r"^## Asking for predictions\n(.*?)(?=^## )", readme, re.MULTILINE | re.DOTALL)
    told = set(re.findall(r"(?<=[` ])/[\w/.:]*(?=`)", section))
    paths = {path.replace("{name}", "model") for route in ROUTES for path in route.paths if "{version}" not in path}
    # The two that only say what V1's clients know already.
    assert paths - told == {"/v1/models", "/v1/models/model"}


def test_every_public_method_has_its_route() -> None:
    methods = {function for name, function in inspect.getmembers(Endpoints, inspect.isfunction) if name[0] != "_"}
    assert methods - {Endpoints.endpoint, Endpoints.by_route} == {route.method for route in ROUTES}
    assert {route.protocol for route in ROUTES} == set(PROTOCOLS)
