"""Real MLflow models of every kind of signature, each built once a test run: `model_path("iris")`."""

# MLflow takes type hints for a signature, so its models here have none.
# mypy: disable-error-code="no-untyped-def, misc, import-untyped"

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import sklearn
from sklearn.datasets import load_diabetes, load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression

from tests.support import answers, shared

with warnings.catch_warnings():
    # MLflow warns of its own type hints.
    warnings.simplefilter("ignore")
    import mlflow.pyfunc
    import mlflow.sklearn
    from mlflow.models import ModelSignature, infer_signature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType, Array, Map, Object, Property

# The server does not have this module: what is pickled brings its code along.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Echo:
    """Answers with the table it was given."""

    def predict(self, context, model_input, params=None):
        return model_input


class Dtypes:
    """Answers with how the model sees its input: names, dtypes, and the values as text."""

    def predict(self, context, model_input, params=None):
        if hasattr(model_input, "dtypes") and hasattr(model_input, "columns"):
            return [f"{name}:{model_input[name].dtype}:{model_input[name].tolist()!r}" for name in model_input.columns]
        if isinstance(model_input, dict):
            return [f"{name}:{part.dtype}:{part.tolist()!r}" for name, part in model_input.items()]
        return [f"{type(model_input).__name__}:{getattr(model_input, 'dtype', '')}:{model_input!r}"]


class Scaled:
    """Uses all its parameters."""

    def predict(self, context, model_input, params=None):
        given = {name: repr(value) for name, value in sorted((params or {}).items())}
        return [{"sum": float(row), **given} for row in model_input.sum(axis=1)]


class Totals:
    """Named tensors to one named tensor per row."""

    def predict(self, context, model_input, params=None):
        image, weight = model_input["image"], model_input["weight"]
        return {"total": image.reshape(len(image), -1).sum(axis=1) * weight[:, 0]}


class Answers:
    """Answers in the form that its input asks for."""

    def predict(self, context, model_input, params=None):
        forms: dict[str, Callable[[], Any]] = {
            "series": lambda: pd.Series([1.5, float("nan")], name="y"),
            "nameless": lambda: pd.Series([1.5, 2.5]),
            "frame": lambda: pd.DataFrame({"a": [1, 2], 3: ["x", None]}),
            "float32": lambda: np.array([0.1, 0.2], dtype=np.float32),
            "infinite": lambda: np.array([[np.nan, np.inf], [-np.inf, 1.0]]),
            "times": lambda: pd.DataFrame({"t": pd.to_datetime(["2024-01-31T12:00:00.000000001", "NaT"])}),
            "time_array": lambda: np.array(["2024-01-31T12:00:00.5", "NaT"], dtype="datetime64[ns]"),
            "bytes": lambda: [b"\x00\xff"],
            "mixed": lambda: [{"n": np.int64(3), "x": np.float32(0.5), "a": np.arange(2), "none": pd.NA}],
            "huge": lambda: [2**70],
            "surrogate": lambda: ["\ud800"],
            "scalar": lambda: np.float64(2.5),
            "text": lambda: "hello",
            "dict": lambda: {"a": np.array([1, 2])},
            "sparse": _sparse,
            "unwritable": lambda: [object()],
            "raise": _raise,
            "exit": lambda: sys.exit(3),
            "panic": _panic,
            "attribute": lambda: model_input.no_such_column,
            "dataclass": lambda: Answer(1.5),
        }
        return forms[model_input["form"].iloc[0]]()


def _sparse() -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix([[0, 1], [2, 0]])


@dataclass
class Answer:
    score: float


class Panic(BaseException):
    """What extensions written in Rust raise is no Exception."""


def _panic() -> Any:
    raise Panic("in another language")


def _raise() -> Any:
    raise RuntimeError("the model is out of sorts")


class Hinted(mlflow.pyfunc.PythonModel):
    """Its signature comes from its type hints."""

    def predict(self, model_input: list[dict[str, int]]) -> list[int]:
        return [sum(row.values()) for row in model_input]


