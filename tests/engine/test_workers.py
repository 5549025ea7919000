"""The supervisor on a toy server, and the role with several workers: real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from darwin_runtime import resources
from darwin_runtime.http.settings import Settings
from darwin_runtime.settings import Reader
from tests.conftest import ROOT, clean_environ, run_role, wait_until
from tests.support import prepared
from tests.support.models import BASE, REQUIREMENTS, iris_table, model_path, save
from tests.support.servers import Served, serving

# A server that answers each connection with one line: who it is, and the process id.
TOY = """
import logging, os, signal, socket, sqlite3, sys, threading, time
from pathlib import Path
from darwin_runtime.engine import workers
from darwin_runtime.engine.processes import run_worker, signal_socket
from darwin_runtime.errors import RoleError

for name, value in [setting.split("=") for setting in sys.argv[2].split()]:
    setattr(workers, name, float(value))
logging.basicConfig(level="INFO", stream=sys.stderr, format="%(levelname)s %(message)s")
kind, home = sys.argv[1], Path(sys.argv[3])

def answer(listener, who):
    listener.settimeout(None)
    while True:
        client, _ = listener.accept()
        with client:
            client.sendall(f"{who} {os.getpid()}".encode())

def load():
    loads = len(list(home.glob("loaded-*")))
    (home / f"loaded-{os.getpid()}-{loads}").touch()
    if kind == "does not load":
        raise RoleError("nothing to load")
    if kind == "crashes while loading":
        raise ValueError("no such thing")
    if kind == "slow":
        while not (home / "go").exists():
            time.sleep(0.01)
    if kind == "no room":
        fork, refusals = os.fork, [OSError(11, "Resource temporarily unavailable")] * 3
        def refuse():
            if refusals:
                raise refusals.pop()
            return fork()
        os.fork = refuse
    if kind == "threads":
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    if kind == "file":
        return open(home / "toy.py")
    if kind == "connection":
        return socket.create_connection(listener.getsockname())
    # Both are for the thread that made them.
    lock, connection = threading.RLock(), sqlite3.connect(":memory:")
    lock.acquire()
    return lock, connection

def work(loaded, number, ready):
    if kind == "hangs in a fork":
        loaded[0].acquire()
    if kind == "fails in a fork":
        loaded[1].cursor()
    if kind == "never works":
        raise RoleError("it never works")
    if kind == "breaks":
        raise ValueError("it is broken")
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "later ones die" and (home / "one").exists():
        os.abort()
    (home / "one").touch()
    ready()
    if kind == "does not end":
        signal.signal(signal.SIGTERM, lambda *_: None)
    if kind == "ends by itself":
        return
    answer(listener, "worker")

if len(sys.argv) > 4:
    number = int(sys.argv[4])
    listener, channel = (socket.socket(fileno=int(number)) for number in sys.argv[5:])
    sys.exit(run_worker(channel, lambda ready: work(load(), number, ready)))
with signal_socket() as arriving:
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    workers.supervise(2, workers.WorkerJob(
        listener=listener, placeholder=lambda _: answer(listener, "waiting"), fetch=lambda: None, load=load, work=work,
        command=[sys.executable, *sys.argv], environ=os.environ, files=[listener.fileno()],
        stop_seconds=30 if kind != "does not end" else 0.5,
    ), arriving)
"""


@dataclass
class Toy:
    process: subprocess.Popen[str]
    home: Path
    lines: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def listening(self) -> bool:
        found = re.search(r"listening on http://127.0.0.1:(\d+)", self.log)
        self.port = int(found[1]) if found else 0
        return bool(found)

    def ask(self) -> tuple[str, int]:
        """Who answers, and its process id."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
            said = client.recv(100).decode()
        # The toy's waiting room may end between accepting and answering.
        who, pid = said.split() if said else ("nobody", "0")
        return who, int(pid)

    def ready(self) -> set[int]:
        """The workers that ever got ready."""
        return {int(pid) for pid in re.findall(r"worker \d+ \(pid (\d+)\) is ready", self.log)}

    def loads(self) -> int:
        return len(list(self.home.glob("loaded-*")))

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Callable[..., Toy]]:
    """Starts a toy of some kind, with constants of `workers`; whatever it leaves running fails the test."""
    with contextlib.ExitStack() as stack:

        def start(kind: str = "fine", settings: str = "") -> Toy:
            script = tmp_path / "toy.py"
            script.write_text(TOY)
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, script, kind, settings, tmp_path],
                    env=clean_environ(PYTHONPATH=ROOT),
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            assert process.stderr
            made = Toy(process, tmp_path)
            reader = threading.Thread(target=made.lines.extend, args=(process.stderr,), daemon=True)
            reader.start()
            # Every process of the toy has its stderr, which ends with the last of them.
            stack.callback(lambda: wait_until(lambda: not reader.is_alive(), "the end of all its processes"))
            stack.callback(process.kill)
            wait_until(made.listening, "listening")
            return made

        yield start


