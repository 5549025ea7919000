"""The OpenAPI 3.1 document of a model, made from its signature. Source: https://spec.openapis.org/oas/v3.1.0.html."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from darwin_runtime.http.auth import AuthPolicy
from darwin_runtime.protocols.base import CHAT, CSV, JSON, METHOD, PARQUET
from darwin_runtime.protocols.open_inference import tensors
from darwin_runtime.schema.model_spec import ModelSpec
from darwin_runtime.schema.tabular import TypeHintSchema

Schema = dict[str, Any]

# What may come back besides a 200, by status.
_ERRORS = {
    400: "the request does not fit the model's signature, or is not what the protocol says",
    406: "the Accept header allows nothing that can be written",
    413: "the body is too large",
    415: "the Content-Type or Content-Encoding cannot be read",
    500: "the model failed",
    503: "the model is not loaded, or more requests wait than may wait: Retry-After says when to come back",
    504: "the model did not answer in time",
}

# What comes back to those who are not let in, where that is asked.
_REFUSALS = {
    401: "there is no key in the request, or one that is not valid: WWW-Authenticate says how to give one",
    403: "the connection has no client certificate",
}

_PROBLEM: Schema = {
    "type": "object",
    "properties": {
        "field": {"type": "string"},
        "row": {"type": "integer"},
        "error_type": {"enum": ["missing", "type_mismatch"]},
        "message": {"type": "string"},
        "expected_type": {"type": "string"},
        "actual_type": {"type": "string"},
    },
    "required": ["field", "error_type", "message"],
}

_SCHEMAS: dict[str, Schema] = {
    "DarwinError": {
        "type": "object",
        "properties": {
            "detail": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "error": {"type": "string"},
                    "errors": {"type": "array", "items": _PROBLEM},
                    "error_count": {"type": "integer"},
                    "expected_schema": {"type": "array"},
                    "hint": {"type": "string"},
                },
                "required": ["message"],
            }
        },
        "required": ["detail"],
    },
    "MLflowError": {
        "type": "object",
        "properties": {"error_code": {"type": "string"}, "message": {"type": "string"}},
        "required": ["error_code", "message"],
    },
    "KServeError": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]},
    "Tensor": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "datatype": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "parameters": {"type": "object"},
            "data": {"type": "array"},
        },
        "required": ["name", "datatype", "shape"],
    },
}


def document(
    contract: ModelSpec,
    sample: Any,
    *,
    title: str,
    description: str,
    version: str,
    root_path: str,
    features: bool,
    chat: Any,
    needs: AuthPolicy,
) -> Schema:
    """The document. `sample` is `features` for one row; `features` tells whether a feature store is there to ask.

    `chat` is a body that goes to the model as it is, if it takes such; `needs` is what requests need.
    """
    whole = {
        "openapi": "3.1.0",
        "info": {"title": title, "description": description, "version": version},
        "servers": [{"url": root_path or "/"}],
        "paths": {
            "/predict": {"post": _predict(contract, sample, features=features)},
            "/invocations": {"post": _invocations(contract, sample, chat)},
            f"/v1/models/{contract.name}:predict": {"post": _v1(contract, sample)},
            f"/v2/models/{contract.name}/infer": {"post": _v2(contract, sample)},
            **_gets(contract),
        },
        "components": {"schemas": {**_SCHEMAS, "Row": _row(contract), "Params": _params(contract)}},
    }
    if needs.key or needs.certificate:
        _secure(whole, needs)
    return whole


def _secure(whole: Schema, needs: AuthPolicy) -> None:
    """Put into the document how one gets in, and what those are told who don't."""
    certificate = {"certificate": {"type": "mutualTLS"}} if needs.certificate else {}
    keys = {"bearer": {"type": "http", "scheme": "bearer"}, "basic": {"type": "http", "scheme": "basic"}}
    whole["components"]["securitySchemes"] = {**certificate, **(keys if needs.key else {})}
    # Either kind of key, with the certificate if one is needed.
    both: Schema = {name: [] for name in certificate}
    whole["security"] = [{**both, key: []} for key in keys] if needs.key else [both]
    refusals = [status for status, is_needed in ((401, needs.key), (403, needs.certificate)) if is_needed]
    for path, operations in whole["paths"].items():
        for verb, operation in operations.items():
            if path in needs.exempt:
                operation["security"] = []
                continue
            for status in refusals:
                told: Schema = {"description": _REFUSALS[status]}
                if verb == "post":
                    # As the protocol puts all else that goes wrong.
                    told["content"] = {JSON: operation["responses"]["500"]["content"][JSON]}
                operation["responses"][str(status)] = told


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _row(contract: ModelSpec) -> Schema:
    """One row, as Darwin's form has it: an object with this model's columns, or tensors without their first axis."""
    schema = {key: value for key, value in contract.input_schema.json_schema().items() if key != "$schema"}
    return schema or {"description": "The model has no signature: whatever it takes."}


