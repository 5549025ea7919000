"""The cache under everything at once, a step at a time: downloads, restarts, pods that come, go and are killed, several
cleanups, time passing, clocks that are wrong, files that rot, an MLflow that is down, pods whose UID on their node is
not the API server's, models of one name and version in several workspaces and at several endpoints, and rollouts, whose
pods ask for an alias that moves.

    python -m tests.simulation --seed 1 --steps 10000 [--no-locks] [--without veto]

What runs is the real code on a real directory. Each actor is a thread that stops before everything it does to the disk
(Python's audit events tell) and before and after it lists pods; a seeded scheduler says who goes on. Killed is who is
never told to go on again. Time passes by making all files older. After each step: every entry that a live pod was told
is there, is there, and whole, with the bytes of the pod's own workspace. The pods of a rollout serve one version, as do
those that come within the TTL of the cleanups. While nobody acts: only a pod that may use any entry keeps all. At the
end: without pods, and with time, nothing is left.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml  # noqa: F401 - or who is stopped while importing it stops all others

import cleanup
import download
from darwin_runtime.errors import RoleError, StoreUnreachable
from darwin_runtime.settings import Reader
from darwin_runtime.storage import (
    access,
    attempts,
    cached_model,
    disk,
    locks,
    pins,
    references,
    resolve,
    transfer,
    usage,
)
from darwin_runtime.storage import cache as cache_module
from darwin_runtime.storage.artifacts import RemoteFile, Source
from darwin_runtime.storage.attempts import Deadline
from darwin_runtime.storage.cache import DAY, Cache, Lease
from darwin_runtime.storage.pins import Pin
from darwin_runtime.storage.usage import InUse
from tests.storage.test_usage import DOWNLOAD
from tests.support.apiserver import pod
from tests.support.killing import paths_within

# Each with its name and version, and with what tells it from its namesakes.
MODELS: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "m1": ("m1", "1", {}),
    "m1 of team-a": ("m1", "1", {"workspace": "team-a"}),
    "m2": ("m2", "1", {}),
    "m2 elsewhere": ("m2", "1", {"endpoint": "http://elsewhere:5000"}),
    "m2 anew": ("m2", "2", {}),
}
# The pods of rollouts ask for it.
ALIAS = "models:/m2@champion"
VERSIONS = ("m2", "m2 anew")
# So many hashes of pod templates come back, as `kubectl rollout undo` brings them back.
ROLLOUTS = 2
# Each with the UIDs that it may see: its own, those of another cluster, or none.
PODS = {"a": ("own", "none"), "b": ("foreign",), "c": ("none",), "d": ("foreign",)}
CLEANUPS = ("cleanup-1", "cleanup-2")
# They mount another directory of the volume, or hang.
BYSTANDERS = ("another-app", "cleanup-0")
# It mounts the whole volume, and uses an entry without naming it.
NOTEBOOK = "notebook"
# A pod that was deleted by force goes on for less than an hour, while another has its name.
GHOST = "ghost"

_SEEN = {
    *("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.utime", "os.chmod", "os.truncate"),
    *("os.listdir", "os.scandir"),
}

_real_sleep, _real_time = time.sleep, time.time


class Dead(BaseException):
    """Ends the threads of the killed, once all is over."""


def content(model: str) -> dict[str, bytes]:
    """As many bytes as those of any other model."""
    body = model.ljust(12).encode()
    return {"MLmodel": body, "deep/weights": body * 100}


class Store:
    """A model's files, from nowhere."""

    def __init__(self, model: str) -> None:
        self.files = content(model)

    def list(self, directory: str = "") -> tuple[list[RemoteFile], list[str]]:
        found = [RemoteFile(name, len(body)) for name, body in self.files.items() if os.path.dirname(name) == directory]  # noqa: PTH120
        return found, [] if directory else ["deep"]

    def open(self, path: str, offset: int) -> None:
        return None

    def download(self, path: str, local: str) -> None:
        Path(local).write_bytes(self.files[path])


def uri_of(model: str) -> str:
    name, version, _ = MODELS[model]
    return f"models:/{name}/{version}"


def source(model: str) -> Source:
    name, version, place = MODELS[model]
    identity = {"name": name, "version": version, **place}
    return Source(uri_of(model), identity, [("MLmodel", 12), ("deep/", None)], Store(model))


