"""Answers of every kind that a model may give, each with the JSON that stands for it; and answers that have none."""

# mypy: disable-error-code="no-untyped-def, misc, arg-type, import-untyped"

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import ipaddress
import math
import pathlib
import sys
import types
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pandas as pd
import pydantic
from scipy.sparse import coo_array, csr_matrix

# The server does not have this module: what is pickled brings its code along.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

NAN, INF = math.nan, math.inf
BIG = 2**53 + 1
ID = "00000000-0000-0000-0000-000000000001"
ISO = "2024-02-29T12:30:00.000005"
DAY, TIME = datetime.date(2024, 2, 29), datetime.datetime.fromisoformat(ISO)
THIRD = np.longdouble(1) / 3


class Color(enum.Enum):
    RED = "red"
    NONE = None


class Word(str, enum.Enum):
    YES = "yes"


class Level(enum.IntEnum):
    HIGH = 3


class Flag(enum.Flag):
    A = 1
    B = 2


class Blob(enum.Enum):
    ZIP = b"PK\0"


class Loud(str):
    def __str__(self) -> str:
        return self.upper() + "!"

    __repr__ = __str__


class Count(int):
    def __repr__(self) -> str:
        return "many"


class Share(float):
    def __repr__(self) -> str:
        return "some"


class Row(list):  # type: ignore[type-arg]
    pass


class Names(dict):  # type: ignore[type-arg]
    pass


@dataclasses.dataclass
class Point:
    x: float
    tag: str = "p"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    when: datetime.date
    inner: Point


@dataclasses.dataclass
class Private:
    shown: int = 1
    _hidden: str = "secret"


class Pair(NamedTuple):
    left: int
    right: float


class Item(pydantic.BaseModel):
    name: str
    price: decimal.Decimal
    at: datetime.datetime | None = None


class Ids(pydantic.RootModel[list[int]]):
    pass


class Order(pydantic.BaseModel):
    items: list[Item]
    color: Color = Color.RED


class Faulty(pydantic.BaseModel):
    @pydantic.model_serializer
    def broken(self) -> Any:
        raise RuntimeError("this class cannot be dumped")


class Odd:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no attribute of this kind")


def _objects(*values: Any) -> Any:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _loop() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _frame(**columns: Any) -> Any:
    return pd.DataFrame(columns)


def _twice() -> Any:
    return pd.DataFrame([[1, "x"], [2, "y"]], columns=["a", "a"])


ITEM = {"name": "n", "price": "1.10", "at": None}

