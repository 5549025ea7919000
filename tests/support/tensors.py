"""The Open Inference Protocol as clients write it: rows of a table as tensors, in JSON and in binary."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from darwin_runtime.protocols.open_inference import COLUMNS, LENGTH
from darwin_runtime.protocols.v2_tensors import NUMBERS


def column_tensors(specs: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A tensor for each column that the rows have, of the datatype that stands for its type."""
    made = []
    for index, spec in enumerate(specs):
        name = str(spec.get("name", index))
        if name in rows[0]:
            values = [row[name] for row in rows]
            datatype = COLUMNS.get(spec["type"], "BYTES")
            if datatype == "BYTES":
                values = [value if isinstance(value, str) else json.dumps(value) for value in values]
            made.append({"name": name, "shape": [len(rows), 1], "datatype": datatype, "data": values})
    return made


def binary(request: dict[str, Any], blobs: Sequence[str] = ()) -> tuple[bytes, dict[str, str]]:
    """The same request in the binary extension, and its headers; inputs called as in `blobs` hold bytes, not text."""
    inputs, parts = [], []
    for tensor in request["inputs"]:
        flat = np.array(tensor["data"], dtype=object).ravel().tolist()
        if tensor["datatype"] == "BYTES":
            raw = [base64.b64decode(v) if tensor["name"] in blobs else v.encode() for v in flat]
            data = b"".join(struct.pack("<I", len(v)) + v for v in raw)
        else:
            data = np.array(flat, dtype=NUMBERS[tensor["datatype"]]).tobytes()
        parts.append(data)
        inputs.append(
            {k: v for k, v in tensor.items() if k != "data"} | {"parameters": {"binary_data_size": len(data)}}
        )
    head = json.dumps({**request, "inputs": inputs}).encode()
    return head + b"".join(parts), {LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}


def values(answer: bytes, length: str | None, blobs: Sequence[str] = ()) -> dict[str, Any]:
    """The flat values of each output of an answer, whose JSON is of that length if more follows.

    Those of outputs called as in `blobs` are bytes, shown as JSON shows them.
    """
    head, at = answer[: int(length)] if length else answer, int(length or 0)
    found = {}
    for output in json.loads(head)["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[output["name"]] = output["data"]
            continue
        part, at = answer[at : at + size], at + size
        if output["datatype"] == "BYTES":
            texts = []
            while part:
                (count,) = struct.unpack("<I", part[:4])
                raw = part[4 : 4 + count]
                texts.append(base64.b64encode(raw).decode() if output["name"] in blobs else raw.decode())
                part = part[4 + count :]
            found[output["name"]] = texts
        else:
            found[output["name"]] = np.frombuffer(part, NUMBERS[output["datatype"]]).tolist()
    return found