class Waiting:
    """Makes the file its input names in `entered`, then blocks until the one in `leave` is there."""

    def predict(self, context, model_input, params=None):
        Path(model_input["entered"].iloc[0]).touch()
        while not Path(model_input["leave"].iloc[0]).exists():
            time.sleep(0.01)
        return ["done"]


class Broken:
    """Loads, but can't predict."""

    def predict(self, context, model_input, params=None):
        raise RuntimeError("this model never works")


class SlowToLoad:
    """Blocks while loading until the file its configuration names in `leave` is there; makes the one in `entered`."""

    def load_context(self, context: Any) -> None:
        Path(context.model_config["entered"]).touch()
        while not Path(context.model_config["leave"]).exists():
            time.sleep(0.01)

    def predict(self, context, model_input, params=None):
        return [context.model_config["leave"]]


class Chatting:
    """Answers with what it was sent; piece by piece, a word at a time, and stops where its input says."""

    def predict(self, context, model_input, params=None):
        return {"given": model_input, "params": params}

    def predict_stream(self, context, model_input, params=None):
        left = Path(model_input["left"]) if "left" in model_input else None
        try:
            for number, word in enumerate(model_input["prompt"].split()):
                if word == "raise":
                    raise RuntimeError("out of words")
                yield {"word": object() if word == "object" else word, "number": number}
            while left:
                yield {"word": "more " * 10_000}
                time.sleep(0.001)
        finally:
            if left:
                left.touch()


def _completion(path: Path) -> None:
    from mlflow.types.llm import ChatCompletionResponse

    class Agent(mlflow.pyfunc.ChatModel):
        def predict(self, context: Any, messages: Any, params: Any = None) -> ChatCompletionResponse:
            text = f"{messages[-1].content} at {params.temperature}"
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return ChatCompletionResponse.from_dict({"choices": [choice], "model": "echo", "created": 1})

    mlflow.pyfunc.save_model(path, python_model=Agent(), **REQUIREMENTS)


def _chat_agent(path: Path) -> None:
    from mlflow.types.agent import ChatAgentResponse

    class Agent(mlflow.pyfunc.ChatAgent):
        def predict(self, messages: Any, context: Any = None, custom_inputs: Any = None) -> ChatAgentResponse:
            return ChatAgentResponse(messages=[{"role": "assistant", "content": messages[-1].content, "id": "1"}])

    mlflow.pyfunc.save_model(path, python_model=Agent(), **REQUIREMENTS)


def _responses_agent(path: Path) -> None:
    from mlflow.types.responses import ResponsesAgentResponse, ResponsesAgentStreamEvent

    class Agent(mlflow.pyfunc.ResponsesAgent):
        def predict(self, request: Any) -> ResponsesAgentResponse:
            return ResponsesAgentResponse(output=[self.create_text_output_item(text="grün", id="1")])

        def predict_stream(self, request: Any) -> Any:
            yield ResponsesAgentStreamEvent(**self.create_text_delta(delta="✅ grün", item_id="1"))

    mlflow.pyfunc.save_model(path, python_model=Agent(), **REQUIREMENTS)


IRIS = {"sepal length (cm)": 6.1, "sepal width (cm)": 2.8, "petal length (cm)": 4.7, "petal width (cm)": 1.2}

TYPED_COLUMNS = [
    ColSpec("boolean", "flag"),
    ColSpec("integer", "small"),
    ColSpec("long", "big"),
    ColSpec("float", "single"),
    ColSpec("double", "double"),
    ColSpec("string", "text"),
    ColSpec("binary", "blob"),
    ColSpec("datetime", "when"),
]

TYPED_ROW = {
    "flag": True,
    "small": 7,
    "big": 2**53 + 1,
    "single": 0.1,
    "double": 1e300,
    "text": "grün",
    "blob": "AP8=",
    "when": "2024-02-29T23:59:59.123456789",
}