KEYS = {model: cache_module.make_key(source(model).identity, source(model).listing) for model in MODELS}


@dataclass
class Pod:
    """A pod as Kubernetes knows it; `seen` is the UID that it sees itself: its own, another one, or none."""

    phase: str
    uid: str
    seen: str
    rollout: str


class Actor(threading.Thread):
    """Something that acts on the cache, when it is told to."""

    def __init__(self, world: World, name: str, act: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.world = world
        self.act = act
        self.go = threading.Semaphore(0)
        self.asleep = 0.0
        self.reading_clock = 0
        self.preparing = False
        self.place: Mapping[str, str] = {}
        self.over = False
        self.killed = False
        self.error = ""
        self.next = ""

    def run(self) -> None:
        world = self.world
        world.local.actor = self
        self.go.acquire()
        try:
            if not self.killed:
                self.act()
        except Dead:
            return
        except Exception:
            self.error = traceback.format_exc()
        self.over = True
        world.back.release()

    def stop(self) -> None:
        """Wait for being told to go on."""
        self.world.back.release()
        self.go.acquire()
        if self.killed:
            raise Dead


class World:
    def __init__(self, root: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.root = root
        self.cache = Cache.prepare(root)
        self.local = threading.local()
        self.back = threading.Semaphore(0)
        self.actors: list[Actor] = []
        self.graves: list[Actor] = []
        self.pods: dict[str, Pod] = {}  # what Kubernetes knows, by name
        self.others: set[str] = set()  # what else it knows: bystanders, and the notebook
        self.serving: dict[str, tuple[str, str]] = {}  # what a live pod was told is there: model and key by pod
        self.down = False  # whether MLflow is
        self.champion = VERSIONS[0]  # what the alias means
        self.passed = 0.0  # by which all files were made older
        self.rollouts = [f"r{number}" for number in range(ROLLOUTS)]
        self.pinned: dict[str, str] = {}  # what a rollout has to serve
        self.used: dict[str, float] = {}  # when each rollout's pin was surely known to be in use
        self.ttl: dict[str, float] = {}  # of the cleanups, in seconds
        self.steps = 0
        self.last: Actor | None = None
        self.counts: Counter[str] = Counter()
        self.trace: list[str] = []

    # What the actors do

    def start_pod(self, name: str, models: Sequence[str], *, anew: bool = True) -> None:
        """A pod that comes, perhaps in the place of one of its name; or the same pod once more."""
        self.serving.pop(name, None)
        wanted = self.chance.choice(models)
        if anew or name not in self.pods or self.pods[name].phase == "Succeeded":
            own, foreign = (str(uuid.UUID(int=self.chance.getrandbits(128))) for _ in range(2))
            seen = {"own": own, "foreign": foreign, "none": ""}[self.chance.choice(PODS[name])]
            self.pods[name] = Pod("Pending", own, seen, "" if wanted in MODELS else wanted)
        this = self.pods[name]
        # The same pod once more may ask for another model, but stays in its rollout.
        model = "" if this.rollout else wanted if wanted in MODELS else self.chance.choice([*MODELS])
        settings = download.Settings.from_env(
            Reader(
                {
                    "MODEL_URI": uri_of(model) if model else ALIAS,
                    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
                    "STORAGE_STRATEGY": "pvc",
                    "CACHE_PATH": str(self.root),
                    "POD_NAME": name,
                    "BACKOFF_SECONDS": "0",
                }
            )
        )
        settings = replace(settings, uid=this.seen, rollout=this.rollout)

        def act() -> None:
            while True:
                began = self.now()
                try:
                    found = cached_model.find(self.cache, settings.wanted(Deadline(1e9)))
                    self.cache.touch(found.key)
                    alias = references.make_alias(name, settings.model_uri)
                    references.set_alias(self.cache, alias, found.key)
                except (OSError, RoleError):
                    # What it relied on was taken for the dead's, or MLflow is down. Kubernetes starts it again.
                    self.counts["failed downloads"] += 1
                    time.sleep(1)
                else:
                    break
            if self.pods.get(name) is this:
                self.serving[name] = model or next(one for one in VERSIONS if KEYS[one] == found.key), found.key
                self.counts["downloads done"] += 1
                self.counts["fallbacks"] += found.fallback
                if this.rollout:
                    self.used[this.rollout] = began

        this.phase = "Pending"
        self.add(Actor(self, name, act))
        self.last = self.actors[-1]
        self.last.place = MODELS[model][2] if model else {}

    def resolve(self, _seconds: float, uri: str, _policy: object) -> Source:
        """In MLflow's place."""
        if self.down:
            raise StoreUnreachable("down")
        if uri == ALIAS:
            self.counts["resolved"] += 1
            found = replace(source(self.champion), uri=uri)
            # It moves most where that shows.
            self.champion = self.chance.choice(VERSIONS)
            return found
        place = self.local.actor.place
        [model] = [one for one, (_, _, its) in MODELS.items() if uri_of(one) == uri and its == place]
        return source(model)

    def now(self) -> float:
        return self.passed + _real_time()

    def start_cleanup(self, name: str) -> None:
        settings = cleanup.Settings.from_env(
            Reader(
                {
                    "CACHE_PATH": str(self.root),
                    "POD_NAME": name,
                    "NAMESPACE": "default",
                    "TTL_DAYS": self.chance.choice(["0", "0", "0.01", "0.05"]),
                    "GRACE_SECONDS": self.chance.choice(["0", "60"]),
                    "MAX_SIZE_GB": self.chance.choice(["0", "0.0000003"]),
                }
            )
        )

        # Each half at times alone, or few would get to the pins.
        halves = self.chance.choice([(self.clean_entries,), (self.drop_pins,), (self.clean_entries, self.drop_pins)])

        def act() -> None:
            listing = cleanup.UsageListing(self.cache, settings, self)  # type: ignore[arg-type]
            for half in halves:
                half(settings, listing)
            self.counts["cleanups done"] += 1

        self.ttl[name] = settings.ttl_days * DAY
        self.add(Actor(self, name, act))

    def clean_entries(self, settings: cleanup.Settings, listing: cleanup.UsageListing) -> None:
        used = listing()
        entries, _ = self.cache.entries(self.cache.now())
        decisions = cleanup.plan(entries, used, settings)
        cleanup.tidy(self.cache, listing, used)
        done = cleanup.execute(decisions, self.cache, settings, listing)
        references.drop_dangling(self.cache, DAY)
        self.counts.update({f"entries {name}": done[name] for name in ("removed", "spared", "restored")})

    def drop_pins(self, settings: cleanup.Settings, listing: cleanup.UsageListing) -> None:
        began, before = self.now(), dict(self.pods)
        known = pins.find(self.cache)
        if known is None:
            return
        wait = partial(time.sleep, settings.grace_seconds)
        self.counts["pins dropped"] += pins.drop_unused(known, settings.ttl_days * DAY, listing.rollouts, wait)
        # The pods of these were listed meanwhile.
        for rollout in {one.rollout for name, one in before.items() if self.pods.get(name) is one} - {""}:
            self.used[rollout] = max(began, self.used.get(rollout, 0.0))

    def list_pods(self, _namespace: str) -> list[dict[str, Any]]:
        """In the API server's place."""
        actor: Actor | None = getattr(self.local, "actor", None)
        if actor is None:
            return list(self.manifests())
        self.note(actor, "lists pods")
        actor.stop()
        found = list(self.manifests())
        actor.stop()
        return found

    def manifests(self) -> Iterator[dict[str, Any]]:
        """All pods; they mount the directory `cache` of one volume as the cache, or another one, or all of it."""
        for name in (*self.pods, *CLEANUPS, *sorted(self.others)):
            found = pod(name, claim="models", mount_path=str(self.root))
            initial, main = found["spec"]["initContainers"], found["spec"]["containers"]
            inside = {NOTEBOOK: "", "another-app": "another-app"}.get(name, "cache")
            for mount in (*initial[0]["volumeMounts"], *main[0]["volumeMounts"]):
                mount["subPath"] = inside
            if known := self.pods.get(name):
                found["metadata"]["uid"], found["status"]["phase"] = known.uid, known.phase
                initial[0] |= copy.deepcopy(DOWNLOAD)
                found["metadata"]["labels"] = {"pod-template-hash": known.rollout} if known.rollout else {}
            else:
                initial.clear()
            if name.startswith("cleanup"):
                main[0]["command"] = ["python", "/app/cleanup.py"]
            yield found

    # Who goes on

    def add(self, actor: Actor) -> None:
        self.actors.append(actor)
        actor.start()

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        actor: Actor | None = getattr(self.local, "actor", None)
        if actor is None or actor.preparing or event not in _SEEN:
            return
        # What is not in the cache is an import.
        if paths := paths_within(event, args, (str(self.root),)):
            self.note(actor, f"{event} {' '.join(path.replace(str(self.root), '') for path in paths)}")
            actor.stop()

    def sleep(self, seconds: float) -> None:
        actor: Actor | None = getattr(self.local, "actor", None)
        if actor is None:
            _real_sleep(seconds)
            return
        self.note(actor, f"sleeps {seconds:g} s")
        actor.asleep = seconds
        actor.stop()

    def note(self, actor: Actor, what: str) -> None:
        actor.next = what
        self.trace.append(f"{actor.name} {what}")
        del self.trace[:-200]

    def step(self) -> None:
        """One thing happens."""
        self.steps += 1
        chance = self.chance.random()
        busy = {actor.name for actor in self.actors}
        # Where races are, more happens: while a cleanup looks, between an announcement and the removal, and most right
        # before that or the veto.
        announced = self.announced()
        heat = 2 if busy.intersection(CLEANUPS) else 1
        if announced:
            critical = self.last and "/.trash" in self.last.next and self.last.next.startswith(("os.ren", "os.list"))
            # Of pins there are few, and two more pods have to come for one that is lost to show.
            heat = (50 if "/.pins/.trash" in self.last.next else 15) if self.last and critical else 5
        if self.chance.random() < 0.01 * heat:
            self.change_pods(busy, announced)
        elif chance < 0.005:
            self.rot()
        elif chance < 0.02:
            seconds = self.chance.choice([1, 40, 3600])
            for actor in [actor for actor in self.actors if actor.name.startswith(GHOST) and seconds == 3600]:
                self.kill(actor)
            self.pass_time(seconds)
        elif chance < 0.035 and (free := [name for name in CLEANUPS if name not in busy]):
            self.start_cleanup(self.chance.choice(free))
        elif chance < 0.04 and self.actors:
            self.kill(self.chance.choice(self.actors))
        elif chance < 0.07:
            self.change_surroundings()
        elif self.actors:
            # Mostly who went on last: else all are half-way all the time, and none has ever gone far while another
            # stood still.
            if self.last not in self.actors or self.last.asleep or self.chance.random() < 0.03 * heat:
                self.last = self.chance.choice(self.actors)
            self.go_on(self.last)
        else:
            self.be_quiet()
            self.start_pod(self.chance.choice([*PODS]), (*MODELS, *self.rollouts * 3))
        self.check()

    def be_quiet(self) -> None:
        """What only happens while nobody acts."""
        used = self.check_usage()
        # After a day, the UIDs of predecessors count no more.
        if self.chance.random() < 0.6:
            self.pass_time(2 * DAY)
        # A notebook does as no cleanup knows, so its entry must be there before one looks.
        free = [model for model, key in KEYS.items() if key not in used.keys and self.cache.has(key)]
        whole = [model for model in free if not self.cache.damage(KEYS[model])]
        if whole and self.chance.random() < 0.3:
            model = self.chance.choice(whole)
            self.others.add(NOTEBOOK)
            self.serving[NOTEBOOK] = model, KEYS[model]
            self.counts["notebooks"] += 1

    def announced(self) -> list[str]:
        """The models, and the rollouts whose pins, are about to be removed."""
        trash = (self.root / ".trash", self.root / ".pins" / ".trash")
        plans = [name for path in trash if path.is_dir() for name in os.listdir(path) if name.endswith(".planned")]
        names = {key: model for model, key in KEYS.items()}
        names |= {pins.name({}, ALIAS, rollout): rollout for rollout in self.rollouts}
        return [names[key] for key in {plan.partition(".")[0] for plan in sorted(plans)} if key in names]

    def go_on(self, actor: Actor) -> None:
        if actor.asleep:
            if not self.pass_time(actor.asleep):
                return
            actor.asleep = 0.0
        actor.go.release()
        self.back.acquire()
        if actor.over:
            self.actors.remove(actor)
            if actor.error:
                raise AssertionError(f"{actor.name} failed: {actor.error}")

    def kill(self, actor: Actor) -> None:
        """Kubernetes starts a pod's container again, or not; a cleanup comes again by itself."""
        self.counts["kills"] += 1
        self.note(actor, "is KILLED")
        self.actors.remove(actor)
        self.graves.append(actor)
        if actor.name in PODS:
            if self.chance.random() < 0.5:
                self.start_pod(actor.name, tuple(MODELS), anew=False)
            else:
                del self.pods[actor.name]

    def change_pods(self, busy: set[str], wanted: Sequence[str]) -> None:
        """Pods that start want one of the models that are `wanted`, if any are."""
        name = self.chance.choice([*PODS])
        if name in busy:
            return
        if name not in self.serving or self.chance.random() < 0.5:
            siblings = [self.pods[one].rollout for one in self.serving if one in self.pods and self.pods[one].rollout]
            others = (*MODELS, *self.rollouts, *siblings * 4)
            self.start_pod(name, wanted or others, anew=bool(wanted) or self.chance.random() < 0.7)
            return
        del self.serving[name]
        if self.chance.random() < 0.5:
            self.pods[name].phase = "Succeeded"
        else:
            del self.pods[name]

    def change_surroundings(self) -> None:
        """Something changes that no pod of ours has a hand in."""
        what = self.chance.choice(["mlflow", "alias", "rollout", "rollout", "phases", "bystanders", GHOST, NOTEBOOK])
        if what == "mlflow":
            self.down = not self.down and self.chance.random() < 0.5
        elif what == "alias":
            self.champion = self.chance.choice(VERSIONS)
        elif what == "rollout":
            self.roll_out()
        elif what == "phases":
            # It takes a while until Kubernetes knows that a pod runs.
            for name in self.pods.keys() & self.serving.keys():
                self.pods[name].phase = "Running"
        elif what == "bystanders":
            self.others ^= {self.chance.choice(BYSTANDERS)}
        elif what == GHOST:
            # One that sees no UID would replace the lease of its successor; one that sees its own, never counts for it.
            foreign = {name for name, known in self.pods.items() if known.seen not in ("", known.uid)}
            for actor in [actor for actor in self.actors if actor.name in foreign][:1]:
                name, actor.name = actor.name, f"{GHOST} {actor.name}"
                self.start_pod(name, tuple(MODELS))
                self.counts["ghosts"] += 1
        else:
            self.others.discard(NOTEBOOK)
            self.serving.pop(NOTEBOOK, None)

    def roll_out(self) -> None:
        """A rollout goes, and in its place comes a new one, or one of those before, with many pods at once."""
        old = self.chance.choice(self.rollouts)
        for name in [name for name in self.serving if name in self.pods and self.pods[name].rollout == old]:
            del self.serving[name], self.pods[name]
        if self.chance.random() < 0.5:
            self.rollouts[self.rollouts.index(old)] = f"r{self.steps}"
        busy = {actor.name for actor in self.actors}
        for name in self.chance.sample([*PODS], 2):
            if name not in busy:
                self.start_pod(name, [self.chance.choice(self.rollouts)])

    def pass_time(self, seconds: float) -> bool:
        """Make everything older; not while someone compares times, for whom none would pass in a moment."""
        if any(actor.reading_clock for actor in self.actors):
            return False
        self.passed += seconds
        for directory, names, files in os.walk(self.root):
            for name in (*names, *files):
                path = os.path.join(directory, name)  # noqa: PTH118 - many, and often
                stat = os.lstat(path)
                os.utime(path, (stat.st_atime - seconds, stat.st_mtime - seconds), follow_symlinks=False)
        return True

    def rot(self) -> None:
        """A file that no pod relies on is damaged."""
        leased = {lease.key for lease in self.cache.leases()} | {key for _, key in self.serving.values()}
        for key in self.chance.sample(list(KEYS.values()), len(KEYS)):
            path = self.root / key / "model" / "MLmodel"
            if key not in leased and path.exists():
                os.truncate(path, 1)
                self.counts["rotten"] += 1
                return

    def check(self) -> None:
        for name, (model, key) in self.serving.items():
            for path, body in content(model).items():
                there = self.root / key / "model" / path
                found = there.read_bytes() if there.exists() else None
                assert found is None or len(found) != len(body) or found == body, f"{name} has another's {path}"
                assert found == body, f"{path} of {model}, which {name} uses, is not whole"
        self.check_rollouts()

    def check_rollouts(self) -> None:
        """The pods of one serve one version, until none is left and a cleanup has waited for its TTL."""
        living = {one.rollout for one in self.pods.values()}
        cleaning = [self.ttl[actor.name] for actor in self.actors if actor.name in CLEANUPS]
        for rollout in [*self.pinned]:
            # Times of files are coarse.
            if rollout not in living and cleaning and self.now() - self.used[rollout] > min(cleaning) - 2:
                del self.pinned[rollout]
        for name, (model, _) in self.serving.items():
            if name in self.pods and (rollout := self.pods[name].rollout):
                pinned = self.pinned.setdefault(rollout, model)
                assert model == pinned, f"rollout {rollout} serves two versions: {pinned}, and {name} {model}"

    def check_usage(self) -> InUse:
        """Each pod that serves is known to use its own entry, and only the notebook may use any."""
        settings = cleanup.Settings.from_env(Reader({"CACHE_PATH": str(self.root), "POD_NAME": CLEANUPS[0]}))
        used = cleanup.UsageListing(self.cache, settings, self)()  # type: ignore[arg-type]
        for name, (model, key) in self.serving.items():
            assert name == NOTEBOOK or name in used.keys.get(key, ()), f"{name} is not known to use {model}"
        assert used.unmatched.keys() <= {NOTEBOOK}, f"every entry is kept by {[*used.unmatched]}"
        self.counts["looks"] += 1
        return used

    def end(self) -> None:
        """All pods go, all that is at work ends; then nothing is left after some days of cleaning."""
        self.down = False
        while self.actors:
            self.go_on(self.chance.choice(self.actors))
            self.check()
        self.check_usage()
        self.pods.clear()
        self.others -= {NOTEBOOK}
        self.serving.clear()
        for _ in range(12):
            assert self.pass_time(3 * DAY)
            self.start_cleanup(CLEANUPS[0])
            while self.actors:
                self.go_on(self.actors[0])
        left = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir())
        assert left == [f".pins/{cache_module.TAG_NAME}", cache_module.TAG_NAME], left


class Inline:
    """In the place of a pool of threads: what is submitted runs at once, in the actor's own."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        return [function(item) for item in items]


def _reads_clock(world: World, owner: Any, name: str, *, generates: bool = False) -> None:
    """Have no time pass within a function that compares two times."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        actor: Actor | None = getattr(world.local, "actor", None)
        if actor is None:
            return real(*args, **options)
        actor.reading_clock += 1
        try:
            return iter(list(real(*args, **options))) if generates else real(*args, **options)
        finally:
            actor.reading_clock -= 1

    setattr(owner, name, wrapped)


def _prepares_at_once(world: World, name: str) -> None:
    """Have nobody stop in finding a cache that is prepared: ten looks each time, which change nothing."""
    real = getattr(Cache, name)

    def wrapped(root: Path, inner: Sequence[str] = cache_module.INNER) -> Cache:
        actor: Actor | None = getattr(world.local, "actor", None)
        if actor is None or not (root / cache_module.TAG_NAME).exists():
            return cast("Cache", real(root, inner))
        actor.preparing = True
        try:
            return cast("Cache", real(root, inner))
        finally:
            actor.preparing = False

    setattr(Cache, name, wrapped)


def _no_locks(world: World) -> Callable[[Cache, str, str], locks.Lock]:
    def try_lock(cache: Cache, key: str, owner: str) -> locks.Lock:
        path = cache.root / ".locks" / f"{key}.{world.steps}"
        return locks.Lock(path, os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), owner, inherited=False)

    return try_lock


