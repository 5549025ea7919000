"""The Open Inference Protocol (KServe V2) to rows and back, with the binary tensor extension. Pure functions.

Sources: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md and, for
the extension, https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.

A request's tensors are either one for each column of the signature, of shape [n] or [n, 1], or one of shape
[n, columns] that holds whole rows; for signatures of tensors, they are those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from darwin_runtime.errors import BadRequest
from darwin_runtime.protocols import kserve_v1
from darwin_runtime.protocols.base import METHOD, Headers, Reply, Request, parse_params, read_object
from darwin_runtime.protocols.encoding import as_table, dump, names_of, opened, text_of, to_tensor
from darwin_runtime.protocols.v2_tensors import BYTES, DATATYPES, NUMBERS, Tensor, pack, parameters_of, read_tensors
from darwin_runtime.schema.datatypes import DataType
from darwin_runtime.schema.model_spec import ModelSpec
from darwin_runtime.schema.rows import Array, Rows
from darwin_runtime.schema.signature import Spec
from darwin_runtime.schema.tabular import TabularSchema, TypeHintSchema
from darwin_runtime.schema.tensors import TensorSchema
from darwin_runtime.schema.untyped import UncheckedSchema

BINARY = "application/octet-stream"
LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data",)

# What stands for MLflow's types of columns.
COLUMNS = {"boolean": "BOOL", "integer": "INT32", "long": "INT64", "float": "FP32", "double": "FP64"}

# Request parameters that are the protocol's own.
WANTS_BINARY = "binary_data_output"


# Requests


def read(body: bytes, headers: Headers, contract: ModelSpec, *, exact: bool = True) -> Request:
    """`{"inputs": [...]}`, the tensors; bytes after the JSON are theirs. Raises `BadRequest` or `InputError`."""
    head, tail = _parts(body, headers.get(LENGTH.lower().encode()))
    given = read_object(head, exact=exact, contract=contract)
    tensors = read_tensors(given.get("inputs"), tail)
    parameters = parameters_of(given, "the request")
    params, method = parse_params(parameters, contract)
    wanted, labels = _wanted(given.get("outputs"), contract)
    if METHOD in parameters and (others := [label for label in labels if label != (method or contract.method)]):
        raise BadRequest(f"output {others[0]!r} is asked for, and {method or contract.method!r} by {METHOD}")
    methods = ["" if label == contract.method else label for label in labels]
    if len(labels) < len(wanted or ()) and method not in methods:
        methods.append(method)
    name = given.get("id")
    if name is not None and not isinstance(name, str):
        raise BadRequest("id must be a string")
    form = Form(name, labels, wanted, bool(parameters.get(WANTS_BINARY)))
    several = tuple(methods) if len(methods) > 1 else ()
    method = "" if several else (methods or [method])[0]
    return Request(_rows(tensors, contract), params, contract, method, form, methods=several)


def _parts(body: bytes, length: bytes | None) -> tuple[bytes, memoryview]:
    if length is None:
        return body, memoryview(b"")
    if not length.isdigit() or len(length) > 18 or int(length) > len(body):
        raise BadRequest(f"{LENGTH} must be the number of bytes of JSON, at most the {len(body)} of the body")
    return body[: int(length)], memoryview(body)[int(length) :]


def _wanted(outputs: Any, contract: ModelSpec) -> tuple[dict[str, bool | None] | None, list[str]]:
    """Which outputs are wanted, and whether in binary; and which of them are methods, as in MLServer."""
    if outputs is None or outputs == []:
        return None, []
    if not isinstance(outputs, list) or not all(
        isinstance(o, dict) and isinstance(o.get("name"), str) for o in outputs
    ):
        raise BadRequest("outputs must be a list of objects with a name")
    wanted = {each["name"]: parameters_of(each, f"output {each['name']!r}").get("binary_data") for each in outputs}
    return wanted, [name for name in wanted if name in contract.methods and name not in _names(contract)]


def _names(contract: ModelSpec) -> list[str]:
    return [spec["name"] for spec in contract.outputs if spec.get("name") is not None]


# Rows


def _rows(tensors: Sequence[Tensor], contract: ModelSpec) -> Rows:
    plan = contract.input_schema
    if isinstance(plan, UncheckedSchema):
        return _unchecked(tensors)
    if isinstance(plan, TensorSchema):
        types = {spec.key: spec.datatype for spec in plan.tensors}
        if not plan.named:
            return plan.instances(_texted(_only(tensors), types[""]).nested())
        return plan.instances({tensor.name: _texted(tensor, types.get(tensor.name)).nested() for tensor in tensors})
    if isinstance(plan, TypeHintSchema):
        return plan.instances(_hinted(_only(tensors), plan.columns[0].datatype))
    cells = {column.key: column.datatype for column in plan.columns}
    if whole := _whole_rows(tensors, plan):
        count, width = whole.shape
        rows = (plan.numbers if isinstance(whole.values, np.ndarray) else plan.flat)(whole.values, (count, width))
        if rows is not None:
            return rows
        if whole.datatype != BYTES or width != len(plan.columns):
            return plan.split(None, _texted(whole, None).nested())
        parts = [replace(whole, shape=(count,), values=whole.values[index::width]) for index in range(width)]
        return plan.arrays({c.key: _cells(part, c.datatype) for c, part in zip(plan.columns, parts, strict=True)})
    columns = {}
    for position, tensor in enumerate(tensors):
        name = tensor.name if plan.named else str(position)
        columns[name] = _cells(tensor, cells.get(name))
    return plan.arrays(columns)


def _cells(tensor: Tensor, datatype: DataType | None) -> Any:
    """A value of `datatype` for each row, if it is known; lists and objects may be JSON text."""
    if tensor.datatype == BYTES:
        tensor = _texted(tensor, datatype)
    column = tensor.column()
    if column is None:
        return tensor.nested()
    if tensor.datatype == BYTES and datatype is not None and datatype.nested:
        return [datatype.from_text(value) if type(value) is str else value for value in column]
    return column


def _hinted(tensor: Tensor, datatype: DataType) -> Any:
    """The list that type hints describe: a value for each row, of shape [n] or [n, 1], unless that is a list."""
    cells = _cells(tensor, datatype)
    lists = {type(cell) is list for cell in cells}
    return tensor.nested() if datatype.name.startswith("array") and lists != {True} else cells


def _whole_rows(tensors: Sequence[Tensor], plan: TabularSchema) -> Tensor | None:
    """The tensor that is the whole table, if it is one."""
    tensor = tensors[0]
    alone = len(tensors) == 1 and len(tensor.shape) == 2 and tensor.name not in {column.key for column in plan.columns}
    return tensor if alone else None


def _only(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) > 1:
        raise BadRequest(f"the model takes one input, not {len(tensors)}")
    return tensors[0]


def _texted(tensor: Tensor, datatype: DataType | None) -> Tensor:
    """Bytes of the binary extension as text, unless `datatype` is bytes, or is any and not all of them are text."""
    if isinstance(tensor.values, np.ndarray) or not tensor.values or type(tensor.values[0]) is not bytes:
        return tensor
    name = "any" if datatype is None else datatype.name
    if name in ("binary", "bytes"):
        return tensor
    try:
        values = [value.decode() for value in tensor.values]
    except UnicodeDecodeError as error:
        if name == "any":
            return tensor
        raise BadRequest(f"input {tensor.name[:100]!r} is not UTF-8: {error}") from None
    return replace(tensor, values=values)


def _unchecked(tensors: Sequence[Tensor]) -> Rows:
    """Arrays of the types that the client names, for nothing else names any; several columns are a table."""
    arrays = {tensor.name: _typed(tensor) for tensor in tensors}
    first = next(iter(arrays.values()))
    value: Any = first
    if len(arrays) > 1:
        columns = all(array.size == len(array) == len(first) for array in arrays.values())
        value = pd.DataFrame({name: array.ravel() for name, array in arrays.items()}) if columns else arrays
    return Rows(value, len(first), unvalidated=True)


def _typed(tensor: Tensor) -> Array:
    if tensor.datatype == BYTES:
        values = _texted(tensor, None).values
        return np.fromiter(values, dtype=object, count=len(values)).reshape(tensor.shape)
    with np.errstate(over="ignore"):
        array = np.array(tensor.values, dtype=NUMBERS[tensor.datatype]).reshape(tensor.shape)
    # JSON has no infinity.
    if type(tensor.values) is list and array.dtype.kind == "f" and (infinite := np.isinf(array).ravel()).any():
        place = f"element {int(infinite.argmax())} of input {tensor.name[:100]!r}"
        raise BadRequest(f"{place} is not within {tensor.datatype}")
    return array


# Answers


@dataclass(frozen=True)
class Form:
    """The answer's form that a client wants: with its `id`, and an output for each method in `labels`.

    `wanted` says which outputs, and whether each is to be `binary`, if it is not as for all.
    """

    id: str | None
    labels: Sequence[str]
    wanted: Mapping[str, bool | None] | None
    binary: bool


def write(output: Any, request: Request) -> Reply:
    """Raises `EncodingError`, and `BadRequest` for an output that the model hasn't got."""
    contract, form = request.contract, request.form
    named = []
    for method, answer in (output if request.methods else {request.method: output}).items():
        label = method or contract.method
        outputs = [(label, answer)] if label in form.labels else _outputs(answer, contract, method)
        # The values of a column make one, as in the metadata.
        columns = not method and any(spec["type"] != "tensor" for spec in contract.outputs)
        named += [(key, values, columns) for key, values in outputs]
    found = dict(zip(names_of(key for key, _, _ in named), named, strict=True))
    wanted = dict.fromkeys(found) if form.wanted is None else form.wanted
    if absent := [key for key in wanted if key not in found]:
        raise BadRequest(f"there is no output {absent[0][:100]!r}: there is {', '.join(found)}")
    described, buffers = [], []
    for name, asked in wanted.items():
        _, values, columns = found[name]
        datatype, shape, flat = to_tensor(name, values, column=columns)
        is_binary = form.binary if asked is None else asked
        if is_binary and (packed := pack(name, flat)) is not None:
            buffers.append(packed)
            data: dict[str, Any] = {"parameters": {"binary_data_size": len(packed)}}
        else:
            data = {"data": flat}
        described.append({"name": name, "datatype": datatype, "shape": shape, **data})
    told: dict[str, Any] = {"model_name": contract.name}
    if contract.version:
        told["model_version"] = contract.version
    if form.id is not None:
        told["id"] = form.id
    head = dump({**told, "outputs": described})
    if not buffers:
        return Reply(200, head)
    return Reply(200, b"".join([head, *buffers]), BINARY, ((LENGTH, str(len(head))),))


