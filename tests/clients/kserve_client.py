"""KServe's own client asking a server: `python kserve_client.py URL`, in an environment made from kserve.txt.

Prints, as JSON, what it was told in both protocols.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

ROWS = [[6.1, 2.8, 4.7, 1.2], [5.0, 3.0, 1.5, 0.2]]


async def ask(url: str) -> dict[str, Any]:
    v1 = InferenceRESTClient(RESTConfig(protocol="v1", retries=1))
    v2 = InferenceRESTClient(RESTConfig(protocol="v2", retries=1))
    told: dict[str, Any] = {
        "live": [await client.is_server_live(url) for client in (v1, v2)],
        "server_ready": await v2.is_server_ready(url),
        "model_ready": [await client.is_model_ready(url, "iris") for client in (v1, v2)],
        "v1": (await v1.infer(url, {"instances": ROWS}, model_name="iris"))["predictions"],
    }
    for binary in (False, True):
        tensor = InferInput("input", [2, 4], "FP64")
        tensor.set_data_from_numpy(np.array(ROWS), binary_data=binary)
        answer = await v2.infer(url, InferRequest("iris", [tensor], request_id="7"), model_name="iris")
        told[f"v2, binary {binary}"] = [answer.id, answer.outputs[0].name, answer.outputs[0].as_numpy().tolist()]
    await v1.close()
    await v2.close()
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(ask(sys.argv[1]))))
