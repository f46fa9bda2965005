"""One peer on one case, in a process of its own that waits to be told to run.

Speaks JSON, one object a line. Reads a job, then any number of `"run"`; answers
`{"ready": ...}`, then one record for each run, or `{"failed": reason}` and ends.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.roster import PEERS, Case

REPEAT_BELOW = 0.3  # seconds: fast kernels are computed several times in a run
MOST_REPEATS = 10


def protect_the_machine() -> int:
    """Bound the memory of this process; the kernel kills it before any other."""
    limit = int(0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if Path("/proc/self/oom_score_adj").exists():
        Path("/proc/self/oom_score_adj").write_text("1000")
    return limit


def status(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM`; the highest ever where Linux does not tell."""
    path = Path("/proc/self/status")
    if not path.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = path.read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])


def forget_peak() -> None:
    """Set the high-water mark to what is resident now, where that can be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def busy() -> tuple[float, float]:
    """Core-seconds of the whole machine, and of this process, so far."""
    own = sum(os.times()[:2])
    path = Path("/proc/stat")
    if not path.exists():
        return own, own
    fields = [int(f) for f in path.read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK"), own


def read(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights by name, and the rest (`"x"`, `"exact"`), as NumPy arrays."""
    import numpy as np

    with np.load(path) as file:
        arrays = dict(file)
    weights = {k: arrays.pop(k) for k in list(arrays) if k.startswith("weights/")}
    return {k.removeprefix("weights/"): v for k, v in weights.items()}, arrays


class Session:
    """A peer with its model and inputs loaded.

    Args:
        peer: A key of `PEERS`.
        case: The case.
        data: File with weights, inputs and exact block; None for a model without.
    """

    def __init__(self, peer: str, case: dict[str, Any], data: str | None) -> None:
        self.case, self.outputs = Case(**case), PEERS[peer].outputs
        self.exact: Any = None
        jax = PEERS[peer].kind == "jax"
        self.build = self._jax(peer, data) if jax else self._torch(peer, data)
        self.call: Callable[[], Any] | None = None
        trim()
        self.baseline = status("VmRSS")
        self.versions = [f"{m} {version(m)}" for m in ("jax" if jax else "torch",)]

    def _torch(self, peer: str, data: str | None) -> Callable[[], Any]:
        import torch

        from bench import models, torch_peers

        torch.set_num_threads(os.cpu_count() or 1)
        model, x = models.build(self.case)
        if data is not None:
            weights, rest = read(data)
            model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
            x, self.exact = torch.tensor(rest["x"]), rest["exact"]
        # On two examples first: what libraries load at first use is no memory of ours.
        torch_peers.BUILD[peer](model, x[:2])[0]()
        return lambda: torch_peers.BUILD[peer](model, x)

    def _jax(self, peer: str, data: str | None) -> Callable[[], Any]:
        import neural_tangents  # noqa: F401 - belongs to the memory before the run

        from bench import jax_peer

        assert data is not None
        weights, rest = read(data)
        x, self.exact = rest["x"], rest["exact"]

        def build() -> Any:
            built = jax_peer.build(self.case.network, weights, x, int(peer[-1]))
            trim()
            self.baseline = status("VmRSS")  # the compiled program counts as library
            return built

        return build

    def run(self) -> dict[str, Any]:
        """Compute the kernel a few times; the first run also builds the call."""
        record: dict[str, Any] = {"seconds": [], "measured": []}
        if self.call is None:
            start = time.perf_counter()
            self.call, record["facts"] = self.build()
            record["build"] = time.perf_counter() - start
        gc.collect()
        forget_peak()
        machine, own = busy()
        start = time.perf_counter()
        kernel = None
        while len(record["seconds"]) < MOST_REPEATS:
            kernel = None  # freed before the next one is computed
            before = time.perf_counter()
            kernel = self.call()
            now = time.perf_counter()
            record["seconds"].append(now - before)
            if isinstance(kernel, dict):
                record["measured"].append(kernel)
            if now - start > REPEAT_BELOW:
                break
        wall = time.perf_counter() - start
        machine_now, own_now = busy()
        record["others"] = max(0.0, machine_now - machine - (own_now - own))
        record["wall"] = wall
        record["peak"] = max(0, status("VmHWM") - self.baseline)
        record["error"] = self.error(kernel)
        return record

    def error(self, kernel: Any) -> float | None:
        """Relative Frobenius error on the checked examples against float64."""
        import numpy as np

        if self.exact is None or isinstance(kernel, dict):
            return None
        kernel, exact = np.asarray(kernel), self.exact
        n, c, checked = self.case.n, self.case.outputs, self.case.checked
        if kernel.ndim == 2 and self.outputs == "full":
            kernel = kernel.reshape(n, c, n, c).transpose(0, 2, 1, 3)
        if self.outputs == "pseudo":
            exact = exact.sum((2, 3)) / c
        elif self.outputs != "full":
            exact = np.diagonal(exact, axis1=2, axis2=3)
            exact = exact.mean(2) if self.outputs == "trace" else exact
        block = kernel[np.ix_(checked, checked)].astype(np.float64)
        return float(np.linalg.norm(block - exact) / np.linalg.norm(exact))


def reason(error: BaseException, limit: int) -> str:
    """Why a peer gives no number, in a few words."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"out of memory (limit {limit / 1e9:.0f} GB)"
    return f"{type(error).__name__}: {text}"


def main() -> None:
    """Serve the parent until it closes the pipe."""
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    limit = protect_the_machine()

    def answer(record: dict[str, Any]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    try:
        session = Session(**json.loads(sys.stdin.readline()))
        answer({"ready": True, "versions": session.versions})
        for _ in sys.stdin:
            answer(session.run())
    except Exception as error:
        answer({"failed": reason(error, limit)})


if __name__ == "__main__":
    main()