def _outputs(output: Any, contract: ModelSpec, method: str) -> Sequence[tuple[Any, Any]]:
    """The tensors in `output`, by name: those of the signature, else that of `method`, or of the usual one."""
    names = [] if method else _names(contract)
    if isinstance(output, np.ndarray) and len(names) > 1 and output.shape[1:] == (len(names),):
        return list(zip(names, output.T, strict=True))
    if type(output) is not np.ndarray:
        output = opened(output)
        if (table := as_table(output)) is not None:
            return table
        if type(output) is dict and output:
            return list(output.items())
    return [(names[0] if len(names) == 1 else method or contract.method, output)]


def render_error(error: Exception) -> Reply:
    """The answer to a request that failed with `error`: as in V1."""
    return kserve_v1.render_error(error)


# Metadata


def server_metadata(version: str) -> Reply:
    return Reply(200, dump({"name": "darwin-serve-runtime", "version": version, "extensions": EXTENSIONS}))


def model_metadata(contract: ModelSpec, flavor: str) -> Reply:
    outputs = [_described(spec, index) for index, spec in enumerate(contract.outputs)]
    if len(outputs) == 1 and contract.outputs[0].get("name") is None:
        outputs[0]["name"] = contract.method
    body = {
        "name": contract.name,
        "versions": [contract.version] if contract.version else [],
        "platform": f"mlflow_{flavor}",
        "inputs": [_described(spec, index) for index, spec in enumerate(contract.input_schema.specs)],
        "outputs": outputs,
    }
    return Reply(200, dump(body))


