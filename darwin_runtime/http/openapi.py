"""The OpenAPI 3.1 document of a model: `openapi.json`, filled in from the model's signature.

Source: https://spec.openapis.org/oas/v3.1.0.html. In the file, `{name}` in a path stands for the model's name, and the
name of a schema as a response stands for an error in that form, which `x-errors` describes by its status.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from darwin_runtime.http.auth import AuthPolicy
from darwin_runtime.http.samples import Samples
from darwin_runtime.protocols.base import JSON, METHOD
from darwin_runtime.schema.model_spec import ModelSpec

Schema = dict[str, Any]

SKELETON = Path(__file__).with_name("openapi.json")


def document(
    contract: ModelSpec,
    samples: Samples,
    *,
    title: str,
    description: str,
    version: str,
    root_path: str,
    features: bool,
    policy: AuthPolicy,
) -> Schema:
    """The document, with `samples` as examples.

    `features` tells whether a feature store is there to ask, and `policy` what requests need.
    """
    whole: Schema = json.loads(_skeleton())
    errors = whole.pop("x-errors")
    whole["info"] = {"title": title, "description": description, "version": version}
    whole["servers"] = [{"url": root_path or "/"}]
    whole["paths"] = paths = {path.replace("{name}", contract.name): each for path, each in whole["paths"].items()}
    for operations in paths.values():
        for verb, operation in operations.items():
            _describe_errors(operation["responses"], errors[verb])
    _fill_predict(paths["/predict"]["post"], contract, features=features)
    _fill_invocations(paths["/invocations"]["post"], contract, samples)
    examples = {
        "/predict": samples.predict,
        "/invocations": samples.invocations,
        f"/v1/models/{contract.name}:predict": samples.v1,
        f"/v2/models/{contract.name}/infer": samples.v2,
    }
    for path, example in examples.items():
        if example is not None:
            paths[path]["post"]["requestBody"]["content"][JSON]["example"] = example
    whole["components"]["schemas"] |= {"Row": _row(contract), "Params": _params(contract)}
    _secure(whole, policy, errors["refusals"])
    return whole


@functools.cache
def _skeleton() -> str:
    return SKELETON.read_text(encoding="utf-8")


def _describe_errors(responses: Schema, descriptions: dict[str, str]) -> None:
    for status, form in responses.items():
        if isinstance(form, str):
            content = {JSON: {"schema": {"$ref": f"#/components/schemas/{form}"}}}
            responses[status] = {"description": descriptions[status], "content": content}


def _fill_predict(operation: Schema, contract: ModelSpec, *, features: bool) -> None:
    body, responses = operation["requestBody"]["content"][JSON], operation["responses"]
    if not features:
        body["schema"], _by_key = body["schema"]["oneOf"]
        del responses["404"], responses["502"]
    if contract.method != "predict_proba":
        answer = responses["200"]["content"][JSON]["schema"]["properties"]
        del answer["probabilities"], answer["predicted_class"]


def _fill_invocations(operation: Schema, contract: ModelSpec, samples: Samples) -> None:
    answers = operation["responses"]["200"]["content"]
    if not contract.streams:
        del answers["text/event-stream"]
    if samples.is_chat:
        # What comes of a chat body has no name around it.
        answers[JSON]["schema"] = {}


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


def _secure(whole: Schema, policy: AuthPolicy, descriptions: dict[str, str]) -> None:
    """Keep of the security schemes those that `policy` needs, and add the answers to requests without."""
    schemes = whole["components"].pop("securitySchemes")
    certificate = ["certificate"] if policy.certificate else []
    keys = [name for name in schemes if name != "certificate"] if policy.key else []
    if not certificate and not keys:
        return
    whole["components"]["securitySchemes"] = {name: schemes[name] for name in (*certificate, *keys)}
    # Either kind of key, with the certificate if one is needed.
    alternatives = [[*certificate, key] for key in keys] or [certificate]
    whole["security"] = [{name: [] for name in names} for names in alternatives]
    refusals = [status for status, is_needed in (("401", policy.key), ("403", policy.certificate)) if is_needed]
    for path, operations in whole["paths"].items():
        for verb, operation in operations.items():
            if path in policy.exempt:
                operation["security"] = []
                continue
            for status in refusals:
                refusal: Schema = {"description": descriptions[status]}
                if verb == "post":
                    # As the protocol puts all else that goes wrong.
                    refusal["content"] = {JSON: operation["responses"]["500"]["content"][JSON]}
                operation["responses"][status] = refusal
