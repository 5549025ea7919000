"""Look-ups in Darwin's feature store, for the form of /predict that names a feature group and keys instead of values.

Two calls, over pooled connections: `GET {OFS_ADMIN_URL}/feature-group/schema?name=` tells the columns of a group, and
`GET {FEATURE_STORE_URL}/feature-group/read-features`, with a JSON body, the values for a key. Source: Darwin's runtime.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.util import Retry

from darwin_runtime.errors import DeadlineExceeded, FeatureStoreError, Overloaded

T = TypeVar("T")

# Look-ups under way at once; each occupies a thread and a connection. As many again may wait for one.
LOOKUPS = 32
TIMEOUT_SECONDS = (2.0, 5.0)  # to connect, and between two parts of the answer
ANSWER_SECONDS = 10.0
ANSWER_BYTES = 16 * 1024 * 1024
# Of both calls, which only read.
RETRIES = Retry(
    total=2,
    backoff_factor=0.1,
    status_forcelist=(502, 503, 504),
    allowed_methods=("GET",),
    raise_on_status=False,
    respect_retry_after_header=False,
)
# A group's columns hardly ever change, and every look-up needs them.
SCHEMA_SECONDS = 60.0


class FeatureStore:
    """`features` may be called from any thread, `run` has it called off the event loop, to which it belongs."""

    def __init__(self, store_url: str, admin_url: str) -> None:
        self._read_url = f"{store_url.rstrip('/')}/feature-group/read-features"
        self._schema_url = f"{admin_url.rstrip('/')}/feature-group/schema"
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="features")
        self._under_way = 0
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=LOOKUPS, max_retries=RETRIES))
        self._schemas: dict[str, tuple[float, list[str]]] = {}
        self._lock = threading.Lock()

    async def run(self, job: Callable[[], T], timeout: float) -> T:
        """What `job` returns, on a thread.

        Raises what `job` does, `Overloaded`, and `DeadlineExceeded` after `timeout` seconds.
        """
        if self._under_way >= 2 * LOOKUPS:
            raise Overloaded(1)
        self._under_way += 1
        done = asyncio.get_running_loop().run_in_executor(self._threads, job)
        done.add_done_callback(self._ended)
        try:
            return await asyncio.wait_for(asyncio.shield(done), timeout)
        except (TimeoutError, asyncio.TimeoutError):
            raise DeadlineExceeded(f"the feature store gave no features within {timeout:g} seconds") from None

    def _ended(self, done: asyncio.Future[Any]) -> None:
        self._under_way -= 1
        if not done.cancelled():
            done.exception()  # it has been told, or nobody waits for it any more

    def close(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def features(self, group: str, keys: Mapping[str, Any], trace: Mapping[str, str]) -> dict[str, Any]:
        """The values of the group's columns for `keys`, and those; `trace` are headers that say on whose behalf.

        Raises `FeatureStoreError`: 404 for an unknown group or key, 504 for a slow store, 502 for one that fails.
        """
        columns = [column for column in self._columns(group, trace) if column not in keys]
        body = {
            "featureGroupName": group,
            "featureColumns": columns,
            "primaryKeys": {"names": list(keys), "values": [list(keys.values())]},
        }
        answer = self._ask(self._read_url, f"features of group {group[:100]!r}", trace, json=body)
        found = _at(answer, "data", "successfulKeys")
        if not isinstance(found, list):
            raise FeatureStoreError(502, f"the feature store's answer has no keys of feature group {group[:100]!r}")
        if not found:
            raise FeatureStoreError(
                404, f"feature group {group[:100]!r} has no features for the key {str(dict(keys))[:200]}"
            )
        values = _at(found, 0, "features")
        if not isinstance(values, list) or len(values) != len(columns):
            raise FeatureStoreError(
                502, f"the feature store answered for group {group[:100]!r} with other than {len(columns)} values"
            )
        return {**dict(zip(columns, values, strict=True)), **keys}

    def _columns(self, group: str, trace: Mapping[str, str]) -> list[str]:
        with self._lock:
            told_at, columns = self._schemas.get(group, (0.0, []))
        if columns and time.monotonic() - told_at < SCHEMA_SECONDS:
            return columns
        answer = self._ask(
            self._schema_url, f"the schema of feature group {group[:100]!r}", trace, params={"name": group}
        )
        schema = _at(answer, "data", "schema") or _at(answer, "body", "data", "schema")
        names = [_at(column, "name") for column in schema] if isinstance(schema, list) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise FeatureStoreError(502, f"the feature store's answer has no schema of feature group {group[:100]!r}")
        with self._lock:
            if len(self._schemas) > 1000:  # whoever asks can name any group
                self._schemas.clear()
            self._schemas[group] = time.monotonic(), names
        return names

    def _ask(self, url: str, what: str, trace: Mapping[str, str], **options: Any) -> Any:
        slow = FeatureStoreError(504, f"the feature store did not answer in time for {what}")
        headers = {**trace, "Content-Type": "application/json"}
        options = {"timeout": TIMEOUT_SECONDS, "headers": headers, "allow_redirects": False, "stream": True, **options}
        try:
            with self._session.get(url, **options) as answer:
                status, body = answer.status_code, _body(answer, slow)
        except (requests.Timeout, ReadTimeoutError) as error:
            raise slow from error
        except (requests.RequestException, HTTPError) as error:
            if "timed out" in str(error):
                raise slow from error
            raise FeatureStoreError(502, f"the feature store cannot be reached for {what}") from error
        if status == 404:
            raise FeatureStoreError(404, f"the feature store does not know {what}")
        if status != 200:
            raise FeatureStoreError(502, f"the feature store answered {status} for {what}")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise FeatureStoreError(502, f"the feature store's answer is not JSON for {what}") from error


def _body(answer: requests.Response, slow: FeatureStoreError) -> bytes:
    """All of it, within time and measure: requests itself only looks at the time between two parts."""
    end, parts = time.monotonic() + ANSWER_SECONDS, []
    while part := answer.raw.read1(65536, decode_content=True):
        parts.append(part)
        if time.monotonic() > end or len(parts) > ANSWER_BYTES // 65536 * 8:
            raise slow
    return b"".join(parts)


def _at(value: Any, *path: str | int) -> Any:
    """What is at `path` in nested objects and lists; None if that leads nowhere."""
    for step in path:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None
        else:
            value = value[step] if isinstance(value, list) and len(value) > step else None
    return value