def _described(spec: Spec, index: int) -> dict[str, Any]:
    name = spec.get("name")
    if spec["type"] == "tensor":
        dtype, shape = np.dtype(spec["tensor-spec"]["dtype"]), list(spec["tensor-spec"]["shape"])
        return {"name": name or "input", "datatype": DATATYPES.get(dtype, BYTES), "shape": shape}
    return {
        "name": str(index if name is None else name),
        "datatype": COLUMNS.get(spec["type"], BYTES),
        "shape": [-1, 1],
    }


def tensors(contract: ModelSpec, sample: Any) -> list[dict[str, Any]]:
    """The inputs of a request for one row; `sample` is that as Darwin's form has it."""
    made = []
    for index, spec in enumerate(contract.input_schema.specs):
        described = _described(spec, index)
        value = sample.get(described["name"]) if isinstance(sample, dict) else sample
        if value is None:
            continue
        shape = [1, 1]
        if spec["type"] == "tensor":
            array = np.array(value, dtype=object)
            # The sample is one row, where the tensor's first axis is rows.
            shape = [*([1] if described["shape"][0] == -1 else []), *array.shape]
            data = array.ravel().tolist()
        else:
            data = [value if described["datatype"] != BYTES else text_of(value)]
        made.append({**described, "shape": shape, "data": data})
    return made
