"""A fork of a prepared process is as a fresh process."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_environ, wait_until
from tests.support import prepared
from tests.support.prepared import uncovered

_REPORT = """
import json, os, resource, signal, sys, threading
kind = {os.path.realpath(f"/proc/self/fd/{file}").partition(":")[0] for file in (1, 2)}
files = sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
mask = os.umask(0)
print(json.dumps({
    "main": __name__, "arguments": sys.argv, "environment": dict(os.environ), "directory": os.getcwd(), "umask": mask,
    "stdin": os.readlink("/proc/self/fd/0"), "files": files, "standard": [sys.stdout.fileno(), sys.stderr.fileno()],
    "handlers": {int(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
    "mask": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
    "wake-up": signal.set_wakeup_fd(-1),
    "limits": [resource.getrlimit(limit) for limit in range(16)],
    "threads": threading.active_count(), "session": os.getsid(0), "group": os.getpgid(0),
}))
"""


def fresh(*command: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, *command]
    return subprocess.run(whole, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_what_it_finds_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environ = uncovered(clean_environ(TZ="Asia/Kathmandu", ODD="\udcff ü\n"))
    before, files = os.umask(0o027), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[0] - 1, files[1]))
    try:
        found = [run("-c", _REPORT, "an", "argument", env=environ) for run in (fresh, prepared.run)]
    finally:
        os.umask(before)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
    truth, forked = (json.loads(done.stdout) for done in found)
    assert forked == truth
    assert truth["umask"] == 0o027
    assert truth["environment"]["ODD"] == "\udcff ü\n"


def test_code_and_modules_and_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.py").write_text("import sys, beside\nprint(__name__, sys.argv, beside.__file__, sys.path[0])\n")
    (tmp_path / "beside.py").touch()
    monkeypatch.chdir(tmp_path)
    environ = uncovered(clean_environ())
    for command in (("some.py", "x"), (str(tmp_path / "some.py"),), ("-m", "some", "x"), ("-c", "import some", "x")):
        truth, forked = fresh(*command, env=environ), prepared.run(*command, env=environ)
        assert (forked.returncode, forked.stdout) == (truth.returncode, truth.stdout) == (0, truth.stdout)


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('in words')",
        "raise ValueError('uncaught')",
        "raise KeyboardInterrupt",
        "import os; os._exit(7)",
        "import os; os.kill(os.getpid(), 15)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.abort()",
        "import atexit; atexit.register(print, 'last')",
        "import threading; threading.Thread(target=print, args=('not a daemon',)).start()",
    ],
)
def test_how_it_ends_is_the_same(code: str) -> None:
    environ = uncovered(clean_environ())
    truth, forked = fresh("-c", code, env=environ), prepared.run("-c", code, env=environ)
    assert (forked.returncode, forked.stdout) == (truth.returncode, truth.stdout)
    # A traceback has the frames of this module besides.
    assert forked.stderr.splitlines()[-1:] == truth.stderr.splitlines()[-1:]


def test_it_runs_until_it_is_told_to_end() -> None:
    code = "import sys, time; print('on', file=sys.stderr); time.sleep(600)"
    with prepared.start("-c", code, env=clean_environ(), stderr=subprocess.PIPE) as process:
        assert process.stderr
        assert process.stderr.readline() == "on\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() == -signal.SIGTERM, "its end")
        process.kill()  # of one that is gone, nothing follows


def test_forks_differ_in_what_is_random() -> None:
    code = "import random, tempfile; print(random.random(), tempfile.mktemp())"
    assert len({prepared.run("-c", code, env=clean_environ()).stdout for _ in range(3)}) == 3
