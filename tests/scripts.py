"""Scripts as users run them, in processes that need not import torch anew each time.

One process imports what scripts begin with, and does nothing else; every script runs in
a fork of it: no module, flag or random state that another script left is there.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

PRELOADED = [
    "lightning.pytorch.loggers",
    "ntk_callbacks.callbacks.kernel",
    "sklearn.datasets",
    "torch.utils.tensorboard",
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(PRELOADED)


def run_script(script, folder, *words, timeout=300):
    """Exit code, output and errors of `python <script> <words>` in a folder."""
    with TemporaryDirectory() as elsewhere:
        streams = [Path(elsewhere, name) for name in ("output", "errors")]
        process = _forks.Process(target=_run, args=(script, folder, words, streams))
        with pytest.MonkeyPatch.context() as patch:
            # Processes with a thread for each core wait for one another. The first
            # script starts the process that all are forks of.
            patch.setenv("OMP_NUM_THREADS", "1")
            process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        output, errors = (stream.read_text("utf-8") for stream in streams)
    return process.exitcode, output, errors


def _run(script, folder, words, streams):
    """In the process of a script."""
    for number, stream in zip((1, 2), streams, strict=True):
        opened = os.open(stream, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
    os.chdir(folder)
    sys.argv = [Path(script).name, *words]
    runpy.run_path(str(script), run_name="__main__")