def test_it_is_loaded_once_and_shared(toy: Callable[..., Toy]) -> None:
    served = toy()
    wait_until(lambda: len(served.ready()) == 2, "both workers")
    wait_until(
        lambda: {served.ask() for _ in range(9)} == {("worker", pid) for pid in served.ready()}, "both answering"
    )
    assert served.loads() == 1
    assert served.end() == 0
    assert "ERROR" not in served.log
    assert "WARNING" not in served.log


def test_someone_answers_while_it_loads(toy: Callable[..., Toy]) -> None:
    served = toy("slow")
    wait_until(lambda: served.loads() == 1, "loading")
    assert served.ask()[0] == "waiting"
    (served.home / "go").touch()
    wait_until(lambda: served.ask()[0] == "worker", "a worker")
    wait_until(lambda: {served.ask()[0] for _ in range(9)} == {"worker"}, "an empty waiting room")
    assert served.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads(toy: Callable[..., Toy], number: int) -> None:
    served = toy("slow")
    wait_until(lambda: served.loads() == 1, "loading")
    assert served.end(number) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment(toy: Callable[..., Toy], number: int) -> None:
    assert toy().end(number) == 0


def test_workers_that_do_not_end_are_killed(toy: Callable[..., Toy]) -> None:
    served = toy("does not end")
    wait_until(lambda: len(served.ready()) == 2, "both workers")
    assert served.end() == 0
    assert served.log.count("did not end in time and was killed") == 2


def test_a_second_signal_ends_it_at_once(toy: Callable[..., Toy]) -> None:
    served = toy("does not end", "FIRST_PAUSE_SECONDS=0.1")
    wait_until(lambda: len(served.ready()) == 2, "both workers")
    served.process.send_signal(signal.SIGTERM)
    assert served.end(signal.SIGINT) == 0


def test_a_dead_worker_is_replaced(toy: Callable[..., Toy]) -> None:
    served = toy()
    wait_until(lambda: len(served.ready()) == 2, "both workers")
    first = served.ready()
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: f"(pid {min(first)}) was ended" in served.log, "its end")
    # On one listener, no connection is lost with a worker that was not holding it.
    assert all(served.ask()[0] == "worker" for _ in range(20))
    wait_until(lambda: len(served.ready()) == 3, "a third")
    (new,) = served.ready() - first
    wait_until(lambda: served.ask()[1] == new, "an answer from it")
    assert f"(pid {min(first)}) was ended by SIGKILL, probably for want of memory" in served.log
    assert served.loads() == 1
    assert served.end() == 0


def test_workers_that_keep_dying_are_given_longer_and_longer_pauses(toy: Callable[..., Toy]) -> None:
    served = toy("ends by itself", "FIRST_PAUSE_SECONDS=0.001 MAX_PAUSE_SECONDS=0.006")
    wait_until(lambda: served.log.count("worker 2") > 12, "deaths")
    assert served.end() == 0
    pauses = re.findall(r"worker 2 .* ended with exit code 0; starting another in (\S+) s", served.log)
    assert pauses[:5] == ["0.001", "0.002", "0.004", "0.006", "0.006"]


def test_a_worker_that_cannot_be_started_is_tried_again(toy: Callable[..., Toy]) -> None:
    served = toy("no room", "FIRST_PAUSE_SECONDS=0.001")
    wait_until(lambda: len(served.ready()) == 2, "both workers")
    assert served.log.count("worker 1 cannot be started: [Errno 11] Resource temporarily unavailable") == 3
    assert served.end() == 0


def test_a_worker_that_was_steady_is_replaced_without_a_long_pause(toy: Callable[..., Toy]) -> None:
    served = toy("ends by itself", "FIRST_PAUSE_SECONDS=0.001 STEADY_SECONDS=0")
    wait_until(lambda: served.log.count("starting another in 0.001 s") > 9, "deaths")
    assert set(re.findall(r"starting another in (\S+) s", served.log)) == {"0.001"}
    assert served.end() == 0


