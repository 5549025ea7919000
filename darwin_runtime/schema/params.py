"""A signature's parameters, compiled to a parser of a request's `params`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from darwin_runtime.errors import ParamsError
from darwin_runtime.schema.datatypes import DataType, datatype_of, or_null
from darwin_runtime.schema.report import Reject, Report, refuse, reject_below
from darwin_runtime.schema.signature import Spec


class ParamSchema:
    """A signature's parameters. Undeclared ones are ignored, absent ones left to MLflow, which knows their defaults."""

    def __init__(self, specs: Sequence[Spec] | None) -> None:
        self.specs = list(specs or ())
        self._datatypes = {spec["name"]: (datatype_of(spec), spec.get("shape") is not None) for spec in self.specs}

    def json_schema(self, name: str) -> Spec:
        """JSON Schema of the parameter `name`."""
        datatype, many = self._datatypes[name]
        return or_null({"type": "array", "items": datatype.json_schema} if many else datatype.json_schema)

    def parse(self, given: Any) -> dict[str, Any]:
        """The declared parameters among `given`, as Python values; `ParamsError` lists all that don't fit."""
        if given is None or not self._datatypes:
            return {}
        if type(given) is not dict:
            raise ParamsError(refuse("params: an object", given).problems)
        report, result = Report(), {}
        for name, (datatype, many) in self._datatypes.items():
            if name not in given:
                continue
            value, reject = given[name], report.at(None, f"params.{name}")
            if many and type(value) is not list:
                reject("", f"a list of {datatype.name}", value, "")
            elif many:
                result[name] = [
                    _param_value(datatype, part, reject_below(reject, f"[{index}]")) for index, part in enumerate(value)
                ]
            else:
                result[name] = _param_value(datatype, value, reject)
        report.finish(ParamsError)
        return result


def _param_value(datatype: DataType, value: Any, reject: Reject) -> Any:
    if value is None:
        return None
    converted = datatype.convert(value, reject)
    if datatype.name == "datetime" and type(value) is str:
        # MLflow takes a date or a datetime, which nanoseconds would not become.
        unit = "D" if len(value) == 10 else "us"
        return np.datetime64(converted, "ns").astype(f"datetime64[{unit}]").item()
    return value if datatype.name == "object" else converted