TYPED_TABLE = pd.DataFrame(
    {
        "flag": [True],
        "small": np.array([7], dtype=np.int32),
        "big": [2**53 + 1],
        "single": np.array([0.1], dtype=np.float32),
        "double": [1e300],
        "text": ["grün"],
        "blob": [b"\0\xff"],
        "when": pd.to_datetime(["2024-02-29T23:59:59.123456789"]),
    }
)

NESTED_COLUMNS = [
    ColSpec(Array(DataType.double), "numbers"),
    ColSpec(Array(Array(DataType.long)), "grid"),
    ColSpec(Object([Property("id", DataType.long), Property("note", DataType.string, required=False)]), "item"),
    ColSpec(Map(DataType.double), "scores"),
    ColSpec(AnyType(), "extra", required=False),
]

NESTED_ROW = {
    "numbers": [1.5, 2.0],
    "grid": [[1, 2], [3, 4]],
    "item": {"id": 3, "note": "x"},
    "scores": {"a": 0.5},
    "extra": [1, "two", None],
}

PARAMS = [
    ParamSpec("factor", "double", 2.0),
    ParamSpec("count", "long", 3),
    ParamSpec("mode", "string", "fast"),
    ParamSpec("strict", "boolean", False),
    ParamSpec("since", "datetime", np.datetime64("2024-01-01T00:00:00")),
    ParamSpec("weights", "double", [1.0, 2.0], shape=(-1,)),
]


# Working them out by itself takes MLflow seconds.
REQUIREMENTS: dict[str, Any] = {"pip_requirements": ["mlflow", f"scikit-learn=={sklearn.__version__}"]}


BASE = mlflow.pyfunc.PythonModel

ONE_ANSWER = pd.DataFrame({"name": ["float"]})


def _signature(columns: list[Any], params: list[ParamSpec] | None = None) -> ModelSignature:
    return ModelSignature(inputs=Schema(columns), params=ParamSchema(params) if params else None)


def _python(kind: type, columns: list[Any] | None, **options: Any) -> Callable[[Path], None]:
    if columns:
        options["signature"] = _signature(columns, options.pop("params", None))

    def build(path: Path) -> None:
        # MLflow complains of a class without type hints as soon as there is one.
        python = kind if issubclass(kind, mlflow.pyfunc.PythonModel) else type(kind.__name__, (kind, BASE), {})
        mlflow.pyfunc.save_model(path, python_model=python(), **REQUIREMENTS, **options)

    return build


def iris_table() -> tuple[pd.DataFrame, Any]:
    data = load_iris(as_frame=True)
    return data.data, data.target


def _iris(path: Path) -> None:
    features, target = iris_table()
    model = LogisticRegression(max_iter=200).fit(features, target)
    signature = infer_signature(features, model.predict(features))
    mlflow.sklearn.save_model(model, path, signature=signature, input_example=features.head(3), **REQUIREMENTS)


def _matrix(path: Path) -> None:
    features, target = load_diabetes(return_X_y=True)
    mlflow.sklearn.save_model(
        LinearRegression().fit(features, target), path, input_example=features[:2], **REQUIREMENTS
    )


def _no_signature(path: Path) -> None:
    features, target = load_iris(return_X_y=True)
    mlflow.sklearn.save_model(LogisticRegression(max_iter=200).fit(features, target), path, **REQUIREMENTS)


def _optional_types() -> list[ColSpec]:
    needed = [ColSpec("double", "x")]
    names = ("boolean", "integer", "long", "float", "double", "string", "binary", "datetime")
    return needed + [ColSpec(name, f"maybe_{name}", required=False) for name in names]


