"""What the model receives: every type of a signature through every door, as a value, null, NaN, and of a wrong type."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import requests

from darwin_runtime.protocols.base import PARQUET
from tests.support import tensors
from tests.support.received import COLUMN_TYPES, HINTS, MISSING, TENSOR_DTYPES

# MLflow warns of some hints as it loads a model.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")

REFUSED = object()
NAN = math.nan


class Case(NamedTuple):
    """A value of a type as JSON has it, and what the model sees.

    `null` and `optional_null` are what the model sees of null in a required and in an optional column. `wrong` is of
    another type. `datatype` is V2's; `parquet` and `parquet_seen` are Parquet's where they differ.
    """

    value: Any
    dtype: str
    seen: Any
    null: Any
    optional_null: Any
    wrong: Any
    datatype: str = "BYTES"
    parquet: Any = None
    parquet_seen: Any = None


WHEN, TIME = "2024-02-29T23:59:59.123456789", "time 2024-02-29T23:59:59.123456789"
BLOB = b"\0\xff"
SEEN_BLOB = f"bytes {BLOB!r}"

CASES: dict[str, Case] = {
    "boolean": Case(True, "bool", "bool True", REFUSED, MISSING, "yes", "BOOL"),
    "integer": Case(-7, "int32", "int -7", REFUSED, REFUSED, 1.5, "INT32"),
    "long": Case(2**53 + 1, "int64", f"int {2**53 + 1}", REFUSED, REFUSED, "x", "INT64"),
    "float": Case(0.5, "float32", "float 0.5", MISSING, MISSING, "x", "FP32"),
    "double": Case(1e300, "float64", "float 1e+300", MISSING, MISSING, True, "FP64"),
    "string": Case("grün", "object", "str 'grün'", MISSING, MISSING, 7),
    "binary": Case("AP8=", "object", SEEN_BLOB, REFUSED, MISSING, 7, parquet=BLOB),
    "datetime": Case(WHEN, "datetime64[ns]", TIME, MISSING, MISSING, "yesterday"),
    "array of double": Case([0.5, 2.5], "object", ["float 0.5", "float 2.5"], REFUSED, MISSING, ["x"]),
    "array of long": Case([1, 2], "object", ["int 1", "int 2"], REFUSED, MISSING, [1.5]),
    "array of string": Case(["a", ""], "object", ["str 'a'", "str ''"], REFUSED, MISSING, [7]),
    "array of binary": Case(["AP8="], "object", ["bytes b'AP8='"], REFUSED, MISSING, [7])._replace(
        parquet=[BLOB], parquet_seen=[SEEN_BLOB]
    ),
    "array of arrays": Case([[1], []], "object", [["int 1"], []], REFUSED, MISSING, [1]),
    "array of any": Case([1, "x", None], "object", ["int 1", "str 'x'", MISSING], MISSING, MISSING, "x"),
    "object": Case({"id": 3, "note": "x"}, "object", {"id": "int 3", "note": "str 'x'"}, REFUSED, MISSING, {"id": "x"}),
    "map of double": Case({"k": 0.5}, "object", {"k": "float 0.5"}, REFUSED, MISSING, {"k": "x"}),
    "map of binary": Case({"k": "AP8="}, "object", {"k": "str 'AP8='"}, REFUSED, MISSING, {"k": 7})._replace(
        parquet={"k": BLOB}, parquet_seen={"k": SEEN_BLOB}
    ),
    "any": Case("x", "object", "str 'x'", MISSING, MISSING, REFUSED),
}  # fmt: skip

TENSOR_CASES: dict[str, Case] = {
    "float32": Case(0.5, "f", "float 0.5", MISSING, None, "x", "FP32"),
    "float64": Case(1e300, "f", "float 1e+300", MISSING, None, "x", "FP64"),
    "int64": Case(2**53 + 1, "i", f"int {2**53 + 1}", REFUSED, None, 1.5, "INT64"),
    "uint8": Case(255, "u", "int 255", REFUSED, None, 1.5, "UINT8"),
    "bool": Case(True, "b", "bool True", REFUSED, None, 1, "BOOL"),
    "str": Case("grün", "U", "str 'grün'", REFUSED, None, 7),
    "bytes": Case("ab", "S", "bytes b'ab'", REFUSED, None, 7),
    "object": Case("ab", "O", "str 'ab'", MISSING, None, REFUSED),
    "datetime64[ns]": Case(WHEN, "M", TIME, MISSING, None, "yesterday"),
}

ITEM = {"name": "str 'a'", "price": "float 1.0", "note": MISSING}

HINT_CASES: dict[str, Case] = {
    "bool": Case(True, "", "bool True", REFUSED, None, "x", "BOOL"),
    "int": Case(3, "", "int 3", REFUSED, None, 1.5, "INT64"),
    "float": Case(1, "", "float 1.0", REFUSED, None, "x", "FP64"),
    "str": Case("grün", "", "str 'grün'", REFUSED, None, 7),
    "bytes": Case("AP8=", "", SEEN_BLOB, REFUSED, None, 7, parquet=BLOB),
    "datetime": Case("2024-02-29T12:00:00", "", "time 2024-02-29T12:00:00", REFUSED, None, 7),
    "list[float]": Case([1, 2.5], "", ["float 1.0", "float 2.5"], REFUSED, None, ["x"]),
    "dict[str, int]": Case({"k": 1}, "", {"k": "int 1"}, REFUSED, None, {"k": "x"}),
    "Item": Case({"name": "a", "price": 1}, "", {"Item": ITEM}, REFUSED, None, {"name": "a"}),
    "Any": Case([1, "x"], "", ["int 1", "str 'x'"], MISSING, None, REFUSED),
}  # fmt: skip


class Request(NamedTuple):
    path: str
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})


def as_json(path: str, **body: Any) -> Request:
    return Request(path, json.dumps(body).encode(), {"Content-Type": "application/json"})


PREDICT, INVOCATIONS, V1, V2 = "/predict", "/invocations", "/v1/models/model:predict", "/v2/models/model/infer"

# A table by its columns: name -> (case, cells).
Columns = dict[str, tuple[Case, list[Any]]]


def _records(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*(cells for _, cells in columns.values()), strict=True)]


def _split(columns: Columns) -> dict[str, Any]:
    return {"columns": list(columns), "data": [list(row.values()) for row in _records(columns)]}


def _nested(case: Case) -> bool:
    return isinstance(case.value, (list, dict))


_BY_TYPE = {bool: "BOOL", int: "INT64", float: "FP64"}


def _datatype(case: Case, cells: list[Any]) -> str:
    """V2's datatype for the cells: that of the case, unless they are of another type."""
    odd = [cell for cell in cells if cell is not None and cell == cell and type(cell) is not type(case.value)]
    return _BY_TYPE.get(type(odd[0]), "BYTES") if odd and not _nested(case) else case.datatype


