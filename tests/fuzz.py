"""Coverage-guided fuzzing of all that reads requests: `python -m tests.fuzz TARGET --runs N`, or `all` for each target.

A failure is an exception that is not one of those the application expects, an input that takes longer than
`TIMEOUT_SECONDS`, or memory beyond `MEMORY_MB`; what failed is kept in `build/fuzz`, and `--input FILE` runs it again.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODULES = ("darwin_runtime.protocols", "darwin_runtime.schema")

TIMEOUT_SECONDS = 5
MEMORY_MB = 1500
# A target that has not ended so long after its time prints the stack of each thread and fails.
HUNG_SECONDS = 90
MAX_BYTES = 4096

# A target's inputs before its JSON: the contract's number, and of some how long the JSON is.
PREFIX = {"v2-binary": 3, "features": 0, "headers": 0}

FOUND = Path("build/fuzz")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each list or object in `value`, and a key of it."""
    found: list[tuple[Any, Any]] = []
    parts = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for key, part in parts:
        found += [(value, key), *_places(part)]
    return found


def _mutated(text: bytes, dice: random.Random, values: tuple[Any, ...]) -> bytes | None:
    """JSON with one part of it replaced, removed, doubled or swapped for another; None if it is no JSON."""
    try:
        value = json.loads(text)
        places = _places(value)
        if not places:
            return None
        holder, key = dice.choice(places)
        other, from_there = dice.choice(places)
        kind = dice.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder[key : key + 1] = [holder[key]] * dice.choice((2, 3, 100))
        elif kind == 2 and isinstance(holder, dict):
            holder[dice.choice([*holder, "a", "", "params", "shape"])] = holder.pop(key)
        elif kind == 3:
            holder[key] = json.loads(json.dumps(other[from_there]))
        else:
            holder[key] = dice.choice(values)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def _fuzz(target: str, runs: int, seconds: int, seed: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    if seconds:
        faulthandler.dump_traceback_later(seconds + HUNG_SECONDS, exit=True)
    with atheris.instrument_imports(include=list(MODULES)):
        from tests.support.hostile import SELF_TEST, TARGETS, TOKENS, VALUES

    run, seeds = (TARGETS | SELF_TEST)[target]
    prefix = PREFIX.get(target, 1)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        dice = random.Random(number)
        if dice.random() < 0.5:
            head, text, tail = data[:prefix], data[prefix:], b""
            if target == "v2-binary":
                length = int.from_bytes(data[1:3], "little")
                text, tail = text[:length], text[length:]
            made = _mutated(text, dice, VALUES)
            if made is not None and len(made) + len(tail) + prefix <= most:
                if target == "v2-binary":
                    head = head[:1] + len(made).to_bytes(2, "little")
                return head + made + tail
        return bytes(atheris.Mutate(data, most))

    FOUND.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        corpus, tokens = Path(directory, "corpus"), Path(directory, "tokens")
        corpus.mkdir()
        for index, data in enumerate(seeds()):
            (corpus / f"seed{index}").write_bytes(data)
        tokens.write_text("".join(f'"{_escaped(token)}"\n' for token in TOKENS))
        options = {
            "runs": runs,
            "max_total_time": seconds,
            "seed": seed,
            "timeout": TIMEOUT_SECONDS,
            "rss_limit_mb": MEMORY_MB,
            "max_len": MAX_BYTES,
            "dict": tokens,
            "artifact_prefix": f"{FOUND}/{target}-",
            # Of what Parquet is read by, nothing is seen: seeds would shrink to nothing.
            "reduce_inputs": 0,
            "print_final_stats": 1,
        }
        custom = {} if target in ("csv", "parquet", "encoded", "headers") else {"custom_mutator": mutate}
        atheris.Setup([target, *(f"-{key}={value}" for key, value in options.items()), str(corpus)], run, **custom)
        atheris.Fuzz()


def _escaped(token: str) -> str:
    return "".join(chr(c) if 32 < c < 127 and chr(c) not in '"\\' else f"\\x{c:02x}" for c in token.encode())


def _all(runs: int, seconds: int, seed: int) -> int:
    """Fuzz each target in a process of its own, `runs` and `seconds` being for all together; print a table."""
    from tests.support.hostile import TARGETS

    print(f"{'target':12} {'inputs':>9} {'edges':>6} {'features':>8} {'seconds':>8}")
    failed, inputs, began = [], 0, time.monotonic()
    for target in TARGETS:
        start = time.monotonic()
        command = [sys.executable, "-m", "tests.fuzz", target, f"--runs={-(-runs // len(TARGETS))}", f"--seed={seed}"]
        done = subprocess.run(
            [*command, f"--seconds={-(-seconds // len(TARGETS))}"], capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        executed = re.search(r"stat::number_of_executed_units: (\d+)", said)
        covered = re.findall(r"cov: (\d+) ft: (\d+)", said) or [("0", "0")]
        count = int(executed[1]) if executed else 0
        inputs += count
        edges, features = covered[-1]
        print(f"{target:12} {count:9} {edges:>6} {features:>8} {time.monotonic() - start:8.1f}", flush=True)
        if done.returncode or not count:
            failed.append(target)
            print(said[-8000:])
    print(f"{inputs} inputs in {time.monotonic() - began:.0f} s; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs, of `all` for all targets together")
    parser.add_argument("--seconds", type=int, default=0, help="stop after so many, of `all` for all together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, help="run the target on this file, and no more")
    given = parser.parse_args()
    if given.target == "all":
        return _all(given.runs, given.seconds, given.seed)
    if given.input:
        from tests.support.hostile import SELF_TEST, TARGETS

        (TARGETS | SELF_TEST)[given.target].run(given.input.read_bytes())
        return 0
    _fuzz(given.target, given.runs, given.seconds, given.seed)
    return 1


if __name__ == "__main__":
    sys.exit(main())