# The name of an answer, how it is made, and what stands for it in JSON.
ANSWERS: dict[str, tuple[Callable[[], Any], Any]] = {
    # Arrays of numbers
    "array of float64": (
        lambda: np.array([0.1, -0.0, 5e-324, 1.7976931348623157e308, 1e16]),
        [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1e16],
    ),
    "array of float32": (
        lambda: np.array([0.1, 3.4e38], dtype=np.float32),
        [0.10000000149011612, 3.3999999521443642e38],
    ),
    "array of float16": (lambda: np.array([0.1, 6.5e4], dtype=np.float16), [0.0999755859375, 64992.0]),
    "array of longdouble": (lambda: np.array([0.1, 2.5], dtype=np.longdouble), [0.1, 2.5]),
    "array of int8": (lambda: np.array([-128, 127], dtype=np.int8), [-128, 127]),
    "array of int16": (lambda: np.array([-32768, 32767], dtype=np.int16), [-32768, 32767]),
    "array of int32": (lambda: np.array([-(2**31), 2**31 - 1], dtype=np.int32), [-(2**31), 2**31 - 1]),
    "array of int64": (lambda: np.array([-(2**63), 2**63 - 1, BIG]), [-(2**63), 2**63 - 1, BIG]),
    "array of uint8": (lambda: np.array([0, 255], dtype=np.uint8), [0, 255]),
    "array of uint16": (lambda: np.array([0, 65535], dtype=np.uint16), [0, 65535]),
    "array of uint32": (lambda: np.array([0, 2**32 - 1], dtype=np.uint32), [0, 2**32 - 1]),
    "array of uint64": (lambda: np.array([0, 2**64 - 1], dtype=np.uint64), [0, 2**64 - 1]),
    "array of bool": (lambda: np.array([True, False]), [True, False]),
    "big-endian floats": (lambda: np.array([1.5, 0.1], dtype=">f8"), [1.5, 0.1]),
    "big-endian integers": (lambda: np.array([1, BIG], dtype=">i8"), [1, BIG]),
    "matrix": (lambda: np.array([[1.5, 2.5], [3.5, 4.5], [5.5, 6.5]]), [[1.5, 2.5], [3.5, 4.5], [5.5, 6.5]]),
    "transposed matrix": (lambda: np.arange(6).reshape(2, 3).T, [[0, 3], [1, 4], [2, 5]]),
    "every other number": (lambda: np.arange(6)[::2], [0, 2, 4]),
    "cube": (lambda: np.arange(8).reshape(2, 2, 2), [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
    "np.matrix": (lambda: np.array([[1, 2], [3, 4]]).view(np.matrix), [[1, 2], [3, 4]]),
    "array without axes": (lambda: np.array(2.5), 2.5),
    "one row": (lambda: np.array([[0.25, 0.75]]), [[0.25, 0.75]]),
    "read-only array": (lambda: np.broadcast_to(np.float64(1.5), (2,)), [1.5, 1.5]),
    # Missing numbers, and infinite ones
    "NaN in an array": (lambda: np.array([0.1, NAN]), [0.1, None]),
    "NaN of 32 bits": (lambda: np.array([0.5, NAN], dtype=np.float32), [0.5, None]),
    "infinities": (lambda: np.array([INF, -INF, 1.5]), [None, None, 1.5]),
    "NaN in a list": (lambda: [0.1, NAN], [0.1, None]),
    "None among floats": (lambda: [0.1, None], [0.1, None]),
    "None among integers": (lambda: [1, None, 3], [1, None, 3]),
    "None among large integers": (lambda: [BIG, None], [BIG, None]),
    "NaN among large integers": (lambda: [BIG, NAN], [BIG, None]),
    "None among booleans": (lambda: [True, None], [True, None]),
    "None alone": (lambda: None, None),
    "list of None": (lambda: [None, None], [None, None]),
    "list of NaN": (lambda: [NAN, NAN], [None, None]),
    "pd.NA in a list": (lambda: [1.5, pd.NA], [1.5, None]),
    "masked floats": (lambda: np.ma.array([0.5, 1.5, 2.5], mask=[0, 1, 0]), [0.5, None, 2.5]),
    "masked floats of 32 bits": (
        lambda: np.ma.array([0.1, 1.5], mask=[0, 1], dtype=np.float32),
        [0.10000000149011612, None],
    ),
    "masked integers": (lambda: np.ma.array([1, 2, BIG], mask=[0, 1, 0]), [1, None, BIG]),
    "masked matrix": (lambda: np.ma.array([[1.5, 2.5], [3.5, 4.5]], mask=[[0, 1], [0, 0]]), [[1.5, None], [3.5, 4.5]]),
    "masked texts": (lambda: np.ma.array(["a", "b"], mask=[0, 1]), ["a", None]),
    "masked times": (
        lambda: np.ma.array(np.array(["2024-01-31", "2024-02-01"], dtype="M8[D]"), mask=[0, 1]),
        ["2024-01-31", None],
    ),
    "masked without a mask": (lambda: np.ma.array([1, BIG]), [1, BIG]),
    "np.ma.masked in a list": (lambda: [1.5, np.ma.masked], [1.5, None]),
    # Lists
    "list of floats": (lambda: [0.1, 2.5], [0.1, 2.5]),
    "long list of floats": (lambda: [i / 7 for i in range(500)], [i / 7 for i in range(500)]),
    "list of integers": (lambda: [1, BIG], [1, BIG]),
    "integers of 64 bits without a sign": (lambda: [0, 2**64 - 1], [0, 2**64 - 1]),
    "integers of more than 64 bits": (lambda: [1, 2**70], [1, 2**70]),
    "integers of both signs and 64 bits": (lambda: [-1, 2**63], [-1, 2**63]),
    "list of booleans": (lambda: [True, False], [True, False]),
    "booleans and integers": (lambda: [True, 2], [True, 2]),
    "integers and floats": (lambda: [1, 2.5], [1, 2.5]),
    "large integers and floats": (lambda: [BIG, 0.5], [BIG, 0.5]),
    "huge integers and floats": (lambda: [2**2000, 0.5], [2**2000, 0.5]),
    "texts and numbers": (lambda: ["a", 1, 1.5, True], ["a", 1, 1.5, True]),
    "list of lists": (lambda: [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
    "list of lists of floats": (lambda: [[i / 3, i / 7] for i in range(200)], [[i / 3, i / 7] for i in range(200)]),
    "lists of several lengths": (lambda: [[1], [2, 3]], [[1], [2, 3]]),
    "lists of several depths": (lambda: [[1, [2]], [3, [4, 5]]], [[1, [2]], [3, [4, 5]]]),
    "lists with a missing value": (lambda: [["a", NAN], ["b", None]], [["a", None], ["b", None]]),
    "list of arrays": (lambda: [np.array([1, 2]), np.array([3, 4])], [[1, 2], [3, 4]]),
    "list of arrays of several lengths": (lambda: [np.array([0.5]), np.array([1.5, 2.5])], [[0.5], [1.5, 2.5]]),
    "list of arrays and lists": (lambda: [np.array([0.5, 1.5]), [2.5, 3.5]], [[0.5, 1.5], [2.5, 3.5]]),
    "tuple": (lambda: (1, 2, 3), [1, 2, 3]),
    "tuple of tuples": (lambda: ((0.5, 1.5), (2.5, 3.5)), [[0.5, 1.5], [2.5, 3.5]]),
    "named tuples": (lambda: [Pair(1, 0.5), Pair(2, 1.5)], [[1, 0.5], [2, 1.5]]),
    "subclass of list": (lambda: Row([1.5, 2.5]), [1.5, 2.5]),
    "objects in an array": (lambda: _objects(1, "a", None, 2.5), [1, "a", None, 2.5]),
    "lists in an array": (lambda: _objects([1, 2], [3]), [[1, 2], [3]]),
    "structured array": (
        lambda: np.array([(1, 0.5), (2, 1.5)], dtype=[("a", "i4"), ("b", "f8")]),
        [[1, 0.5], [2, 1.5]],
    ),
    "arrays in dicts": (
        lambda: [{"p": np.array([0.5, 1.5])}, {"p": np.array([2.5])}],
        [{"p": [0.5, 1.5]}, {"p": [2.5]}],
    ),
    "sparse matrix": (lambda: csr_matrix([[0, 1], [2, 0]]), [[0, 1], [2, 0]]),
    "sparse array": (lambda: coo_array(np.array([[0.0, 0.1]])), [[0.0, 0.1]]),
    # Scalars
    "float": (lambda: 0.1, 0.1),
    "integer": (lambda: BIG, BIG),
    "huge integer": (lambda: 2**70, 2**70),
    "boolean": (lambda: True, True),
    "text": (lambda: "hello", "hello"),
    "empty text": (lambda: "", ""),
    "np.float64": (lambda: np.float64(0.1), 0.1),
    "np.float32": (lambda: np.float32(0.1), 0.10000000149011612),
    "np.int64": (lambda: np.int64(BIG), BIG),
    "np.uint8": (lambda: np.uint8(255), 255),
    "np.bool": (lambda: np.True_, True),
    "np.str": (lambda: np.str_("é"), "é"),
    "np.bytes": (lambda: np.bytes_(b"ab"), "YWI="),
    "np.longdouble": (lambda: np.longdouble(0.1), 0.1),
    "list of np.float32": (lambda: [np.float32(0.1), np.float32(0.5)], [0.10000000149011612, 0.5]),
    "list of np.int8": (lambda: [np.int8(-1), np.int8(1)], [-1, 1]),
    "list of np.bool": (lambda: [np.True_, np.False_], [True, False]),
    "np.int64 and np.float32": (lambda: [np.int64(3), np.float32(0.1)], [3, 0.10000000149011612]),
    "list of np.longdouble": (lambda: [np.longdouble(0.1), np.longdouble(NAN)], [0.1, None]),
    "Decimal": (lambda: decimal.Decimal("1.10"), "1.10"),
    "list of Decimal": (
        lambda: [decimal.Decimal("0.1"), decimal.Decimal("12345678901234567890.123456789")],
        ["0.1", "12345678901234567890.123456789"],
    ),
    "Decimal that is no number": (
        lambda: [decimal.Decimal("NaN"), decimal.Decimal("Infinity"), decimal.Decimal(1)],
        [None, None, "1"],
    ),
    # Texts
    "list of texts": (lambda: ["a", "grün", "", ' a,"b"\n'], ["a", "grün", "", ' a,"b"\n']),
    "array of texts": (lambda: np.array(["a", "grün"]), ["a", "grün"]),
    "matrix of texts": (lambda: np.array([["a", "b"], ["c", ""]]), [["a", "b"], ["c", ""]]),
    "array of text objects": (lambda: np.array(["a", "b"], dtype=object), ["a", "b"]),
    "StringDType": (lambda: np.array(["a", "grün"], dtype=np.dtypes.StringDType()), ["a", "grün"]),
    "StringDType with a missing text": (
        lambda: np.array(["a", NAN], dtype=np.dtypes.StringDType(na_object=NAN)),
        ["a", None],
    ),
    "StringDType with None": (lambda: np.array(["a", None], dtype=np.dtypes.StringDType(na_object=None)), ["a", None]),
    "texts with NaN": (lambda: ["a", NAN], ["a", None]),
    "texts with None": (lambda: ["a", None, ""], ["a", None, ""]),
    "text objects with NaN": (lambda: np.array(["a", NAN], dtype=object), ["a", None]),
    "the text nan": (lambda: ["nan", "NaN", "None"], ["nan", "NaN", "None"]),
    "texts that look like numbers": (lambda: ["1", "1.0", "true"], ["1", "1.0", "true"]),
    "texts that look like JSON": (lambda: ['{"a": 1}', "[1]", '"x"'], ['{"a": 1}', "[1]", '"x"']),
    "texts with line ends": (lambda: ["a\rb", "a\r\nb", "a\nb"], ["a\rb", "a\r\nb", "a\nb"]),
    "texts with quotes and commas": (lambda: ['a"b', "a,b", "'", ";"], ['a"b', "a,b", "'", ";"]),
    "texts with control characters": (lambda: ["a\0b", "\x1b[0m", "\u2028"], ["a\0b", "\x1b[0m", "\u2028"]),
    "letters beyond 16 bits": (lambda: ["😀", "\U0010ffff"], ["😀", "\U0010ffff"]),
    "surrogate": (lambda: ["\ud800"], ["\ud800"]),
    "subclass of str": (lambda: [Loud("a"), Loud("b")], ["a", "b"]),
    "subclass of str alone": (lambda: Loud("a"), "a"),
    "subclass of int": (lambda: [Count(1), Count(BIG)], [1, BIG]),
    "subclass of float": (lambda: [Share(0.1), Share(NAN)], [0.1, None]),
    # Bytes
    "bytes": (lambda: b"\0\xff", "AP8="),
    "bytes with zeros at the end": (lambda: [b"\1\2\0", b"\0\0"], ["AQIA", "AAA="]),
    "bytes and None": (lambda: [b"\1\0", None], ["AQA=", None]),
    "bytearray": (lambda: [bytearray(b"a\0")], ["YQA="]),
    "memoryview": (lambda: [memoryview(b"a\0")], ["YQA="]),
    "bytes in an array of objects": (lambda: np.array([b"a\0", b""], dtype=object), ["YQA=", ""]),
    "array of bytes": (lambda: np.array([b"ab", b"c"]), ["YWI=", "Yw=="]),
    "np.void": (lambda: [np.void(b"a\0")], ["YQA="]),
    "bytes in a dict": (lambda: {"b": [b"a\0"]}, {"b": ["YQA="]}),
    "bytes in a table": (lambda: _frame(b=[b"a\0", b"b"]), [{"b": "YQA="}, {"b": "Yg=="}]),
    "enum of bytes": (lambda: [Blob.ZIP], ["UEsA"]),
    # Enums, identifiers, classes
    "enum": (lambda: Color.RED, "red"),
    "list of enums": (lambda: [Color.RED, Color.NONE], ["red", None]),
    "enum of texts": (lambda: [Word.YES], ["yes"]),
    "enum of integers": (lambda: [Level.HIGH], [3]),
    "flags": (lambda: [Flag.A | Flag.B], [3]),
    "enums in a table": (
        lambda: _frame(c=[Color.RED, Word.YES], n=[Level.HIGH, Level.HIGH]),
        [{"c": "red", "n": 3}, {"c": "yes", "n": 3}],
    ),
    "UUID": (lambda: uuid.UUID(int=1), ID),
    "list of UUIDs": (lambda: [uuid.UUID(int=1)], [ID]),
    "UUIDs in a table": (lambda: _frame(u=[uuid.UUID(int=1)]), [{"u": ID}]),
    "dataclass": (lambda: Point(0.5), {"x": 0.5, "tag": "p"}),
    "list of dataclasses": (lambda: [Point(0.5), Point(NAN, "q")], [{"x": 0.5, "tag": "p"}, {"x": None, "tag": "q"}]),
    "dataclass with slots": (lambda: Slotted(DAY, Point(1.5)), {"when": "2024-02-29", "inner": {"x": 1.5, "tag": "p"}}),
    "dataclass with a private field": (lambda: [Private()], [{"shown": 1}]),
    "dataclass beside a huge integer": (lambda: [{"p": Private(), "n": 2**70}], [{"p": {"shown": 1}, "n": 2**70}]),
    "pydantic": (lambda: Item(name="n", price=decimal.Decimal("1.10")), ITEM),
    "list of pydantic": (lambda: [Item(name="n", price=decimal.Decimal("1.10"), at=TIME)], [{**ITEM, "at": ISO}]),
    "pydantic in pydantic": (
        lambda: Order(items=[Item(name="n", price=decimal.Decimal("1.10"))]),
        {"items": [ITEM], "color": "red"},
    ),
    "pydantic that is a list": (lambda: Ids([1, 2]), [1, 2]),
    # Times
    "date": (lambda: DAY, "2024-02-29"),
    "datetime": (lambda: TIME, ISO),
    "time": (lambda: datetime.time(1, 2, 3), "01:02:03"),
    "timedelta": (lambda: datetime.timedelta(seconds=90), "P0DT0H1M30S"),
    "datetime with a zone": (lambda: [TIME.replace(tzinfo=datetime.timezone.utc)], [ISO + "+00:00"]),
    "Timestamp": (lambda: pd.Timestamp("2024-02-29T12:30:00.000000001"), "2024-02-29T12:30:00.000000001"),
    "list of Timestamps": (lambda: [pd.Timestamp("2024-01-31"), pd.NaT], ["2024-01-31T00:00:00", None]),
    "Timedelta": (lambda: [pd.Timedelta("1D"), pd.NaT], ["P1DT0H0M0S", None]),
    "datetime64 by days": (lambda: np.array(["2024-01-31", "NaT"], dtype="M8[D]"), ["2024-01-31", None]),
    "datetime64 by seconds": (lambda: np.array(["2024-01-31T12:00:00"], dtype="M8[s]"), ["2024-01-31T12:00:00"]),
    "datetime64 by nanoseconds": (
        lambda: np.array(["2024-01-31T12:00:00.000000001"], dtype="M8[ns]"),
        ["2024-01-31T12:00:00.000000001"],
    ),
    "datetime64 in a list": (lambda: [np.datetime64("2024-01-31"), np.datetime64("NaT")], ["2024-01-31", None]),
    "datetime64 alone": (lambda: np.datetime64("2024-01-31"), "2024-01-31"),
    "matrix of datetime64": (
        lambda: np.array([["2024-01-31", "2024-02-01"]], dtype="M8[D]"),
        [["2024-01-31", "2024-02-01"]],
    ),
    "timedelta64": (lambda: np.array([90, "NaT"], dtype="m8[s]"), ["P0DT0H1M30S", None]),
    "DatetimeIndex": (
        lambda: pd.DatetimeIndex(["2024-01-31", "2024-02-01"]),
        ["2024-01-31T00:00:00", "2024-02-01T00:00:00"],
    ),
    # Series, indices, extension arrays
    "Series": (lambda: pd.Series([0.1, NAN], name="y"), [0.1, None]),
    "Series without a name": (lambda: pd.Series([1, 2]), [1, 2]),
    "Series of float32": (lambda: pd.Series([0.1], dtype="float32", name="y"), [0.10000000149011612]),
    "Series of Int64": (lambda: pd.Series([BIG, None], dtype="Int64", name="y"), [BIG, None]),
    "Series of Int8": (lambda: pd.Series([1, 2], dtype="Int8", name="y"), [1, 2]),
    "Series of Float32": (lambda: pd.Series([0.1, None], dtype="Float32", name="y"), [0.10000000149011612, None]),
    "Series of boolean": (lambda: pd.Series([True, None], dtype="boolean", name="y"), [True, None]),
    "Series of string": (lambda: pd.Series(["a", None, ""], dtype="string", name="y"), ["a", None, ""]),
    "Series of text objects": (lambda: pd.Series(["a", None, NAN], dtype=object, name="y"), ["a", None, None]),
    "Series of categories": (lambda: pd.Series(["u", "v", None], dtype="category", name="y"), ["u", "v", None]),
    "Series of times": (
        lambda: pd.Series(pd.to_datetime(["2024-01-31T12:00:00.5", None]), name="y"),
        ["2024-01-31T12:00:00.500000", None],
    ),
    "Series of times with a zone": (
        lambda: pd.Series(pd.to_datetime(["2024-01-31"]).tz_localize("Europe/Oslo"), name="y"),
        ["2024-01-31T00:00:00+01:00"],
    ),
    "Series of timedeltas": (lambda: pd.Series(pd.to_timedelta(["1h", None]), name="y"), ["P0DT1H0M0S", None]),
    "Series of lists": (lambda: pd.Series([[1, 2], [3, 4]], name="y"), [[1, 2], [3, 4]]),
    "Series that is sparse": (lambda: pd.Series(pd.arrays.SparseArray([0.0, 0.1]), name="y"), [0.0, 0.1]),
    "Series named by a day": (lambda: pd.Series([1], name=pd.Timestamp("2024-01-31")), [1]),
    "Series of Arrow's integers": (lambda: pd.Series([BIG, None], dtype="int64[pyarrow]", name="y"), [BIG, None]),
    "Series of Arrow's texts": (lambda: pd.Series(["a", None], dtype="string[pyarrow]", name="y"), ["a", None]),
    "Index": (lambda: pd.Index(["a", "b"]), ["a", "b"]),
    "RangeIndex": (lambda: pd.RangeIndex(3), [0, 1, 2]),
    "MultiIndex": (lambda: pd.MultiIndex.from_tuples([("a", 1), ("b", 2)]), [["a", 1], ["b", 2]]),
    "Categorical": (lambda: pd.Categorical(["u", "v"]), ["u", "v"]),
    "Categorical of integers": (lambda: pd.Categorical([BIG, None]), [BIG, None]),
    "nullable array": (lambda: pd.array([BIG, None], dtype="Int64"), [BIG, None]),
    "nullable array in a dict": (lambda: {"n": pd.array([1, None], dtype="Int64")}, {"n": [1, None]}),
    # Tables
    "table": (
        lambda: _frame(a=[1, 2], b=["x", None], c=[0.1, NAN]),
        [{"a": 1, "b": "x", "c": 0.1}, {"a": 2, "b": None, "c": None}],
    ),
    "table of floats": (lambda: _frame(a=[0.1], b=[NAN]), [{"a": 0.1, "b": None}]),
    "table of float32": (lambda: _frame(a=np.array([0.1], "f4")), [{"a": 0.10000000149011612}]),
    "table of integers and floats": (lambda: _frame(a=[BIG], b=[0.5]), [{"a": BIG, "b": 0.5}]),
    "table of small types": (
        lambda: _frame(a=np.array([1], "i1"), b=np.array([2], "u8"), c=[True]),
        [{"a": 1, "b": 2, "c": True}],
    ),
    "table with nullable columns": (
        lambda: _frame(n=pd.array([BIG, None], dtype="Int64"), t=pd.array([True, None], dtype="boolean")),
        [{"n": BIG, "t": True}, {"n": None, "t": None}],
    ),
    "table with times": (
        lambda: _frame(t=pd.to_datetime(["2024-01-31", None])),
        [{"t": "2024-01-31T00:00:00"}, {"t": None}],
    ),
    "table with numbered columns": (lambda: pd.DataFrame([[1.5, 2.5]]), [{"0": 1.5, "1": 2.5}]),
    "table with days as columns": (
        lambda: pd.DataFrame([[1.5, 2.5]], columns=pd.to_datetime(["2024-01-01", "2024-01-02"])),
        [{"2024-01-01T00:00:00": 1.5, "2024-01-02T00:00:00": 2.5}],
    ),
    "table with columns of columns": (
        lambda: pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("a", 2)])),
        [{'["a",1]': 1, '["a",2]': 2}],
    ),
    "table with an index": (lambda: pd.DataFrame({"a": [1, 2]}, index=["x", "y"]), [{"a": 1}, {"a": 2}]),
    "table with nested values": (
        lambda: _frame(l=[[1, "a"], []], d=[{"k": NAN}, {}]),
        [{"l": [1, "a"], "d": {"k": None}}, {"l": [], "d": {}}],
    ),
    "table with arrays": (lambda: _frame(v=[np.array([0.5, 1.5]), np.array([2.5])]), [{"v": [0.5, 1.5]}, {"v": [2.5]}]),
    "table with Decimals": (lambda: _frame(d=[decimal.Decimal("1.10"), None]), [{"d": "1.10"}, {"d": None}]),
    "table of one row": (lambda: _frame(label=["x"], score=[0.5]), [{"label": "x", "score": 0.5}]),
    # Objects
    "dict of lists": (lambda: {"a": [1, 2], "b": ["x", "y"]}, {"a": [1, 2], "b": ["x", "y"]}),
    "dict of arrays": (lambda: {"a": np.array([0.1, 0.2])}, {"a": [0.1, 0.2]}),
    "dict of arrays of two axes": (lambda: {"p": np.array([[0.5, 0.5], [0.1, 0.9]])}, {"p": [[0.5, 0.5], [0.1, 0.9]]}),
    "dict of scalars": (
        lambda: {"label": "x", "score": 0.5, "ok": True, "none": None},
        {"label": "x", "score": 0.5, "ok": True, "none": None},
    ),
    "dict of lists of several lengths": (lambda: {"a": [1], "b": [1, 2]}, {"a": [1], "b": [1, 2]}),
    "dict of a list and a scalar": (lambda: {"a": [1, 2], "n": 3}, {"a": [1, 2], "n": 3}),
    "dict of dicts": (lambda: {"a": {"x": 1}}, {"a": {"x": 1}}),
    "empty dict": (dict, {}),
    "subclass of dict": (lambda: Names(a=[1]), {"a": [1]}),
    "OrderedDict": (lambda: collections.OrderedDict(b=[1], a=[2]), {"b": [1], "a": [2]}),
    "mapping": (lambda: types.MappingProxyType({"a": [1]}), {"a": [1]}),
    "records": (lambda: [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}], [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]),
    "records with a key that one lacks": (lambda: [{"id": BIG}, {"x": "a"}], [{"id": BIG}, {"x": "a"}]),
    "records with nested values": (lambda: [{"a": [1, 2]}, {"a": [3, 4]}], [{"a": [1, 2]}, {"a": [3, 4]}]),
    "records with NaN among texts": (lambda: [{"t": "a"}, {"t": NAN}], [{"t": "a"}, {"t": None}]),
    "records of numpy's": (
        lambda: [{"n": np.int64(BIG), "x": np.float32(0.1)}],
        [{"n": BIG, "x": 0.10000000149011612}],
    ),
    "empty records": (lambda: [{}, {}], [{}, {}]),
    "numbers as keys": (lambda: {0: [0.25], 1: [0.75]}, {"0": [0.25], "1": [0.75]}),
    "floats and booleans as keys": (lambda: {1.5: [1], True: [2], None: [3]}, {"1.5": [1], "true": [2], "null": [3]}),
    "days as keys": (
        lambda: {pd.Timestamp("2024-01-01"): [1], DAY: [2]},
        {"2024-01-01T00:00:00": [1], "2024-02-29": [2]},
    ),
    "datetime64 as keys": (lambda: {np.datetime64("2024-01-01"): [1]}, {"2024-01-01": [1]}),
    "enums as keys": (lambda: {Color.RED: [1], Word.YES: [2]}, {"red": [1], "yes": [2]}),
    "UUIDs as keys": (lambda: {uuid.UUID(int=1): [1]}, {ID: [1]}),
    "numpy's as keys": (lambda: {np.int64(1): [1], np.str_("a"): [2]}, {"1": [1], "a": [2]}),
    "tuples as keys": (lambda: {("a", 1): [1]}, {'["a",1]': [1]}),
    "keys of numbers in records": (lambda: [{0: 0.5, 1: 0.5}], [{"0": 0.5, "1": 0.5}]),
    "deep keys of days": (lambda: [{"a": {DAY: {DAY: 1}}}], [{"a": {"2024-02-29": {"2024-02-29": 1}}}]),
    "deep nesting": (lambda: [{"a": _deep(200)}], [{"a": _deep(200)}]),
    # No rows
    "empty list": (list, []),
    "empty array": (lambda: np.array([]), []),
    "empty array of texts": (lambda: np.array([], dtype=str), []),
    "empty array of integers": (lambda: np.array([], dtype=np.int32), []),
    "empty table": (lambda: _frame(a=[], b=[]), []),
    "empty Series": (lambda: pd.Series([], dtype="float64", name="y"), []),
}