def _arrange(world: World, *, locked: bool) -> None:
    def touched(path: Path) -> float:
        nodes = (path, *(() if path.is_symlink() else path.rglob("*")))
        return float(max(node.lstat().st_mtime for node in nodes))

    replaced: list[tuple[Any, str, Any]] = [
        (attempts, "run_with_timeout", lambda _seconds, action, _what: action()),
        (transfer, "start_threads", lambda _count, work: work() or []),
        (disk, "ThreadPoolExecutor", Inline),
        # Files can be made older in what they say of their content, not of themselves.
        (disk, "last_change", touched),
        # What a crash of the machine does is not told here.
        (disk, "sync", lambda path: None),
        (access, "place", lambda _uri: world.local.actor.place),
        (resolve, "resolve_within", world.resolve),
        # Where pods of a rollout have no patience, several resolve at once.
        (cached_model, "PATIENCE_SECONDS", world.chance.choice([0.0, 60.0])),
        (time, "sleep", world.sleep),
        # No machine's clock counts.
        (time, "time", lambda: _real_time() + world.chance.uniform(-1e6, 1e6)),
    ]
    if not locked:
        replaced.append((locks, "try_lock", _no_locks(world)))
    for owner, name, value in replaced:
        setattr(owner, name, value)
    for owner, name in (
        (cleanup.UsageListing, "__call__"),
        (Cache, "entries"),
        (references, "drop_dangling"),
        (locks, "_holder"),
        (references, "find_ref"),
        (pins, "_unused"),
    ):
        _reads_clock(world, owner, name)
    _reads_clock(world, Cache, "leftovers", generates=True)
    for name in ("prepare", "find"):
        _prepares_at_once(world, name)
    sys.addaudithook(world.hook)


