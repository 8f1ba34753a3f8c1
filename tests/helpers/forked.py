"""Processes that start with torch and the trainer imported: forked from one that only imports."""

import functools
import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]


@functools.cache
def forking() -> ForkServerContext:
    """A context of multiprocessing whose processes have done their imports, which take 10 s of CPU.

    Triton is imported there for its interpreter, by tests/conftest.py. Nothing else has run: no
    thread, no process group.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "torch._dynamo", "tests.helpers.steps"])
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    with mock.patch.dict(os.environ, PYTHONPATH=paths):
        forkserver.ensure_running()
    return context
