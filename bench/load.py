"""Load on a server: wrk on a core of its own, sending bodies in turn and comparing every answer with the model's."""

from __future__ import annotations

import http.client
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import machine, processes
from bench.processes import Failed
from bench.samples import Sample
from bench.servers import ECHO
from bench.wire import Format

_SCRIPT = Path(__file__).with_name("load.lua")


@dataclass(frozen=True)
class Measured:
    """One run: requests answered per second, and the median time from request to answer in milliseconds."""

    rate: float
    latency: float


@dataclass(frozen=True)
class Conversation:
    """Requests for a server, and its answers, which were found to be the model's."""

    format: Format
    bodies: Sequence[bytes]
    answers: Sequence[bytes]


def rehearse(name: str, port: int, form: Format, sample: Sample, size: int) -> Conversation:
    """Ask for every `size` rows of `sample` once. Raises `Failed` unless all the answers are the model's."""
    bodies, answers = [], []
    for rows, expected in sample.chunks(size):
        body = form.write(sample.columns, rows)
        try:
            status, answer = processes.request(port, "POST", form.path, body, {"Content-Type": form.content_type})
            right = status == 200 and (answer == body if name == ECHO else form.read(answer) == expected)
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise Failed(f"no answer that can be read: {error!r}") from error
        if not right:
            raise Failed(f"wrong answer: {status} {answer[:200]!r}")
        bodies.append(body)
        answers.append(answer)
    return Conversation(form, bodies, answers)


def press(port: int, talk: Conversation, connections: int, seconds: int) -> Measured:
    """Ask over so many connections at once. Raises `Failed` if any answer is missing or not one of those expected."""
    with tempfile.TemporaryDirectory() as directory:
        bodies, answers = Path(directory, "bodies"), Path(directory, "answers")
        bodies.write_bytes(_pack(talk.bodies))
        answers.write_bytes(_pack(set(talk.answers)))
        options = {"--threads": 1, "--connections": connections, "--duration": f"{seconds}s", "--timeout": "60s"}
        command = ["wrk", *(str(part) for option in options.items() for part in option), "--script", str(_SCRIPT)]
        command += [f"http://127.0.0.1:{port}{talk.format.path}", "--", talk.format.content_type]
        command += [str(bodies), str(answers)]
        done = subprocess.run(processes.on_core(machine.LOAD_CORE, command), capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"wrk: {done.stdout} {done.stderr}")
    *numbers, example = done.stdout.splitlines()[-1].split(" ", 6)
    requests, duration, median, _, failures, wrong = map(int, numbers)
    if failures or wrong or not requests:
        raise Failed(f"of {requests} requests {wrong} were answered wrongly and {failures} failed: {example or '-'}")
    return Measured(requests / duration * 1e6, median / 1000)


def _pack(items: Iterable[bytes]) -> bytes:
    return b"".join(b"%d\n%s" % (len(item), item) for item in items)