def _cells_of_v2(case: Case, cells: list[Any]) -> list[Any]:
    """Objects as JSON text, and cells of a wrong type in a tensor of that type alone."""
    if _nested(case) or any(type(cell) in (list, dict) for cell in cells):
        return [cell if cell is None or cell != cell else json.dumps(cell) for cell in cells]
    datatype = _datatype(case, cells)
    return cells if datatype == case.datatype else [cells[-1]] * len(cells)


def _v2(columns: Columns, shape: Callable[[int], list[int]]) -> dict[str, Any]:
    inputs = [
        {
            "name": name,
            "shape": shape(len(cells)),
            "datatype": _datatype(case, cells),
            "data": _cells_of_v2(case, cells),
        }
        for name, (case, cells) in columns.items()
    ]
    return {"inputs": inputs}


def _v2_binary(columns: Columns, shape: Callable[[int], list[int]]) -> Request:
    blobs = [name for name, (case, cells) in columns.items() if case.parquet == BLOB and cells[-1] == case.value]
    body, headers = tensors.binary(_v2(columns, shape), blobs)
    return Request(V2, body, headers)


def _csv(columns: Columns) -> Request:
    def text(cell: Any) -> str:
        shown = cell if isinstance(cell, str) else json.dumps(cell)
        return "" if cell is None else shown

    lines = io.StringIO()
    csv.writer(lines).writerows([[*columns], *(map(text, row.values()) for row in _records(columns))])
    return Request(INVOCATIONS, lines.getvalue().encode(), {"Content-Type": "text/csv"})


def _parquet(columns: Columns) -> Request:
    def cell(case: Case, value: Any) -> Any:
        return case.parquet if case.parquet is not None and value == case.value else value

    arrays = {name: pyarrow.array([cell(case, each) for each in cells]) for name, (case, cells) in columns.items()}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(arrays), file)
    return Request(INVOCATIONS, file.getvalue(), {"Content-Type": PARQUET})


def _cells(columns: Columns) -> dict[str, list[Any]]:
    return {name: cells for name, (_, cells) in columns.items()}