def _params(contract: ModelSpec) -> Schema:
    properties: dict[str, Schema] = {}
    for spec in contract.params.specs:
        kind = contract.params.json_schema(spec["name"])
        properties[spec["name"]] = {**kind, "default": _json(spec.get("default"))}
    if len(contract.methods) > 1:
        properties[METHOD] = {"enum": list(contract.methods), "default": contract.method}
    return {"type": "object", "properties": properties}


def _json(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, type(None))) else str(value)


def _operation(
    summary: str,
    error: str,
    request: Mapping[str, Schema],
    answer: Schema,
    *,
    bad: int = 400,
    also: tuple[int, ...] = (),
) -> Schema:
    failures: Schema = {}
    for status in sorted({bad, *also, *_ERRORS} - ({400} if bad == 422 and 400 not in also else set())):
        failures[str(status)] = {
            "description": _ERRORS.get(status, _ERRORS[400]),
            "content": {JSON: {"schema": _ref(error)}},
        }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": dict(request)},
        "responses": {"200": {"description": "The predictions", "content": {JSON: {"schema": answer}}}, **failures},
    }


def _predict(contract: ModelSpec, sample: Any, *, features: bool) -> Schema:
    rows = {"anyOf": [_ref("Row"), {"type": "array", "items": _ref("Row"), "minItems": 1}]}
    body: Schema = {
        "type": "object",
        "properties": {"features": rows, "params": _ref("Params")},
        "required": ["features"],
    }
    if features:
        stored: Schema = {
            "type": "object",
            "properties": {
                "feature_group": {"type": "string"},
                "ofs_keys": {"type": "object", "minProperties": 1},
                "params": _ref("Params"),
            },
            "required": ["feature_group", "ofs_keys"],
        }
        body = {"oneOf": [body, stored]}
    answer: Schema = {"type": "object", "properties": {"scores": {"type": "array"}}, "required": ["scores"]}
    if contract.method == "predict_proba":
        answer["properties"] |= {"probabilities": {"type": "array"}, "predicted_class": {"type": "array"}}
    content = {JSON: _content(body, None if sample is None else {"features": sample})}
    also = (400, 404, 502) if features else (400,)
    return _operation("Darwin: predictions for one row or several", "DarwinError", content, answer, bad=422, also=also)


def _content(schema: Schema, example: Any) -> Schema:
    """Without an example where there is nothing to make one of."""
    return {"schema": schema} if example is None else {"schema": schema, "example": example}


def _listed(contract: ModelSpec, sample: Any) -> Any:
    """`sample` as rows: what models with type hints take is a list in any case."""
    return sample if isinstance(contract.input_schema, TypeHintSchema) else [sample]


