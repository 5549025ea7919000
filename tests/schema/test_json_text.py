"""JSON with NaN and Infinity, and that nothing else is read that JSON has not."""

from __future__ import annotations

import math

import pytest

from darwin_runtime.schema import json_text
from darwin_runtime.schema.json_text import read_json


def test_nan_and_infinity_are_floats() -> None:
    first, *rest = read_json(b'[NaN, Infinity, -Infinity, 1, "NaN", 1e400, "\\ud83d\\ude00", {"NaN": null}]')
    assert math.isnan(first)
    assert rest == [math.inf, -math.inf, 1, "NaN", math.inf, "\U0001f600", {"NaN": None}]


@pytest.mark.parametrize(
    "body",
    [
        *(b"nan", b"-NaN", b"+Infinity", b"[NaN,]", b"{NaN: 1}", b"[Infinityx]", b"[NaN] [NaN]", b"NaN1", b"[1e400]"),
        *(b'["\\ud800", NaN]', b'["NaN\\udfff", NaN]', b'["\xff", NaN]', b'["\n", NaN]', b"[NaN, 0x1]", b"[NaN, 01]"),
        *(b"[" * 100_000 + b"NaN", b"[NaN, " + b"1" * 5000 + b"]", b"\xef\xbb\xbf[NaN]", "[NaN]".encode("utf-16")),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_all_else_is_refused_as_ever(body: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        read_json(body)


def test_only_what_the_fast_parser_refuses_is_parsed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "json", None)
    assert read_json(b'["NaN", 1.5]') == ["NaN", 1.5]
    with pytest.raises(AttributeError):
        read_json(b"[NaN]")