def _in_rows(columns: Columns) -> list[list[Any]]:
    return [list(row.values()) for row in _records(columns)]


TABLE_DOORS: dict[str, Callable[[Columns], Request]] = {
    "/predict, a row": lambda columns: as_json(PREDICT, features=_records(columns)[-1]),
    "/predict, rows": lambda columns: as_json(PREDICT, features=_records(columns)),
    "/invocations, records": lambda columns: as_json(INVOCATIONS, dataframe_records=_records(columns)),
    "/invocations, split": lambda columns: as_json(INVOCATIONS, dataframe_split=_split(columns)),
    "/invocations, instances": lambda columns: as_json(INVOCATIONS, instances=_records(columns)),
    "/invocations, inputs": lambda columns: as_json(INVOCATIONS, inputs=_cells(columns)),
    "/invocations, CSV": _csv,
    "/invocations, Parquet": _parquet,
    "V1, objects": lambda columns: as_json(V1, instances=_records(columns)),
    "V1, lists": lambda columns: as_json(V1, instances=_in_rows(columns)),
    "V2, JSON [n]": lambda columns: as_json(V2, **_v2(columns, lambda n: [n])),
    "V2, JSON [n, 1]": lambda columns: as_json(V2, **_v2(columns, lambda n: [n, 1])),
    "V2, binary": lambda columns: _v2_binary(columns, lambda n: [n, 1]),
}

VARIANTS = ("value", "null", "NaN", "wrong")


def never(_: Case) -> bool:
    return False


# A door that has no way to say something, and why.
UNSAYABLE: dict[tuple[str, str], Callable[[Case], bool]] = {
    ("V2, binary", "null"): lambda _: True,  # bytes have no null
    ("V2, binary", "NaN"): lambda case: not case.datatype.startswith("FP"),
    ("V2, binary", "wrong"): lambda case: case.parquet == BLOB,  # any bytes are bytes
    ("/invocations, CSV", "NaN"): lambda case: not case.datatype.startswith("FP"),  # it is text
    ("/invocations, CSV", "wrong"): lambda case: case.value == "grün" or case.dtype in ("S", "b"),  # all is text
    ("/invocations, Parquet", "value"): lambda case: case.seen == ["int 1", "str 'x'", MISSING],  # columns have a type
    ("/invocations, Parquet", "null"): lambda case: case.seen == ["int 1", "str 'x'", MISSING],
    ("/invocations, Parquet", "NaN"): lambda case: not case.datatype.startswith("FP"),
}  # fmt: skip


def _no_null(case: Case) -> bool:
    return case.datatype in ("BOOL", "INT32")


# What a door refuses though others take it: V2's tensors of integers and booleans hold nothing else.
EXCEPTIONS: dict[tuple[str, str], Callable[[Case], bool]] = {
    (f"V2, JSON {shape}", variant): _no_null for shape in ("[n]", "[n, 1]") for variant in ("null", "NaN")
}


def cells_of(case: Case, variant: str, door: str) -> list[Any]:
    """A good row, and one of the variant; Parquet's columns have one type."""
    last = {"value": case.value, "null": None, "NaN": NAN, "wrong": case.wrong}[variant]
    return [last if door.endswith("Parquet") and variant == "wrong" else case.value, last]


def sayable(case: Case, door: str, variant: str) -> bool:
    return (variant != "wrong" or case.wrong is not REFUSED) and not UNSAYABLE.get((door, variant), never)(case)


session = requests.Session()


def received(url: str, request: Request) -> tuple[int, Any]:
    """The status, and what the model received, or the error's text."""
    answer = session.post(url + request.path, data=request.body, headers=request.headers, timeout=60)
    if answer.status_code != 200:
        return answer.status_code, answer.text
    body = answer.json()
    told = body["outputs"][0]["data"] if "outputs" in body else body["scores" if "scores" in body else "predictions"]
    return 200, json.loads(told[0])


def check_refusal(status: int, text: Any, name: str, row: int | None) -> None:
    assert status in (400, 422), (status, text)
    # V2's own check of a tensor comes before that of the signature, and names the input.
    assert name in text or not name, text
    assert row is None or f"row {row}" in text or f'"row":{row}' in text or "input" in text, text


# Tables

TABLES = [
    (kind, need, door, variant)
    for kind, need, door, variant in itertools.product(COLUMN_TYPES, ("required", "optional"), TABLE_DOORS, VARIANTS)
    if sayable(CASES[kind], door, variant)
]


