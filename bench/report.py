"""Outcomes as a table, and as the document that the repository keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench import envs, machine
from bench.outcome import Outcome, Row
from bench.servers import SERVERS

_HEAD = ("case", "who", "figure", "median latency", "ours is", "bar", "met")


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table, padded so that it can also be read as it is."""
    lines = [_HEAD, *(cells for outcome in outcomes for cells in _cells(outcome))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([padded[0], rule, *padded[1:]]) + "\n"


def _cells(outcome: Outcome) -> Iterable[tuple[str, ...]]:
    for number, row in enumerate(outcome.rows):
        figure = row.figure.replace("|", "\\|")  # an error message may hold anything
        yield (outcome.case if not number else "", row.who, figure, row.latency, _times(row), row.bar, _met(row))


def _times(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio:.{2 if row.ratio < 10 else 1}f} ×"


def _met(row: Row) -> str:
    return {True: "yes", False: "**no**", None: ""}[row.met]


def document(outcomes: Sequence[Outcome], rounds: int, seconds: int, before: str) -> str:
    """RESULTS.md made anew, with the parts that are not about `outcomes` as they were `before`."""
    bars = [row.met for outcome in outcomes for row in outcome.rows if row.met is not None]
    parts = [
        "# Results",
        f"{sum(bars)} of {len(bars)} bars are met. `make bench` made this file; make it anew rather than edit it.",
        table(outcomes).rstrip(),
        _METHOD.format(rounds=rounds, seconds=seconds).strip(),
        "## Settings",
        _settings(),
        "## Versions",
        _versions(),
        "## Machine",
        "\n".join(f"- {name}: {value}" for name, value in machine.describe().items()),
        "## Again",
        _AGAIN.strip(),
        *(part for title in (_TROUBLES, _DOWNLOADS) if (part := _part(before, title))),
    ]
    return "\n\n".join(parts) + "\n"


_TROUBLES = "## Overload and restarts"
_DOWNLOADS = "## Downloads and the cache"


def with_troubles(document: str, outcomes: Sequence[Outcome], rounds: int) -> str:
    """RESULTS.md with the part that `outcomes` are about made anew."""
    made = _made(_TROUBLES, outcomes, _TROUBLES_METHOD.format(rounds=rounds))
    return _joined(document, made, _part(document, _DOWNLOADS))


def with_downloads(document: str, outcomes: Sequence[Outcome], rounds: int) -> str:
    """RESULTS.md with the part that `outcomes` are about made anew; it is the last."""
    made = _made(_DOWNLOADS, outcomes, _DOWNLOADS_METHOD.format(rounds=rounds))
    return _joined(document, _part(document, _TROUBLES), made)


def _made(title: str, outcomes: Sequence[Outcome], method: str) -> str:
    bars = [row.met for outcome in outcomes for row in outcome.rows if row.met is not None]
    where = ", ".join(machine.describe().values())
    met = f"{sum(bars)} of {len(bars)} bars are met, on this machine: {where}."
    return "\n\n".join([title, met, table(outcomes).rstrip(), method.strip()])


def _part(document: str, title: str) -> str:
    """From `title` to the next title of its kind, or nothing."""
    _, found, rest = document.partition(title)
    text, _, _ = rest.partition("\n## ")
    return f"{found}{text}".rstrip() if found else ""


def _joined(document: str, *parts: str) -> str:
    begin = min((at for title in (_TROUBLES, _DOWNLOADS) if (at := document.find(title)) >= 0), default=len(document))
    return "\n\n".join([document[:begin].rstrip(), *(part for part in parts if part)]) + "\n"


_TROUBLES_METHOD = """
- The model counts in Python for 10 ms a row, and none of the servers puts its rows together. The peak is what a few
  connections that wait for their answers get; then ten times as many requests are sent by the clock, each over a
  connection that is free, or else a new one, whatever becomes of those before. No two ask for the same, and every
  answer is compared. What is answered with 200 after the time a request may take, and a tenth of a second for the way,
  is late; a client that has waited for five seconds more gives up, and was never answered. MLServer knows no such time.
- At the end all connections are closed at once, and lone requests are sent one after the other until one takes no more
  than twice as long as before.
- Memory is the resident size of all processes of the server.
- With the logistic regression, wrk asks over 32 and over 320 connections in turn, {rounds} times for 5 s. The figures
  are medians.
- For a restart another server is started, and gets its share of the requests when the route named has answered with
  200; then the first is told to end (SIGTERM), and gets its share until that route has failed five times in a row, a
  fifth of a second apart, as the endpoints of a pod in a cluster lag behind. 16 clients send some 300 requests a second
  over connections that stay open. None is sent twice. A failed one was refused, got no or a wrong answer, or its
  connection broke.
"""


_DOWNLOADS_METHOD = """
- `mlflow server` as it comes, with a directory as its store, and who downloads share all cores. Every round turns the
  order around; a figure is the median of {rounds} rounds, "ours is" the median over the rounds of their rate.
- The transfer hashes what arrives and has it on disk (fsync) when it ends; curl and MLflow do neither.
- Before each, so much memory is used and given back that the machine's host need not find any for the files; they stay,
  empty, until the end: to make one takes ext4 the longer the more were removed lately.
- Peak memory is that of the whole process, less that of an interpreter that has imported MLflow's client.
- A start on a warm cache is `download.py` with `STORAGE_STRATEGY=pvc` in a process that has imported MLflow, less the
  time it waits for answers.
- Pods of one ReplicaSet are processes of `download.py` with its `POD_TEMPLATE_HASH`, imports and all. The server's log
  counts their requests; their CPU is user and system time of all of them. A pod alone is the median of five.
- Planning is all that `cleanup.py` does with the cache and the list of pods before it removes anything.
"""


def _settings() -> str:
    return "\n".join(f"- **{server.title}**: {server.settings}" for server in SERVERS.values())


def _versions() -> str:
    lines: dict[str, str] = {}
    for server in SERVERS.values():
        found = envs.versions(server.env, server.packages)
        # A server that is measured with two settings, or shares our environment, is told once.
        lines.setdefault(server.env, f"- **{server.title}**: {', '.join(f'{name} {found[name]}' for name in found)}")
    return "\n".join(lines.values())


_METHOD = """
## Method

- Servers run one at a time, each on one core, and wrk on another. Every round turns their order around. A figure is the
  median of {rounds} rounds of {seconds} s each, after a warm-up.
- "Ours is" compares with the server in its line, in the same round, and is the median of that over the rounds, because
  the speed of a machine drifts: by requests (of one row: rows) per second; by median latency where there is one
  connection, which leaves out what the load generator does between two requests; by time, or by memory.
- All load the same saved model and have the same versions of the libraries it is made of. Each is sent the same 64 rows
  in turn, one in each request, in its own users' format; wrk compares every answer with the model's. One that is wrong,
  missing or not a 200 makes the run void.
- Two limits are measured beside them: the same HTTP stack (Starlette on uvicorn) that sends the body back, and the
  model alone in a loop on arrays.
- Time to ready is from the start of the process to the first 200 of the readiness route, against a fresh interpreter
  that does nothing but `import mlflow.pyfunc; mlflow.pyfunc.load_model(...)`: until it has ended, and until it has
  loaded, for ending takes it a while, too.
- Memory is the sum of the proportional set sizes of all processes of the server, after requests to each.
- Probes are sent one after the other, 10 ms apart, each over a connection of its own.
"""

_AGAIN = """
With two cores and [wrk](https://github.com/wg/wrk) (`apt-get install wrk`):

```sh
make bench                                                 # everything; this file is made anew
make bench ARGS="--cases logistic-32 --rounds 1 --peers mlflow,echo"   # a part of it, printed only
make bench ARGS="--cases overload,shutdown --write"        # a part of it, and its part of this file; downloads likewise
```
"""