def test_one_worker_is_enough_to_go_on(toy: Callable[..., Toy]) -> None:
    served = toy("later ones die", "FIRST_PAUSE_SECONDS=0.001 MAX_PAUSE_SECONDS=0.01")
    wait_until(lambda: served.log.count("worker 2") > 20, "deaths")
    assert served.ask() == ("worker", *served.ready())
    assert re.search(r"worker 2 \(pid \d+\) was ended by SIGABRT", served.log)
    assert served.end() == 0


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("hangs in a fork", r"worker 1 \(pid \d+\), a copy .*, did not get ready in time and was killed"),
        ("fails in a fork", r"worker 1 \(pid \d+\), a copy .*, failed: unexpected ProgrammingError: SQLite objects .*"),
        ("threads", r"what was loaded holds what processes cannot share \(thread \d+\)"),
        ("file", r"what was loaded holds what processes cannot share \(/\S+/toy.py as \d+\)"),
        ("connection", r"what was loaded holds what processes cannot share \(socket:\[\d+\] as \d+\)"),
    ],
)
def test_what_cannot_be_shared_is_loaded_by_each(toy: Callable[..., Toy], kind: str, why: str) -> None:
    served = toy(kind, "PROOF_SECONDS=1" if kind == "hangs in a fork" else "")
    wait_until(lambda: len(served.ready()) == 2, "both workers")
    assert re.search(f"WARNING {why}. So each worker loads for itself", served.log)
    assert served.loads() == 3
    os.kill(min(served.ready()), signal.SIGKILL)
    wait_until(lambda: len(served.ready()) == 3, "a third")
    assert served.loads() == 4
    assert served.ask()[1] in served.ready()
    assert served.end() == 0


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("does not load", "RoleError: nothing to load"),
        ("crashes while loading", "ValueError: no such thing"),
        ("never works", "RoleError: it never works"),
        ("breaks", "RoleError: unexpected ValueError: it is broken"),
        ("dies", r"RoleError: worker 1 \(pid \d+\) was ended by SIGKILL, .*; so did 4 before it"),
    ],
)
def test_without_any_worker_it_ends_with_the_reason(toy: Callable[..., Toy], kind: str, why: str) -> None:
    served = toy(kind, "FIRST_PAUSE_SECONDS=0.001")
    assert served.process.wait(timeout=60) == 1
    wait_until(lambda: re.search(f"{why}.*\n$", served.log), "the reason")


@pytest.mark.parametrize("kind", ["fine", "threads", "slow"])
def test_nothing_outlives_the_supervisor(toy: Callable[..., Toy], kind: str) -> None:
    served = toy(kind)
    wait_until(lambda: served.loads() == 1 if kind == "slow" else len(served.ready()) == 2, "a start")
    assert served.end(signal.SIGKILL) == -signal.SIGKILL
    # The fixture waits for the others.


def test_a_lost_waiting_room_is_told_of(toy: Callable[..., Toy]) -> None:
    served = toy("slow")
    wait_until(lambda: served.loads() == 1, "loading")
    os.kill(served.ask()[1], signal.SIGKILL)
    wait_until(lambda: "nothing answers until a worker is ready" in served.log, "a word")
    (served.home / "go").touch()
    assert served.ask()[0] == "worker"
    assert served.end() == 0


# CPUs


def made_up(root: Path, cgroup: str, **limits: str) -> Path:
    """A machine with what /proc/self/cgroup says, and files of /sys/fs/cgroup by name; __ stands for /."""
    files = {"proc/self/cgroup": cgroup}
    files |= {f"sys/fs/cgroup/{name.replace('__', '/')}": text for name, text in limits.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        # Version 2: in a namespace of its own, in none, and with a limit further up, which is the smaller one.
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "300000 100000"}, 3),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {}, 64),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "max 100000"}, 2),
        ("0::/kubepods/pod1/c1", {"cpu.max": "500000 100000"}, 5),
        ("0::/../../other", {"cpu.max": "500000 100000"}, 5),
        ("0::/", {"cpu.max": "nonsense"}, 64),
        ("0::/", {"cpu.max": ""}, 64),
        # Version 1: the controller by itself and with another, under the path and, as in a container, without it.
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        (
            "5:memory:/x\n4:cpu,cpuacct:/kubepods/pod1/c1",
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "25000"},
            2,
        ),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "700000", "cpu/a/cpu.cfs_period_us": "100000"}, 7),
        ("4:cpuacct:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 64),
        # Both: the controller is in one of them.
        (
            "1:cpu:/\n0::/",
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000", "unified/cgroup.procs": "1"},
            4,
        ),
        ("1:name=systemd:/\n0::/a:b", {"unified/a:b/cpu.max": "600000 100000"}, 6),
    ],
)
def test_the_limit_of_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, limits: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert resources.cpu_limit(made_up(tmp_path, cgroup, **limits)) == expected