def _list_no_more(_decisions: Any, _cache: Any, _settings: Any, _look: Any) -> Any:
    return _execute(_decisions, _cache, _settings, lambda: InUse())  # type: ignore[arg-type]


def _drop_all(cache: Cache, lease: cache_module.Lease) -> None:
    stem = lease.name.rpartition(".")[0].rpartition(".")[0]
    for path in (cache.root / ".leases").glob(f"{stem}.*"):
        path.unlink(missing_ok=True)


def _by_uid_alone(pods: Sequence[Any], leases: Sequence[Lease]) -> Iterator[tuple[Any, set[Lease]]]:
    for one in filter(usage._lives, pods):
        mine = {one["metadata"]["uid"], one["metadata"]["name"]}
        yield one, {lease for lease in leases if (lease.uid or lease.pod) in mine}


def _publish_alone(known: Cache, name: str, pin: Pin) -> Pin:
    _publish(known, name, pin)
    return pin


def _veto_of_pins_alone(cache: Cache, key: str, found: tuple[int, int]) -> bool:
    return _veto(cache, key, found) if cache.root.name == cache_module.PINS else cache.fingerprint(key) == found


class _WithoutVeto(Cache):
    def veto_removals(self, key: str, found: tuple[int, int]) -> bool:
        return self.fingerprint(key) == found