def expected_table(case: Case, need: str, door: str, variant: str) -> Any:
    seen = case.parquet_seen if door.endswith("Parquet") and case.parquet_seen else case.seen
    if variant == "wrong" or EXCEPTIONS.get((door, variant), never)(case):
        return REFUSED
    single = door == "/predict, a row"
    beside: list[Any] = [["str 'x'", "float64", ["float 1.5"] * (1 if single else 2)]] if need == "optional" else []
    if variant == "value":
        return {"table": [*beside, ["str 'c'", case.dtype, [seen] * (1 if single else 2)]], "labels": []}
    missing = case.null if need == "required" else case.optional_null
    if single and need == "optional" and case.dtype in ("bool", "int32", "int64"):
        return {"table": beside, "labels": []}  # a column of nothing but nulls is none
    dtype = "object" if case.dtype == "bool" else case.dtype
    if single and variant == "NaN" and case is CASES["any"]:
        dtype = "float64"  # as pandas makes of it
    found = {"table": [*beside, ["str 'c'", dtype, [missing] if single else [seen, missing]]], "labels": []}
    return REFUSED if missing is REFUSED else found


@pytest.mark.parametrize(("kind", "need", "door", "variant"), TABLES)
def test_columns(ours: Callable[[str], str], kind: str, need: str, door: str, variant: str) -> None:
    case = CASES[kind]
    columns: Columns = {"c": (case, cells_of(case, variant, door))}
    if need == "optional":
        columns = {"x": (CASES["double"], [1.5, 1.5]), **columns}
    url = ours(f"received {need} {kind}")
    if door == "/invocations, inputs" and kind.startswith(("array", "object")):
        # An object of lists is a row then, as to MLflow.
        door, columns = "/predict, a row", {name: (each, cells[-1:]) for name, (each, cells) in columns.items()}
        request = as_json(INVOCATIONS, inputs=_records(columns)[0])
    elif door == "V1, lists" and need == "required" and kind.startswith("array"):
        request = as_json(V1, instances=columns["c"][1])
    else:
        request = TABLE_DOORS[door](columns)
    status, found = received(url, request)
    expected = expected_table(case, need, door, variant)
    if expected is REFUSED:
        check_refusal(status, found, "c", 0 if "a row" in door else None)
    else:
        assert (status, found) == (200, expected)


# Columns without names, and one called 0


@pytest.mark.parametrize("door", TABLE_DOORS)
@pytest.mark.parametrize("kind", ["unnamed double", "unnamed string", "called 0"])
def test_names_of_columns(ours: Callable[[str], str], kind: str, door: str) -> None:
    case = CASES["long" if kind == "called 0" else kind.removeprefix("unnamed ")]
    columns: Columns = {"0" if kind == "called 0" else "width": (case, [case.value, case.value])}
    by_position = door.startswith("V2") or door == "V1, lists"
    name = "int 0" if kind == "called 0" or by_position else "str 'width'"
    count = 1 if door == "/predict, a row" else 2
    found = received(ours(f"received {kind}"), TABLE_DOORS[door](columns))
    assert found == (200, {"table": [[name, case.dtype, [case.seen] * count]], "labels": []})


# Tensors


def _tensor_rows(columns: Columns) -> list[Any]:
    [(_, cells)] = columns.values()
    return cells


def _first_axis(columns: Columns) -> dict[str, list[list[Any]]]:
    return {name: [[cell] for cell in cells] for name, (_, cells) in columns.items()}


# For a tensor of shape [-1] without a name.
UNNAMED_DOORS: dict[str, Callable[[Columns], Request]] = {
    "/predict, rows": lambda columns: as_json(PREDICT, features=_tensor_rows(columns)),
    "/invocations, records": TABLE_DOORS["/invocations, records"],
    "/invocations, split": TABLE_DOORS["/invocations, split"],
    "/invocations, flat split": lambda columns: as_json(INVOCATIONS, dataframe_split={"data": _tensor_rows(columns)}),
    "/invocations, instances": lambda columns: as_json(INVOCATIONS, instances=_tensor_rows(columns)),
    "/invocations, inputs": lambda columns: as_json(INVOCATIONS, inputs=_tensor_rows(columns)),
    "/invocations, CSV": _csv,
    "/invocations, Parquet": _parquet,
    "V1": lambda columns: as_json(V1, instances=_tensor_rows(columns)),
    "V2, JSON [n]": TABLE_DOORS["V2, JSON [n]"],
    "V2, binary": lambda columns: _v2_binary(columns, lambda n: [n]),
}

