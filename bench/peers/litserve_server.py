"""A model on LitServe: `python litserve_server.py MODEL PORT [MAX_BATCH_SIZE BATCH_TIMEOUT_SECONDS]`."""

from __future__ import annotations

import sys
from typing import Any

import litserve
import mlflow.pyfunc
import numpy as np


class Classifier(litserve.LitAPI):  # type: ignore[misc]  # LitServe is not installed where types are checked
    """Each request holds one row. With batching, `predict` gets several of them stacked."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(**options)
        self.path = model

    def setup(self, device: str) -> None:
        # Without MLflow's checks of a DataFrame: the fastest that its users can have.
        self.model = mlflow.pyfunc.load_model(self.path).get_raw_model()

    # LitServe takes annotations of these two for schemas to check every request and answer against.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return np.asarray(request["input"])

    def predict(self, rows: Any) -> Any:
        return self.model.predict(np.atleast_2d(rows))

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return {"output": int(np.ravel(output)[0])}


if __name__ == "__main__":
    model, port, *batching = sys.argv[1:]
    size, timeout = (int(batching[0]), float(batching[1])) if batching else (1, 0.0)
    api = Classifier(model, max_batch_size=size, batch_timeout=timeout)
    # One process for HTTP and one for the model is the least that LitServe runs.
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, log_level="warning", generate_client_file=False)