def _use_without_veto(known: Cache, name: str) -> Pin | None:
    return _use(_WithoutVeto(known.root, known.inner), name)


def _ref_without_place(cache: Cache, _place: Any, model_uri: str) -> Path:
    return cache.root / ".refs" / f"{hashlib.sha256(model_uri.encode()).hexdigest()}.json"


_execute, _publish, _use, _veto = cleanup.execute, pins.publish, pins.use, Cache.veto_removals

# What the cache's safety rests on, each with the code as it would be without it. Then a pod does lose its model, gets
# another's, or nothing is ever cleaned.
WITHOUT: dict[str, tuple[Any, str, Any]] = {
    "veto": (Cache, "veto_removals", _veto_of_pins_alone),
    "listing-after-announcing": (cleanup, "execute", _list_no_more),
    "lease-names": (Cache, "drop_lease", _drop_all),
    "names": (usage, "_holders", _by_uid_alone),
    "mounts": (usage, "_volume_of_any", lambda *_: None),
    "place": (references, "_ref", _ref_without_place),
    "a-day-between": (usage, "ABANDONED_SECONDS", 0.0),
    "pin-veto": (pins, "use", _use_without_veto),
    "pin-race": (pins, "publish", _publish_alone),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--no-locks", action="store_true")
    parser.add_argument("--without", choices=WITHOUT, help="leave that out of the code, and see it fail")
    asked = parser.parse_args(argv)
    if asked.without:
        owner, name, value = WITHOUT[asked.without]
        setattr(owner, name, value)
    logging.disable(logging.CRITICAL)
    fast = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=fast if fast.is_dir() else None)) / "cache"
    world = World(root, asked.seed)
    _arrange(world, locked=not asked.no_locks)
    try:
        while world.steps < asked.steps:
            world.step()
        world.end()
    except AssertionError:
        sys.stderr.write("\n".join([*world.trace, traceback.format_exc(), f"seed {asked.seed}, step {world.steps}\n"]))
        return 1
    finally:
        shutil.rmtree(root.parent)
    print(json.dumps({"steps": world.steps, **world.counts}))  # noqa: T201 - to who asked
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    os._exit(main())  # the killed are threads that never end
