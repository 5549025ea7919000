"""What the server tells about its model: Darwin's schema, V2's metadata, the OpenAPI document, and a page for people.

The page is `page.html` with the model's description in it; it needs nothing but the server it came from.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darwin_runtime.http import openapi as openapi_module
from darwin_runtime.http.auth import AuthPolicy
from darwin_runtime.http.samples import Samples
from darwin_runtime.model.about import About
from darwin_runtime.protocols import darwin, open_inference
from darwin_runtime.protocols.base import Reply
from darwin_runtime.protocols.encoding import dump
from darwin_runtime.schema.model_spec import ModelSpec
from darwin_runtime.schema.signature import Spec, describe
from darwin_runtime.schema.tabular import TabularSchema, TypeHintSchema

if TYPE_CHECKING:
    from darwin_runtime.schema.rows import Rows

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Documents:
    """Answers made once. Each is what its name says; `openapi` depends on where the server is shown."""

    schema: Reply
    v2: Reply
    page: Reply
    _contract: ModelSpec
    _samples: Samples
    _about: About
    _version: str
    _features: bool
    _policy: AuthPolicy

    @classmethod
    def of(
        cls,
        contract: ModelSpec,
        example: Rows | None,
        about: About,
        version: str,
        *,
        features: bool,
        policy: AuthPolicy,
    ) -> Documents:
        """For the model that `contract` and `about` describe, on the server's `version`; `example` is its own input.

        `features` tells whether there is a feature store to ask, `policy` what requests need.
        """
        samples = Samples.of(contract, example, about.chat)
        flavor = about.flavors[0] if about.flavors else "pyfunc"
        return cls(
            darwin.schema(contract, samples.features),
            open_inference.model_metadata(contract, flavor),
            _page(contract, samples, about, version, policy),
            contract,
            samples,
            about,
            version,
            features,
            policy,
        )

    def openapi(self, root_path: str) -> Reply:
        document = openapi_module.document(
            self._contract,
            self._samples,
            title=self._contract.name,
            description=" ".join(filter(None, (", ".join(self._about.flavors), self._about.uri))),
            version=self._contract.version or self._version,
            root_path=root_path,
            features=self._features,
            policy=self._policy,
        )
        return Reply(200, dump(document))


@functools.cache
def _template() -> tuple[str, str]:
    """The page, and the policy by which a browser runs nothing but what is in it."""
    text = PAGE.read_text(encoding="utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    policy = (
        f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _page(contract: ModelSpec, samples: Samples, about: About, version: str, policy: AuthPolicy) -> Reply:
    plan = contract.input_schema
    columns = isinstance(plan, TabularSchema) and not isinstance(plan, TypeHintSchema) and plan.named
    told = {
        "Model URI": about.uri,
        "Registered as": " version ".join(filter(None, (about.registered_name, about.version))),
        "Run": about.run_id,
        "Logged at": about.logged_at,
        "Flavor": ", ".join(about.flavors),
        "MLflow": about.mlflow_version,
        "Size": about.size,
        "Answers with": ", ".join(contract.methods),
        "How": about.predicts,
        "Server": f"Darwin Serve Runtime {version}",
    }
    name = contract.name
    page = {
        "name": name,
        "version": contract.version,
        "uri": about.uri,
        "flavors": about.flavors,
        "about": list(told.items()),
        "columns": [_field(c) for c in plan.inputs] if columns and not samples.is_chat else None,
        "sample": samples.invocations if samples.is_chat else samples.features,
        "chat": samples.is_chat,
        "params": [_param(spec) for spec in contract.params.specs],
        "methods": contract.methods,
        "method": contract.method,
        "signature": [*_signature("input", contract.input_schema.specs), *_signature("output", contract.outputs)],
        "files": about.files,
        "key": policy.key,
        "certificate": policy.certificate,
        "routes": [
            ("Darwin", "POST /predict, GET /schema"),
            ("MLflow", "POST /invocations, GET /ping, GET /version"),
            ("KServe V1", f"POST /v1/models/{name}:predict, GET /v1/models/{name}"),
            ("Open Inference Protocol (V2)", f"POST /v2/models/{name}/infer, GET /v2/models/{name}"),
            ("Probes", "GET /livez, GET /ready"),
            ("Prometheus", "GET /metrics"),
        ],
    }
    text, content_policy = _template()
    # Nothing in it may end the element that it is in.
    described = dump(page).decode().replace("<", "\\u003c")
    body = text.replace("{{MODEL}}", described).encode()
    headers = {"Content-Security-Policy": content_policy, "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
    return Reply(200, body, "text/html; charset=utf-8", tuple(headers.items()))


def _field(spec: Spec) -> dict[str, Any]:
    return {"name": str(spec["name"]), "type": spec["type"], "required": spec.get("required", True)}


def _param(spec: Spec) -> dict[str, Any]:
    kind = spec["type"] if spec.get("shape") is None else f"list of {spec['type']}"
    return {"name": spec["name"], "type": kind, "default": spec.get("default")}


def _signature(side: str, specs: Sequence[Spec]) -> list[tuple[str, str, str, str]]:
    described = describe(specs)
    return [(side, each["name"], _type(each), "yes" if each["required"] else "no") for each in described]


def _type(described: Spec) -> str:
    if described["type"] == "tensor":
        return f"{described['dtype']} {described['shape']}"
    return str(described["type"])
