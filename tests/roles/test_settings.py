from __future__ import annotations

import pytest

from darwin_runtime.errors import ConfigError
from darwin_runtime.settings import Reader


def test_empty_is_unset() -> None:
    read = Reader({"PORT": "", "NAME": "  ", "FLAG": ""})
    assert read.integer("PORT", 8000, minimum=0) == 8000
    assert read.text("NAME", "default") == "default"
    assert read.flag("FLAG", True) is True
    read.finish()


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("TRUE", True), ("1", True), ("yes", True), ("false", False), ("0", False), ("No", False)],
)
def test_flag_reads(text: str, value: bool) -> None:
    read = Reader({"DRY_RUN": text})
    assert read.flag("DRY_RUN", not value) is value
    read.finish()


def test_all_problems_are_told_at_once() -> None:
    read = Reader({"DRY_RUN": "maybe", "TTL_DAYS": "-1", "MAX_RETRIES": "1.5", "LINK_MODE": "hard", "PORT": "99999"})
    read.flag("DRY_RUN", False)
    read.number("TTL_DAYS", 7, minimum=0)
    read.integer("MAX_RETRIES", 3, minimum=0)
    read.choice("LINK_MODE", "symlink", ("symlink", "copy"))
    read.integer("PORT", 8000, minimum=0, maximum=65535)
    read.required("MODEL_URI", example="models:/m/1")
    with pytest.raises(ConfigError) as caught:
        read.finish()
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "DRY_RUN='maybe'",
        "TTL_DAYS='-1'",
        "MAX_RETRIES='1.5'",
        "LINK_MODE='hard'",
        "PORT='99999'",
        "MODEL_URI",
    ]
    for problem in caught.value.problems:
        assert "for example" in problem


@pytest.mark.parametrize("text", ["seven", "nan", "inf", "1e999", "0x10"])
def test_what_is_not_a_finite_number_is_refused(text: str) -> None:
    read = Reader({"TTL_DAYS": text})
    read.number("TTL_DAYS", 7, minimum=0)
    assert len(read.problems) == 1


def test_fractions_are_numbers() -> None:
    assert Reader({"TTL_DAYS": "0.5"}).number("TTL_DAYS", 7, minimum=0) == 0.5


def test_what_was_read_is_known() -> None:
    read = Reader({"PORT": "80"})
    read.integer("PORT", 8000, minimum=0)
    read.text("HOST", "0.0.0.0")
    assert read.seen == {"PORT": 80, "HOST": "0.0.0.0"}