# The name of the column in which MLflow's JSON and CSV have a Series.
SERIES_NAMES = {"Series without a name": "0", "Series named by a day": "2024-01-31T00:00:00"}

# How an answer without a JSON form is made, and the words that name it in every error: the type, and the column if any.
REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "object": (lambda: object(), ("object has no JSON form",)),
    "object in a list": (lambda: [1, object()], ("object has no JSON form",)),
    "object in a table": (lambda: _frame(a=[1], bad=[object()]), ("object has no JSON form", "bad")),
    "object in a record": (lambda: [{"a": 1, "bad": object()}], ("object has no JSON form", "bad")),
    "object in a dict": (lambda: {"a": [1], "bad": [object()]}, ("object has no JSON form", "bad")),
    "object deep within": (lambda: [{"bad": {"x": [object()]}}], ("object has no JSON form", "bad")),
    "object as a key": (lambda: {object(): [1]}, ("object has no JSON form",)),
    "complex": (lambda: [1j], ("complex has no JSON form",)),
    "array of complex": (lambda: np.array([1j]), ("complex has no JSON form",)),
    "np.complex64": (lambda: [np.complex64(1j)], ("complex64 has no JSON form",)),
    "complex column": (lambda: _frame(a=[1], bad=[1j]), ("complex has no JSON form", "bad")),
    "np.clongdouble": (lambda: np.clongdouble(1j), ("clongdouble has no JSON form",)),
    "set": (lambda: [{1, 2}], ("set has no JSON form",)),
    "frozenset": (lambda: frozenset([1]), ("frozenset has no JSON form",)),
    "generator": (lambda: (n for n in range(3)), ("generator has no JSON form",)),
    "range": (lambda: range(3), ("range has no JSON form",)),
    "function": (lambda: [len], ("builtin_function_or_method has no JSON form",)),
    "type": (lambda: [int], ("type has no JSON form",)),
    "class of pydantic": (lambda: [Item], ("ModelMetaclass has no JSON form",)),
    "class of dataclass": (lambda: [Point], ("type has no JSON form",)),
    "Period": (
        lambda: pd.Series(pd.period_range("2024-01", periods=1, freq="M"), name="bad"),
        ("Period has no JSON form",),
    ),
    "Interval": (lambda: [pd.Interval(0, 1)], ("Interval has no JSON form",)),
    "categories of intervals": (lambda: pd.DataFrame({"bad": pd.cut([1, 2], 2)}), ("Interval has no JSON form", "bad")),
    "Fraction": (lambda: [fractions.Fraction(1, 3)], ("Fraction has no JSON form",)),
    "Path": (lambda: [pathlib.PurePosixPath("/a")], ("PurePosixPath has no JSON form",)),
    "address": (lambda: [ipaddress.IPv4Address(1)], ("IPv4Address has no JSON form",)),
    "np.longdouble with more digits": (lambda: [THIRD], ("longdouble has no JSON form", "more digits")),
    "array of longdouble with more digits": (lambda: np.array([THIRD]), ("longdouble has no JSON form", "more digits")),
    "table of longdouble with more digits": (
        lambda: _frame(bad=np.array([THIRD])),
        ("longdouble has no JSON form", "bad"),
    ),
    "timedelta64 by months": (lambda: [np.timedelta64(1, "M")], ("timedelta64 has no JSON form",)),
    "pydantic that fails": (lambda: [Faulty()], ("Faulty has no JSON form", "cannot be dumped")),
    "class without attributes": (lambda: [Odd()], ("Odd has no JSON form",)),
    "two columns of one name": (lambda: _twice(), ("two columns or keys that are called 'a'",)),
    "two keys of one name": (lambda: {1: [1], "1": [2]}, ("two columns or keys that are called '1'",)),
    "two keys of one name deep within": (
        lambda: [{"bad": {1: 1, "1": 2}}],
        ("two columns or keys that are called '1'", "bad"),
    ),
    "list in itself": (_loop, ("recursion",)),
    "nesting without an end": (lambda: [{"bad": _deep(100_000)}], ("recursion",)),
    "integer of 10,000 digits": (lambda: [10**10_000], ("4300 digits",)),
}


class Answers:
    """Answers what its input names."""

    def predict(self, context, model_input, params=None):
        name = model_input["name"].iloc[0]
        make, _ = ANSWERS.get(name) or REFUSED[name]
        return make()