def test_no_more_cpus_than_the_process_may_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert resources.cpu_limit(tmp_path) == 2
    assert resources.cpu_limit(made_up(tmp_path, "0::/", **{"cpu.max": "800000 100000"})) == 2
    assert 1 <= resources.cpu_limit() <= 2


@pytest.mark.parametrize(
    ("workers", "given", "expected"),
    [
        (1, {}, ("8", "8", "8")),
        (4, {}, ("1", "1", "1")),
        (4, {"MKL_NUM_THREADS": "2"}, ("1", "1", "2")),
        (4, {"OMP_NUM_THREADS": "3"}, ("3", None, None)),
        (4, {"OMP_NUM_THREADS": ""}, ("1", "1", "1")),
    ],
)
def test_threads_follow_workers_and_cpus(workers: int, given: dict[str, str], expected: tuple[str | None, ...]) -> None:
    resources.share_cpus(workers, 8, given)
    assert tuple(given.get(name) for name in resources.THREADS) == expected


def test_a_large_node_s_cpus_are_not_all_for_one_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert resources.default_workers(made_up(tmp_path / "unlimited", "0::/")) == resources.UNLIMITED_WORKERS
    limited = made_up(tmp_path / "limited", "0::/", **{"cpu.max": "750000 100000"})
    assert resources.default_workers(limited) == 8


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darwin_runtime.http.settings.default_workers", lambda: 7)
    assert Settings.from_env(Reader({"MODEL_LOCAL_PATH": "/m"})).workers == 7
    assert Settings.from_env(Reader({"MODEL_LOCAL_PATH": "/m", "WORKERS": "3"})).workers == 3


# The role

ROW = {"sepal length (cm)": 6.1, "sepal width (cm)": 2.8, "petal length (cm)": 4.7, "petal width (cm)": 1.2}


def pids(served: Served) -> set[int]:
    """The workers that ever got ready."""
    return {int(pid) for pid in re.findall(r"worker \d+ \(pid (\d+)\) is ready", served.log)}


def scores(served: Served, row: Any) -> Any:
    return served.post("/predict", {"features": row}).json()["scores"]


@contextlib.contextmanager
def started(path: Path, proof_seconds: float = 60, **env: object) -> Iterator[Served]:
    """The role with two workers, however it ends; its copies have `proof_seconds` to prove themselves."""
    code = "import sys, darwin_serve; from darwin_runtime.engine import workers; "
    code += f"workers.PROOF_SECONDS = {proof_seconds}; sys.exit(darwin_serve.main())"
    environ = clean_environ(**{"MODEL_LOCAL_PATH": path, "HOST": "127.0.0.1", "PORT": 0, "WORKERS": 2, **env})
    process = prepared.start("-c", code, env=environ, stderr=subprocess.PIPE)
    assert process.stderr
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
    reader.start()
    served = Served(process, reader, lines=lines)
    with process:
        try:
            wait_until(served.listening, "listening")
            yield served
        finally:
            process.kill()
            # All its processes have its stderr.
            reader.join(timeout=60)
            assert not reader.is_alive()


# MLflow takes type hints for a signature.


class Hanging:
    """Waits forever in a fork, as what has lost its threads or its locks does."""

    def load_context(self, context):  # type: ignore[no-untyped-def]
        import os

        self.process = os.getpid()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        import os
        import time

        while os.getpid() != self.process:
            time.sleep(60)
        return [1.5] * len(model_input)


class Refusing(Hanging):
    """Says that it can't work in a fork, as CUDA does."""

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        import os

        if os.getpid() != self.process:
            raise RuntimeError("cannot be used in a forked process")
        return [1.5] * len(model_input)


def saved(kind: type, path: Path, **options: Any) -> Path:
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    model = type(kind.__name__, (kind, BASE), {})()
    signature = ModelSignature(inputs=Schema([ColSpec("double", "x")]))
    options = {"signature": signature, **REQUIREMENTS, **options}
    return save(lambda at: mlflow.pyfunc.save_model(at, python_model=model, **options), path)


