"""The Open Inference Protocol (KServe V2) to rows and back, with the binary tensor extension. Pure functions.

Sources: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md and, for
the extension, https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md.

A request's tensors are either one for each column of the signature, of shape [n] or [n, 1], or one of shape
[n, columns] that holds whole rows; for signatures of tensors, they are those.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from darwin_runtime.errors import BadRequest, EncodingError
from darwin_runtime.protocols import kserve_v1
from darwin_runtime.protocols.base import METHOD, Headers, Reply, Request, parse_params, read_object
from darwin_runtime.protocols.encoding import dump, plain
from darwin_runtime.protocols.v2_tensors import BYTES, DATATYPES, NUMBERS, Tensor, parameters_of, read_tensors
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
    wanted, label = _wanted(given.get("outputs"), contract)
    if label and METHOD in parameters and label != (method or contract.method):
        raise BadRequest(f"output {label!r} is asked for, and {method or contract.method!r} by {METHOD}")
    if label and label != contract.method:
        method = label
    name = given.get("id")
    if name is not None and not isinstance(name, str):
        raise BadRequest("id must be a string")
    form = Form(name, label, wanted, bool(parameters.get(WANTS_BINARY)))
    return Request(_rows(tensors, contract), params, contract, method, form)


def _parts(body: bytes, length: bytes | None) -> tuple[bytes, memoryview]:
    if length is None:
        return body, memoryview(b"")
    if not length.isdigit() or len(length) > 18 or int(length) > len(body):
        raise BadRequest(f"{LENGTH} must be the number of bytes of JSON, at most the {len(body)} of the body")
    return body[: int(length)], memoryview(body)[int(length) :]


def _wanted(outputs: Any, contract: ModelSpec) -> tuple[dict[str, bool | None] | None, str]:
    """Which outputs are wanted, and whether in binary; and a method, if one is asked for as MLServer's clients do."""
    if outputs is None or outputs == []:
        return None, ""
    if not isinstance(outputs, list) or not all(
        isinstance(o, dict) and isinstance(o.get("name"), str) for o in outputs
    ):
        raise BadRequest("outputs must be a list of objects with a name")
    wanted = {each["name"]: parameters_of(each, f"output {each['name']!r}").get("binary_data") for each in outputs}
    asked = [name for name in wanted if name in contract.methods and name not in _names(contract)]
    if asked and len(wanted) > 1:
        raise BadRequest(f"outputs {', '.join(wanted)[:200]} cannot be had at once: ask for one of them at a time")
    return wanted, asked[0] if asked else ""


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
    """The answer's form that a client wants: with its `id`, and called by what `label`, if not as usual.

    `wanted` says which outputs, and whether each is to be `binary`, if it is not as for all.
    """

    id: str | None
    label: str
    wanted: Mapping[str, bool | None] | None
    binary: bool


def write(output: Any, request: Request) -> Reply:
    """Raises `EncodingError`, and `BadRequest` for an output that the model hasn't got."""
    contract, form = request.contract, request.form
    named = {form.label: output} if form.label else _outputs(output, contract, request.method)
    # A column's values are told as one, as the metadata does.
    columns = not request.method and any(spec["type"] != "tensor" for spec in contract.outputs)
    found = {key: _array_of(values, column=columns) for key, values in named.items()}
    wanted = dict.fromkeys(found) if form.wanted is None else form.wanted
    if absent := [key for key in wanted if key not in found]:
        raise BadRequest(f"there is no output {absent[0][:100]!r}: there is {', '.join(found)}")
    outputs, buffers = [], []
    for key, asked in wanted.items():
        array = found[key]
        datatype = DATATYPES.get(array.dtype, BYTES)
        described: dict[str, Any] = {"name": key, "datatype": datatype, "shape": list(array.shape)}
        if form.binary if asked is None else asked:
            little = array.dtype.newbyteorder("<")
            buffers.append(_packed(array) if datatype == BYTES else array.astype(little, copy=False).tobytes())
            described["parameters"] = {"binary_data_size": len(buffers[-1])}
        else:
            flat = array.ravel()
            described["data"] = [_text(value) for value in flat] if datatype == BYTES else flat.tolist()
        outputs.append(described)
    answer: dict[str, Any] = {"model_name": contract.name}
    if contract.version:
        answer["model_version"] = contract.version
    if form.id is not None:
        answer["id"] = form.id
    head = dump({**answer, "outputs": outputs})
    if not buffers:
        return Reply(200, head)
    return Reply(200, b"".join([head, *buffers]), BINARY, ((LENGTH, str(len(head))),))


def _outputs(output: Any, contract: ModelSpec, method: str) -> dict[str, Any]:
    """The tensors in `output`, by name: those of the signature, else that of `method`, or of the usual one."""
    if isinstance(output, list) and output and all(isinstance(row, dict) for row in output):
        output = pd.DataFrame(output)
    if isinstance(output, pd.DataFrame):
        return {str(key): output[key] for key in output.columns}
    if isinstance(output, dict):
        return {str(key): value for key, value in output.items()}
    names = [] if method else _names(contract)
    if isinstance(output, np.ndarray) and len(names) > 1 and output.shape[1:] == (len(names),):
        return dict(zip(names, output.T, strict=True))
    return {names[0] if len(names) == 1 else method or contract.method: output}


def _array_of(values: Any, *, column: bool) -> Array:
    """Numbers of a type that the protocol has, or objects; of two dimensions at least if it is a `column`."""
    column = column or isinstance(values, pd.Series)
    try:
        array = np.asarray(_listed(values))
    except ValueError:  # lists of several lengths
        array = np.fromiter(values, dtype=object, count=len(values))
    native = array.dtype.newbyteorder("=")
    if array.dtype.kind == "M":
        array = np.array(plain(array), dtype=object)
    else:
        array = array.astype(native if native in DATATYPES else object, copy=False)
    if column and array.ndim == 1:
        return array.reshape(-1, 1)
    return np.ascontiguousarray(np.atleast_1d(array))


def _listed(values: Any) -> Any:
    if hasattr(values, "toarray"):
        return values.toarray()
    return values.to_numpy() if isinstance(values, (pd.Series, pd.Index)) else values


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return ""
    try:
        made = plain(value)
    except TypeError as error:
        raise EncodingError(f"the model's output has no form as a tensor: {error}") from error
    return made if isinstance(made, str) else dump(made).decode()


def _packed(array: Array) -> bytes:
    parts = []
    for value in array.ravel():
        data = value if isinstance(value, bytes) else _text(value).encode()
        parts += [struct.pack("<I", len(data)), data]
    return b"".join(parts)


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
            data = [value if described["datatype"] != BYTES or isinstance(value, str) else dump(value).decode()]
        made.append({**described, "shape": shape, "data": data})
    return made
