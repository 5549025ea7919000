"""The load of a model: from a directory to a `Model`, or the reason why it does not load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darwin_runtime import mlflow_import
from darwin_runtime.errors import RoleError
from darwin_runtime.model import fast_path
from darwin_runtime.model.categories import restore_categories
from darwin_runtime.model.diagnose import explain_failure, list_differences, read_requirements
from darwin_runtime.model.mlmodel import PYFUNC, read_description, read_example
from darwin_runtime.model.model import Model
from darwin_runtime.schema.model_spec import compile_schema
from darwin_runtime.schema.params import ParamSchema

# MLflow then decodes datetimes and bytes for models with type hints.
SERVING = {"_MLFLOW_IS_IN_SERVING_ENVIRONMENT": "true"}

logger = logging.getLogger("darwin.model")


def load_model(directory: Path, model_config: Mapping[str, Any] | None = None, method: str = "") -> Model:
    """Load the model in `directory`, to be asked for `method` rather than what it was logged to answer with.

    Raises `RoleError` naming the file, library, version or method that is in the way.
    """
    description = read_description(directory)
    requirements = read_requirements(directory)
    differences = list_differences(requirements, description["flavors"][PYFUNC].get("python_version"))
    if differences:
        logger.warning("the model was made with other versions: %s", "; ".join(differences))
    mlflow_import.prepare(SERVING)
    try:
        import mlflow.pyfunc

        pyfunc = mlflow.pyfunc.load_model(str(directory), suppress_warnings=True, model_config=model_config or None)
    except (Exception, SystemExit) as error:  # loading runs the flavor's and the model's own code
        raise RoleError(explain_failure(directory, description, requirements, differences, error)) from error
    signature = pyfunc.metadata.signature
    inputs = signature.inputs.to_dict() if signature and signature.inputs else None
    usual = description["flavors"][PYFUNC].get("predict_fn", "predict")
    methods = dict.fromkeys([usual, *fast_path.offered_methods(pyfunc)])
    if method and method not in methods:
        raise RoleError(f"the model in {directory} has no {method}: PREDICT_METHOD may be {', '.join(methods)}")
    input_schema = compile_schema(inputs, from_type_hint=pyfunc.metadata._is_signature_from_type_hint())
    restore_categories(pyfunc, fast_path.raw_model(pyfunc), input_schema)
    return Model(
        directory=directory,
        flavors=tuple(name for name in description["flavors"] if name != PYFUNC) or (PYFUNC,),
        input_schema=input_schema,
        params=ParamSchema(signature.params.to_dict() if signature and signature.params else None),
        outputs=signature.outputs.to_dict() if signature and signature.outputs else (),
        example=read_example(directory, description),
        pyfunc=pyfunc,
        predictors={name: fast_path.pyfunc_predictor(fast_path.with_method(pyfunc, name)) for name in methods},
        method=method or usual,
    )