def boosted(library: str, path: Path) -> Path:
    """A model of the iris table, whose pool of threads a fork would not have."""
    import importlib

    from mlflow.models import infer_signature

    flavor = importlib.import_module(f"mlflow.{library}")
    kind = {"lightgbm": "LGBMClassifier", "xgboost": "XGBClassifier"}[library]
    features, target = iris_table()
    model = getattr(importlib.import_module(library), kind)(n_estimators=5, n_jobs=2, verbosity=0)
    model.fit(features, target)
    options: dict[str, Any] = {"signature": infer_signature(features, model.predict(features)), **REQUIREMENTS}
    return save(lambda at: flavor.save_model(model, at, input_example=features.head(2), **options), path)


@pytest.mark.parametrize("kind", ["iris", "lightgbm", "xgboost"])
def test_two_workers_answer(tmp_path: Path, kind: str) -> None:
    path = model_path("iris") if kind == "iris" else boosted(kind, tmp_path / "model")
    with serving(path, WORKERS=2) as served:
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        first = scores(served, ROW)
        assert all(scores(served, ROW) == first for _ in range(20))
        # Each of them, by itself.
        for pid in pids(served):
            os.kill(pid, signal.SIGSTOP)
            assert scores(served, [ROW] * 3) == first * 3
            os.kill(pid, signal.SIGCONT)
    assert served.log.count("loading the model in") == 1
    assert "WARNING" not in served.log


def test_one_worker_is_no_other_process() -> None:
    with serving(model_path("iris"), WORKERS=1) as served:
        assert scores(served, ROW) == [1]
        children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children")
        assert not children.exists() or not children.read_text()
        assert not pids(served)


def test_probes_are_answered_all_along(tmp_path: Path) -> None:
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    config = f'{{"entered": "{entered}", "leave": "{leave}"}}'
    statuses: list[tuple[int, int]] = []
    changes: list[tuple[float, float, int]] = []
    done = threading.Event()
    with serving(model_path("slow_to_load"), wait=False, SERVING_MODEL_CONFIG=config, WORKERS=2) as served:

        def probe() -> None:
            while not done.is_set():
                live = served.get("/livez").status_code
                began = time.monotonic()
                ready = served.get("/ready").status_code
                changes.append((began, time.monotonic(), ready))
                statuses.append((live, ready))

        probes = [threading.Thread(target=probe) for _ in range(4)]
        for thread in probes:
            thread.start()
        wait_until(entered.exists, "loading")
        assert served.get("/livez", headers={"Connection": "keep-alive"}).headers["Connection"] == "close"
        assert served.post("/predict", {"features": {"x": 1}}).status_code == 503
        leave.touch()
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        before = len(statuses)
        wait_until(lambda: len(statuses) > before + 50, "probes")
        done.set()
        for thread in probes:
            thread.join(timeout=60)
        assert scores(served, {"x": 1}) == [str(leave)]
    # An exception would have ended a thread, which pytest tells.
    assert {live for live, _ in statuses} == {200}
    assert {ready for _, ready in statuses} == {200, 503}
    assert statuses[-1] == (200, 200)
    first = min(ended for _, ended, ready in changes if ready == 200)
    assert {ready for began, _, ready in changes if began > first} == {200}


def test_a_killed_worker_takes_only_what_it_was_at(tmp_path: Path) -> None:
    answers: list[tuple[float, int]] = []
    done = threading.Event()
    with serving(model_path("iris"), WORKERS=2) as served:
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        first = pids(served)

        def ask(path: str) -> None:
            while not done.is_set():
                began = time.monotonic()
                try:
                    answer = served.post(path, {"features": ROW}) if path == "/predict" else served.get(path)
                    answers.append((began, answer.status_code))
                except requests.RequestException:  # the connection, or half of the answer
                    answers.append((began, 0))

        clients = [threading.Thread(target=ask, args=(path,)) for path in ("/predict", "/predict", "/livez", "/ready")]
        for thread in clients:
            thread.start()
        wait_until(lambda: len(answers) > 50, "answers")
        killed = min(first)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: f"(pid {killed}) was ended by SIGKILL" in served.log, "its end")
        noticed = time.monotonic()
        wait_until(lambda: len(pids(served)) == 3, "another worker")
        (new,) = pids(served) - first
        (old,) = first - {killed}
        before = len(answers)
        wait_until(lambda: len(answers) > before + 50, "answers")
        done.set()
        for thread in clients:
            thread.join(timeout=60)
        os.kill(old, signal.SIGSTOP)
        assert scores(served, ROW) == [1]  # from the new one
        os.kill(old, signal.SIGCONT)
    failures = [began for began, status in answers if status != 200]
    assert len(failures) <= len(clients)
    assert all(began < noticed for began in failures)
    assert new


