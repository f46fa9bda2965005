"""The parent's side: one worker process for each peer, run in turn, round after round.

Every peer of a case runs in every round, so that a slow moment of the machine hits
each of them. The first round is a warm-up.
"""

import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.roster import PEERS, Case, Peer

TESTS = Path(__file__).resolve().parents[1]
SETTLE = 0.02  # seconds before a run: threads of the peer before may still spin


@dataclass(frozen=True)
class Limits:
    """What a measurement may cost.

    Args:
        rounds: Counted rounds.
        patience: Seconds of counted runs after which a peer sits out further rounds.
        cap: Seconds of one run after which a peer is given up.
        start: Seconds to import and load, and once more to plan or compile, of a peer
            that does; others have two caps for the former.
        dense: Bytes of the largest Jacobian that is formed.
    """

    rounds: int = 5
    patience: float = 20.0
    cap: float = 30.0
    start: float = 120.0
    dense: float = 12e9


@dataclass
class Result:
    """What is known about one peer on one case.

    Args:
        peer: Key of the peer.
        reason: Why there is no number; empty if there is one.
        first: Seconds of the first call, with planning or compilation.
        times: Seconds of every counted call.
        warm_up: Seconds of the calls in the warm-up round.
        peak: Highest memory of a counted run over that before the first, in bytes.
        error: Relative error of the kernel, if it was compared.
        facts: What the peer says of itself, for example the flops of its plan.
        measured: What the floor measured in each counted run.
        others: Core-seconds that other processes took during the runs.
        wall: Seconds of the runs.
    """

    peer: str
    reason: str = ""
    first: float = 0.0
    times: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    peak: int = 0
    error: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, float]] = field(default_factory=list)
    others: float = 0.0
    wall: float = 0.0

    @property
    def about(self) -> Peer:
        """The peer's entry in the roster."""
        return PEERS[self.peer]

    @property
    def seconds(self) -> float:
        """Median of the counted calls, or of the first where that was the only one."""
        return statistics.median(self.times or self.warm_up)

    @property
    def spent(self) -> float:
        """Seconds of the counted calls, or of the longest call before them."""
        return sum(self.times) or max([0.0, *self.warm_up])

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in what a worker answered to a run."""
        if "build" in record:
            self.warm_up, self.facts = record["seconds"], record["facts"]
            self.first = record["build"] + record["seconds"][0]
        else:
            self.times += record["seconds"]
            self.measured += record["measured"]
        # The first run loads what libraries load late; it counts only if it is alone.
        alone = not self.times or len(self.times) == len(record["seconds"])
        self.peak = record["peak"] if alone else max(self.peak, record["peak"])
        self.error = record["error"]
        self.others += record["others"]
        self.wall += record["wall"]


class WorkerError(RuntimeError):
    """A worker failed, was killed or took too long."""


class Worker:
    """A running worker process.

    Args:
        python: Interpreter whose environment has the peer.
        peer: Key of the peer.
        case: The case.
        data: File with weights, inputs and exact block, or None.
    """

    def __init__(self, python: str, peer: str, case: Case, data: str | None) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - see close
        self._process = subprocess.Popen(
            [python, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": str(TESTS)},
        )
        self._buffer = b""
        self._say({"peer": peer, "case": asdict(case), "data": data})

    def _say(self, message: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` tells why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next record.

        Raises:
            WorkerError: If there is none within so many seconds, or it is a failure.
        """
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise WorkerError(f"more than {seconds:.0f} s")
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise WorkerError(self._last_words())
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        record: dict[str, Any] = json.loads(line)
        if "failed" in record:
            raise WorkerError(record["failed"])
        return record

    def run(self, seconds: float) -> dict[str, Any]:
        """Have the kernel computed and wait for the record, at most so many seconds."""
        self._say("run")
        return self.answer(seconds)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        if "bad_alloc" in last:
            return "out of memory"
        if code < 0:
            return f"killed by signal {-code} (9 is most often for want of memory)"
        return f"ended with code {code}: {last.strip()}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def environments() -> list[str]:
    """Interpreters that may have a peer: this one, then those of `bench-rivals`."""
    root = TESTS.parent
    others = [root / name / "bin" / "python" for name in (".venv-rivals", ".venv-jax")]
    return [sys.executable, *(str(python) for python in others if python.exists())]


def interpreters(peers: list[str]) -> dict[str, str]:
    """Peer -> the first interpreter that finds the module it needs, if any does."""
    modules = sorted({PEERS[peer].requires for peer in peers})
    code = (
        "import importlib.util, sys;"
        "print(*[importlib.util.find_spec(name) is not None for name in sys.argv[1:]])"
    )
    found: dict[str, str] = {}
    for python in environments():
        command = [python, "-c", code, *modules]
        answers = subprocess.run(command, capture_output=True, text=True, check=True)
        for module, answer in zip(modules, answers.stdout.split(), strict=True):
            if answer == "True":
                found.setdefault(module, python)
    return {p: found[PEERS[p].requires] for p in peers if PEERS[p].requires in found}


@contextmanager
def workers(
    jobs: Mapping[str, tuple[str, str, Case]], data: str | None
) -> Iterator[dict[str, Worker]]:
    """Worker processes by name of the job `(interpreter, peer, case)`, then closed."""
    started: dict[str, Worker] = {}
    try:
        for name, (python, peer, case) in jobs.items():
            started[name] = Worker(python, peer, case, data)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def race(
    jobs: Mapping[str, tuple[str, str, Case]], data: str | None, limits: Limits
) -> tuple[dict[str, Result], set[str]]:
    """Run every job in turn, round after round.

    Args:
        jobs: Name -> interpreter, key of the peer, case.
        data: File with weights, inputs and exact block, or None.
        limits: What it may cost.

    Returns:
        Results by name of the job, and the versions of the libraries.
    """
    results = {name: Result(peer) for name, (_, peer, _) in jobs.items()}
    versions: set[str] = set()
    with workers(jobs, data) as started:

        def prepares(name: str) -> bool:
            return results[name].about.kind != "pytorch"

        def attempt(name: str, seconds: float, run: bool) -> dict[str, Any]:
            try:
                worker = started[name]
                return worker.run(seconds) if run else worker.answer(seconds)
            except WorkerError as error:
                if not results[name].times:
                    results[name].reason = str(error)
                started.pop(name).close()
                return {}

        for name in list(started):
            start = limits.start if prepares(name) else 2 * limits.cap
            versions.update(attempt(name, start, run=False).get("versions", []))
        for number in range(limits.rounds + 1):
            for name in list(started):
                result = results[name]
                if number and result.spent > limits.patience:
                    continue
                time.sleep(SETTLE)
                extra = 0.0 if number or not prepares(name) else limits.start
                record = attempt(name, limits.cap + extra, run=True)
                if record:
                    result.add(record)
                if not result.times and result.spent > limits.cap:
                    result.reason = f"more than {limits.cap:.0f} s"
                    started.pop(name).close()
    return results, versions