# For one of shape [-1, 1] with a name.
NAMED_DOORS: dict[str, Callable[[Columns], Request]] = {
    "/predict, rows": lambda columns: as_json(PREDICT, features=_first_axis(columns)),
    "/invocations, records": TABLE_DOORS["/invocations, records"],
    "/invocations, split": TABLE_DOORS["/invocations, split"],
    "/invocations, instances": lambda columns: as_json(
        INVOCATIONS, instances=[{name: [cell] for name, cell in row.items()} for row in _records(columns)]
    ),
    "/invocations, inputs": lambda columns: as_json(INVOCATIONS, inputs=_first_axis(columns)),
    "/invocations, CSV": _csv,
    "/invocations, Parquet": _parquet,
    "V1": lambda columns: as_json(V1, inputs=_first_axis(columns)),
    "V2, JSON [n, 1]": TABLE_DOORS["V2, JSON [n, 1]"],
    "V2, binary": TABLE_DOORS["V2, binary"],
}

TENSORS = [
    (kind, named, door, variant)
    for named, doors in ((False, UNNAMED_DOORS), (True, NAMED_DOORS))
    for kind, door, variant in itertools.product(TENSOR_DTYPES, doors, VARIANTS)
    if sayable(TENSOR_CASES[kind], door, variant)
]


@pytest.mark.parametrize(("kind", "named", "door", "variant"), TENSORS)
def test_tensors(ours: Callable[[str], str], kind: str, named: bool, door: str, variant: str) -> None:
    case = TENSOR_CASES[kind]
    columns: Columns = {"c": (case, cells_of(case, variant, door))}
    url = ours(f"received {'named ' if named else ''}tensor of {kind}")
    status, found = received(url, (NAMED_DOORS if named else UNNAMED_DOORS)[door](columns))
    seen = case.seen if variant == "value" else REFUSED if variant == "wrong" else case.null
    if seen is REFUSED:
        check_refusal(status, found, "c" if named else "", 1)
    else:
        array = {"array": [case.dtype, [2, 1] if named else [2], [case.seen, seen]]}
        assert (status, found) == (200, {"c": array} if named else array)


@pytest.mark.parametrize("door", NAMED_DOORS)
def test_a_tensor_called_0(ours: Callable[[str], str], door: str) -> None:
    case = TENSOR_CASES["float64"]
    found = received(ours("received tensor called 0"), NAMED_DOORS[door]({"0": (case, [0.5, 1e300])}))
    assert found == (200, {"0": {"array": ["f", [2, 1], ["float 0.5", "float 1e+300"]]}})


# Without a signature: what MLflow's server hands over, and V2's own types


def array(kind: str, shape: list[int], *cells: str) -> dict[str, Any]:
    return {"array": [kind, shape, list(cells)]}


def table(*columns: tuple[str, str, list[Any]]) -> dict[str, Any]:
    return {"table": [[f"str {name!r}", dtype, cells] for name, dtype, cells in columns], "labels": []}


RECORDS = [{"a": 1, "b": "x"}, {"a": None, "b": "y"}]
WITH_NAN = [{"a": 1, "b": "x"}, {"a": NAN, "b": "y"}]
AS_TABLE = table(("a", "float64", ["float 1.0", MISSING]), ("b", "object", ["str 'x'", "str 'y'"]))

