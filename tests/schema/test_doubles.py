"""Rows of floats, read through their bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from darwin_runtime.schema.doubles import double_matrix


@pytest.mark.parametrize("form", [list, tuple])
def test_many_floats_are_read_at_once_and_nothing_else_is(form: Any) -> None:
    def rows() -> list[Any]:
        return [form(row * 1.5 + column for column in range(8)) for row in range(40)]

    np.testing.assert_array_equal(double_matrix(rows(), 8), np.array(rows()))
    for index, column in ((20, 3), (20, 7), (39, 7), (0, 1)):
        # The bytes of a long text may look like those of floats.
        for odd in (
            1,
            2**40,
            True,
            None,
            "g" * 8,
            "g",
            b"ggg",
            object(),
            [1.5],
            {},
            np.float64(1.5),
            1.5 + 0j,
            "g" * 9 * 9,
        ):
            other = [list(row) for row in rows()]
            other[index][column] = odd
            assert double_matrix([form(row) for row in other], 8) is None, (index, odd)
    for at in (0, 20, 39):
        row: Any
        for row in (rows()[0][:7], rows()[0] * 2, [], (), {}, 1, None, 1.5, "g" * 72, {str(n): 1.5 for n in range(8)}):
            assert double_matrix([*rows()[:at], row, *rows()[at:]], 8) is None, (at, row)
    assert double_matrix([*rows()[:20], list(rows()[0]), tuple(rows()[0])], 8) is None
    assert (
        double_matrix(rows(), 9)
        is double_matrix(rows()[:2], 8)
        is double_matrix([], 8)
        is double_matrix([[]] * 300, 0)
        is None
    )
