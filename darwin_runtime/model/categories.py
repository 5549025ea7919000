"""Pandas categories in models of LightGBM and XGBoost: a signature has their values, so a table comes without them.

MLflow's own server hands over the bare values, and both libraries raise. The booster says which columns were
categories, and numbers the values of new ones itself.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from darwin_runtime.errors import InputRejected
from darwin_runtime.schema.model_spec import InputSchema
from darwin_runtime.schema.tabular import TabularSchema

_UNKNOWN = re.compile(r"category not in the training set for the (\d+)\w* \(0-based\) column: `(.*?)`", re.DOTALL)

# The types of columns that categories of these Python types have in a signature.
COLUMN_TYPES: dict[type, tuple[str, ...]] = {
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "long"),
    float: ("float", "double"),
}


@dataclass(frozen=True)
class CategoryPredict:
    """`predict` of a model whose columns at `positions` were categories when it was trained."""

    predict: Callable[..., Any]
    positions: Sequence[int]

    def __call__(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        try:
            return self.predict(self.cast(data), params=params)
        except Exception as error:
            # XGBoost raises for a new category, LightGBM takes it for a missing value.
            if found := _UNKNOWN.search(str(error)):
                name = data.columns[int(found[1])] if isinstance(data, pd.DataFrame) else found[1]
                raise InputRejected(f"column {name!r}: the model knows no category {found[2]:.100}") from error
            raise

    def cast(self, data: Any) -> Any:
        """`data` with categories, if it is a table."""
        if not isinstance(data, pd.DataFrame):
            return data
        names = [data.columns[position] for position in self.positions]
        table = data.astype(dict.fromkeys(names, "category"))
        for name in names:
            if not len(table[name].cat.categories):  # XGBoost raises where there is none at all
                table[name] = table[name].cat.add_categories([""])
        return table


def restore_categories(pyfunc: Any, model: Any, plan: InputSchema) -> None:
    """Have `pyfunc`, whose flavor's own model is `model`, turn columns into categories, if it was trained on such."""
    roots = [base.__module__.partition(".")[0] for base in type(model).__mro__]
    library = next((root for root in roots if root in ("lightgbm", "xgboost")), "")
    types = [column.datatype.name for column in plan.columns] if isinstance(plan, TabularSchema) else None
    if library == "lightgbm":
        positions = _of_lightgbm(getattr(model, "booster_", model), types)
    elif library == "xgboost":
        positions = _of_xgboost(model.get_booster() if hasattr(model, "get_booster") else model)
    else:
        return
    if positions and (types is None or max(positions) < len(types)):
        booster = library == "xgboost" and not hasattr(model, "get_booster")
        predict = functools.partial(_predict_booster, model) if booster else pyfunc._predict_fn
        pyfunc._predict_fn = CategoryPredict(predict, positions)


def _of_lightgbm(booster: Any, types: Sequence[str] | None) -> list[int]:
    """The positions of the columns that were categories. LightGBM keeps their values, in order, but not their names."""
    kept = getattr(booster, "pandas_categorical", None)
    if not kept:
        return []
    # These are also integers that the user called categories, but not categories that have an order.
    found = re.search(r"^\[categorical_feature: ([\d,]+)\]$", booster.model_to_string(num_iteration=1), re.MULTILINE)
    told = set(map(int, found[1].split(","))) if found else set()
    texts = {position for position, name in enumerate(types or ()) if name == "string"}
    for positions in (sorted(told | texts), sorted(texts)):
        if len(positions) == len(kept) and (types is None or _fit(kept, [types[at : at + 1] for at in positions])):
            return positions
    return []


def _fit(categories: Sequence[Sequence[Any]], types: Sequence[Sequence[str]]) -> bool:
    pairs = zip(categories, types, strict=True)
    return all(set(names) & set(COLUMN_TYPES.get(type(value), ())) for values, names in pairs for value in values)


def _of_xgboost(booster: Any) -> list[int]:
    """The positions of the columns that were categories. Before 3.1, XGBoost kept none of their values."""
    kept = getattr(booster, "get_categories", None)
    if kept is None or kept().empty():
        return []
    return [position for position, kind in enumerate(booster.feature_types or ()) if kind == "c"]


def _predict_booster(booster: Any, data: Any, params: Mapping[str, Any] | None = None) -> Any:
    """As MLflow does, with categories allowed."""
    import xgboost

    taken = inspect.signature(booster.predict).parameters
    given = {name: value for name, value in (params or {}).items() if name in taken}
    return booster.predict(xgboost.DMatrix(data, enable_categorical=True), **{"validate_features": True, **given})