UNSIGNED: dict[str, tuple[Request, Any]] = {
    "/predict, rows": (as_json(PREDICT, features=RECORDS), AS_TABLE),
    "/predict, NaN": (as_json(PREDICT, features=WITH_NAN), AS_TABLE),
    "/predict, array": (as_json(PREDICT, features=[[1, NAN]]), array("f", [1, 2], "float 1.0", MISSING)),
    "records": (as_json(INVOCATIONS, dataframe_records=RECORDS), AS_TABLE),
    "records, NaN": (as_json(INVOCATIONS, dataframe_records=WITH_NAN), AS_TABLE),
    "split": (as_json(INVOCATIONS, dataframe_split={"columns": ["a", "b"], "data": [[1, "x"], [NAN, "y"]]}), AS_TABLE),
    "flat split": (
        as_json(INVOCATIONS, dataframe_split={"columns": ["a"], "data": [1, NAN]}),
        table(("a", "float64", ["float 1.0", MISSING])),
    ),
    "instances": (
        as_json(INVOCATIONS, instances=[{"a": 1}, {"a": NAN}]),
        {"a": array("f", [2], "float 1.0", MISSING)},
    ),
    "inputs": (
        as_json(INVOCATIONS, inputs=[{"a": 1, "b": [1, 2]}, {"a": NAN}]),
        [{"a": array("i", [], "int 1"), "b": array("i", [2], "int 1", "int 2")}, {"a": array("f", [], MISSING)}],
    ),
    "inputs, columns": (
        as_json(INVOCATIONS, inputs={"a": [1, NAN], "b": "x"}),
        {"a": array("f", [2], "float 1.0", MISSING), "b": array("U", [], "str 'x'")},
    ),
    "inputs, array": (as_json(INVOCATIONS, inputs=[1, NAN]), array("f", [2], "float 1.0", MISSING)),
    "inputs, null": (as_json(INVOCATIONS, inputs=[1, None]), array("O", [2], "int 1", MISSING)),
    "CSV": (Request(INVOCATIONS, b"a,b\n1,x\n,y\n", {"Content-Type": "text/csv"}), AS_TABLE),
    "V1": (as_json(V1, instances=[1, NAN]), array("f", [2], "float 1.0", MISSING)),
    "V1, inputs": (as_json(V1, inputs=[{"a": 1}]), [{"a": array("i", [], "int 1")}]),
    "V2": (
        as_json(V2, inputs=[{"name": "a", "shape": [2], "datatype": "FP32", "data": [1, NAN]}]),
        array("f", [2], "float 1.0", MISSING),
    ),
    "V2, text": (
        as_json(V2, inputs=[{"name": "a", "shape": [2], "datatype": "BYTES", "data": ["x", NAN]}]),
        array("O", [2], "str 'x'", MISSING),
    ),
}


@pytest.mark.parametrize("what", UNSIGNED)
def test_without_a_signature(ours: Callable[[str], str], what: str) -> None:
    request, expected = UNSIGNED[what]
    assert received(ours("received none"), request) == (200, expected)


@pytest.mark.parametrize(("data", "seen"), [(b"\x89\0", f"bytes {bytes([0x89, 0])!r}"), (b"x", "str 'x'")])
def test_bytes_without_a_signature(ours: Callable[[str], str], data: bytes, seen: str) -> None:
    asked = {"inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(data).decode()]}]}
    body, headers = tensors.binary(asked, ["a"])
    assert received(ours("received none"), Request(V2, body, headers)) == (200, array("O", [1], seen))


# Type hints

HINT_DOORS: dict[str, Callable[[Case, list[Any]], Request]] = {
    "/predict": lambda _, cells: as_json(PREDICT, features=cells),
    "/invocations": lambda _, cells: as_json(INVOCATIONS, inputs=cells),
    "V1": lambda _, cells: as_json(V1, instances=cells),
    "V2, JSON [n]": lambda case, cells: as_json(V2, **_v2({"0": (case, cells)}, lambda n: [n])),
    "V2, JSON [n, 1]": lambda case, cells: as_json(V2, **_v2({"0": (case, cells)}, lambda n: [n, 1])),
    "V2, binary": lambda case, cells: _v2_binary({"0": (case, cells)}, lambda n: [n, 1]),
}

HINTED = [
    (hint, door, variant)
    for hint, door, variant in itertools.product(HINTS, HINT_DOORS, VARIANTS)
    if sayable(HINT_CASES[hint], door, variant)
]


@pytest.mark.parametrize(("hint", "door", "variant"), HINTED)
def test_type_hints(ours: Callable[[str], str], hint: str, door: str, variant: str) -> None:
    case = HINT_CASES[hint]
    status, found = received(ours(f"received hint {hint}"), HINT_DOORS[door](case, cells_of(case, variant, door)))
    null = MISSING if hint == "float" and variant == "NaN" else case.null
    seen = case.seen if variant == "value" else REFUSED if variant == "wrong" else null
    if seen is REFUSED:
        assert status == 400, found
    else:
        assert (status, found) == (200, [case.seen, seen])


@pytest.mark.parametrize(
    "door", ["/invocations, records", "/invocations, split", "/invocations, CSV", "/invocations, Parquet"]
)
def test_type_hints_are_of_no_table(ours: Callable[[str], str], door: str) -> None:
    status, text = received(ours("received hint float"), TABLE_DOORS[door]({"c": (CASES["double"], [1.5])}))
    assert (status, "takes what its type hints say" in text) == (400, True)