def test_it_drains() -> None:
    with serving(model_path("iris"), WORKERS=2, DRAIN_SECONDS=2) as served:
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: served.log.count("draining") == 2, "both draining")
        assert served.get("/ready").status_code == 503
        assert served.get("/livez").status_code == 200
        assert scores(served, ROW) == [1]
        assert served.process.poll() is None
        assert served.stop() == 0
        with pytest.raises(requests.ConnectionError):
            served.get("/livez")
    assert "was killed" not in served.log


def test_what_is_running_is_finished(tmp_path: Path) -> None:
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    features = {"entered": str(entered), "leave": str(leave)}
    answers: list[Any] = []
    with serving(model_path("waiting"), WORKERS=2) as served:
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        asking = threading.Thread(target=lambda: answers.append(scores(served, features)))
        asking.start()
        wait_until(entered.exists, "the prediction")
        served.process.send_signal(signal.SIGTERM)
        leave.touch()
        asking.join(timeout=60)
    assert answers == [["done"]]


def test_it_can_be_stopped_while_it_loads(tmp_path: Path) -> None:
    entered = tmp_path / "entered"
    config = f'{{"entered": "{entered}", "leave": "{tmp_path / "never"}"}}'
    for number in (signal.SIGTERM, signal.SIGINT):
        entered.unlink(missing_ok=True)
        with serving(model_path("slow_to_load"), wait=False, SERVING_MODEL_CONFIG=config, WORKERS=2) as served:
            wait_until(entered.exists, "loading")
            served.process.send_signal(number)
            assert served.process.wait(timeout=60) == 0


def test_nothing_outlives_the_role() -> None:
    with started(model_path("iris")) as served:
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        served.process.kill()
        wait_until(lambda: not served.reader.is_alive(), "the end of all its processes")


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    entered, leave = tmp_path / "entered", tmp_path / "leave"
    with serving(model_path("waiting"), WORKERS=2, REQUEST_TIMEOUT_SECONDS=1) as served:
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        hanging = served.post("/predict", {"features": {"entered": str(entered), "leave": str(leave)}})
        assert hanging.status_code == 504
        wait_until(lambda: len(pids(served)) == 3, "another worker")
        leave.touch()
        assert scores(served, {"entered": str(entered), "leave": str(leave)}) == ["done"]
    assert re.search(r"worker \d \(pid \d+\) failed: the model did not answer within 2 s: it hangs", served.log)


@pytest.mark.parametrize("kind", ["broken", "empty"])
def test_why_there_are_no_workers(tmp_path: Path, kind: str) -> None:
    path = model_path("broken") if kind == "broken" else tmp_path
    done = run_role("darwin_serve.py", HOST="127.0.0.1", PORT=0, WORKERS=2, MODEL_LOCAL_PATH=path)
    assert done.code == 1
    expected = {"broken": "fails on its own input example: RuntimeError: this model never works", "empty": "is empty"}
    assert expected[kind] in done.last
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("kind", "source"), [(Hanging, "path"), (Refusing, "uri")])
def test_a_model_that_no_copy_can_use_is_loaded_by_each(tmp_path: Path, kind: type, source: str) -> None:
    import pandas as pd

    model = saved(kind, tmp_path / "model", input_example=pd.DataFrame({"x": [1.0]}))
    where: dict[str, Any] = {"MODEL_LOCAL_PATH": "", "MLFLOW_MODEL_URI": model} if source == "uri" else {}
    with started(model, proof_seconds=1, DRAIN_SECONDS=0, **where) as served:
        wait_until(lambda: len(pids(served)) == 2, "both workers")
        assert "so each worker loads for itself" in served.log.lower()
        assert served.log.count("loading the model in") == 3
        for pid in pids(served):
            os.kill(pid, signal.SIGSTOP)
            assert scores(served, {"x": 1}) == [1.5]
            os.kill(pid, signal.SIGCONT)
        os.kill(min(pids(served)), signal.SIGKILL)
        wait_until(lambda: len(pids(served)) == 3, "another")
        assert served.stop() == 0
