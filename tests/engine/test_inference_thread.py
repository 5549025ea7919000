"""The inference thread."""

from __future__ import annotations

import pytest

from darwin_runtime.engine.inference_thread import InferenceThread


def test_the_inference_thread_survives_what_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    thread = InferenceThread()
    thread.run(lambda: 1 / 0)  # type: ignore[arg-type]
    assert thread.submit(lambda: 1).result(60) == 1
    assert "a job on the inference thread failed" in caplog.text