BUILDERS: dict[str, Callable[[Path], None]] = {
    "iris": _iris,
    "matrix": _matrix,
    "no_signature": _no_signature,
    "typed": _python(Dtypes, TYPED_COLUMNS),
    "typed_echo": _python(Echo, TYPED_COLUMNS),
    "untyped_echo": _python(Echo, None),
    "optional": _python(Dtypes, _optional_types()),
    "nested": _python(Dtypes, NESTED_COLUMNS),
    "unnamed": _python(Dtypes, [ColSpec("long"), ColSpec("string")]),
    "numbered": _python(Dtypes, [ColSpec("long", 0), ColSpec("double", 1)]),
    "one_column": _python(Dtypes, [ColSpec("string", "text")]),
    "params": _python(Scaled, [ColSpec("double", "a"), ColSpec("double", "b")], params=PARAMS),
    "tensors": _python(
        Totals,
        [TensorSpec(np.dtype("float32"), (-1, 2, 2), "image"), TensorSpec(np.dtype("int64"), (-1, 1), "weight")],
        input_example={
            "image": np.ones((1, 2, 2), dtype=np.float32),
            "weight": np.array([[3]], dtype=np.int64),
        },
    ),
    "any_length": _python(Dtypes, [TensorSpec(np.dtype("int32"), (-1, -1))]),
    "words": _python(Dtypes, [TensorSpec(np.dtype("str"), (-1, 2))]),
    "answers": _python(Answers, [ColSpec("string", "form")]),
    "untyped_answers": _python(Answers, None),
    "every_answer": _python(answers.Answers, [ColSpec("string", "name")], input_example=ONE_ANSWER),
    "untyped": _python(Dtypes, None),
    "hinted": _python(Hinted, None, input_example=[{"a": 1, "b": 2}]),
    "waiting": _python(Waiting, [ColSpec("string", "entered"), ColSpec("string", "leave")]),
    "broken": lambda path: _broken(path),
    "chatting": _python(Chatting, None, streamable=True),
    "completion": lambda path: _completion(path),
    "chat_agent": lambda path: _chat_agent(path),
    "responses_agent": lambda path: _responses_agent(path),
    "typed_example": _python(Dtypes, TYPED_COLUMNS, input_example=TYPED_TABLE),
    "fixed_tensor": _python(Dtypes, [TensorSpec(np.dtype("float64"), (2, 3))]),
    "fixed_tensors": _python(
        Dtypes, [TensorSpec(np.dtype("float64"), (2, 3), "a"), TensorSpec(np.dtype("int64"), (2,), "b")]
    ),
    "unnamed_texts": _python(Dtypes, [ColSpec("string"), ColSpec("binary"), ColSpec("datetime")]),
    "defaults": _python(Scaled, [ColSpec("double", "a")], params=PARAMS, input_example=pd.DataFrame({"a": [1.5]})),
    "slow_to_load": _python(SlowToLoad, [ColSpec("double", "x")], model_config={"entered": "", "leave": ""}),
}


def _broken(path: Path) -> None:
    _python(Broken, [ColSpec("double", "x")], input_example=pd.DataFrame({"x": [1.0]}))(path)


@functools.cache
def model_path(name: str) -> Path:
    """The directory of the model `name`; don't write to it."""
    return shared.once(f"models/{name}", lambda path: save(BUILDERS[name], path))


def save(build: Callable[[Path], object], path: Path) -> Path:
    """`path`, after `build` saved a model there. What MLflow warns of while saving is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(path)
    return path


def save_estimator(model: Any, path: Path, features: pd.DataFrame) -> Path:
    """Save as MLflow does unless told otherwise; with cloudpickle if skops does not trust a type in the model."""
    options: dict[str, Any] = {"signature": infer_signature(features, model.predict(features)), **REQUIREMENTS}
    try:
        return save(lambda at: mlflow.sklearn.save_model(model, at, **options), path)
    except mlflow.exceptions.MlflowException as error:
        if "skops" not in str(error):
            raise
    options["serialization_format"] = "cloudpickle"
    return save(lambda at: mlflow.sklearn.save_model(model, at, **options), path.with_name("pickled"))


def load_pyfunc(path: Path) -> Any:
    """The model as MLflow itself loads it."""
    return mlflow.pyfunc.load_model(str(path), suppress_warnings=True)


def scoring_app(path: Path) -> Any:
    """MLflow's own scoring server for the model, an ASGI application."""
    from mlflow.pyfunc import scoring_server

    return scoring_server.init(load_pyfunc(path))