def _invocations(contract: ModelSpec, sample: Any, chat: Any) -> Schema:
    records = {"type": "array", "items": _ref("Row"), "minItems": 1}
    split = {
        "type": "object",
        "properties": {"columns": {"type": "array"}, "index": {"type": "array"}, "data": {"type": "array"}},
        "required": ["data"],
        "additionalProperties": False,
    }
    shapes = {"dataframe_records": records, "dataframe_split": split, "instances": {}, "inputs": {}}
    body = {
        "type": "object",
        "properties": {**shapes, "params": _ref("Params")},
        "anyOf": [{"required": [key]} for key in (*shapes, *CHAT)],
    }
    example: Any = None
    if chat is not None:
        example = chat
    elif sample is not None:
        table = isinstance(sample, dict) and not isinstance(contract.input_schema, TypeHintSchema)
        example = {"dataframe_records": [sample]} if table else {"inputs": _listed(contract, sample)}
    content = {JSON: _content(body, example), CSV: {"schema": {"type": "string"}}}
    content[PARQUET] = {"schema": {"type": "string", "contentEncoding": "binary"}}
    # What comes of a chat body has no name around it.
    answer: Schema = {"type": "object", "required": ["predictions"]} if chat is None else {}
    operation = _operation("MLflow: predictions", "MLflowError", content, answer)
    operation["responses"]["200"]["content"][CSV] = {"schema": {"type": "string"}}
    if contract.streams:
        operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    operation["responses"]["415"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return operation


def _v1(contract: ModelSpec, sample: Any) -> Schema:
    body = {
        "type": "object",
        "properties": {"instances": {}, "inputs": {}, "parameters": _ref("Params")},
        "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
    }
    answer = {"type": "object", "required": ["predictions"]}
    content = {JSON: _content(body, None if sample is None else {"instances": _listed(contract, sample)})}
    return _operation("KServe V1: predictions", "KServeError", content, answer, also=(404,))


def _v2(contract: ModelSpec, sample: Any) -> Schema:
    named = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    body = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "inputs": {"type": "array", "items": _ref("Tensor"), "minItems": 1},
            "outputs": {"type": "array", "items": named},
        },
        "required": ["inputs"],
    }
    answer = {
        "type": "object",
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {"type": "array", "items": _ref("Tensor")},
        },
        "required": ["model_name", "outputs"],
    }
    made = None if sample is None or isinstance(contract.input_schema, TypeHintSchema) else tensors(contract, sample)
    content = {JSON: _content(body, None if made is None else {"inputs": made})}
    return _operation("Open Inference Protocol (KServe V2): inference", "KServeError", content, answer, also=(404,))


def _gets(contract: ModelSpec) -> dict[str, Schema]:
    name = {"name": "string"}
    model = {"versions": "array", "platform": "string", "inputs": "array", "outputs": "array"}
    schema = {"inputs": "array", "outputs": "array", "sample_request": "object", "json_schema": "object"}
    loaded = "Whether the model has loaded"
    return {
        "/schema": _get("The signature, a request that works, and a JSON Schema", schema, "DarwinError", 404),
        "/livez": _get("Whether the process works", {"status": "string"}),
        "/ready": _get("Whether predictions would be answered", {"status": "string"}, "DarwinError"),
        "/healthcheck": _get(loaded, {"status": "string"}, "DarwinError"),
        "/health": _get(loaded, {"status": "string"}, "DarwinError"),
        "/ping": _get(loaded, {}, "MLflowError"),
        "/version": _get("MLflow's version", media_type="text/plain"),
        "/metrics": _get("Figures for Prometheus", media_type="text/plain"),
        "/v1/models": _get("The model's name", {"models": "array"}),
        f"/v1/models/{contract.name}": _get("Whether the model is ready", {**name, "ready": "boolean"}),
        "/v2": _get("The server's name and version", {**name, "version": "string", "extensions": "array"}),
        "/v2/health/live": _get("Whether the process works", {"live": "boolean"}),
        "/v2/health/ready": _get("Whether predictions would be answered", {"ready": "boolean"}, "KServeError"),
        f"/v2/models/{contract.name}": _get(
            "The model's inputs and outputs as tensors", {**name, **model}, "KServeError"
        ),
        f"/v2/models/{contract.name}/ready": _get(
            "Whether the model is ready", {**name, "ready": "boolean"}, "KServeError"
        ),
    }


def _get(
    summary: str, fields: Mapping[str, str] | None = None, error: str = "", absent: int = 0, media_type: str = JSON
) -> Schema:
    """`fields` are those of the answer, an object, with their types; without any, it is empty. `error` words a 503."""
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in (fields or {}).items()}}
    content: Schema = {"schema": {**schema, "required": list(fields)}} if fields else {}
    answers: Schema = {"200": {"description": "yes, or what was asked for", "content": {media_type: content}}}
    failure = {"content": {JSON: {"schema": _ref(error)}}}
    if error:
        answers["503"] = {"description": "not now", **failure}
    if absent:
        answers[str(absent)] = {"description": "the model has no signature", **failure}
    return {"get": {"summary": summary, "responses": answers}}
