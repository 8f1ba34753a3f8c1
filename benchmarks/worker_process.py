"""A contender in its own process: commands as JSON lines on its stdin, answers on its stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.environment import ROOT
from opsd_train.config.errors import UserError


class WorkerProcess:
    """Runs a module as a process and talks to it in JSON lines; a context manager.

    name         what errors call it
    environment  added to this process's own
    """

    def __init__(
        self, name: str, module: str, arguments: list[str], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=os.environ | dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:  # it may be in the middle of a long step
            self._process.kill()
        self._process.communicate()  # closes its stdin, which ends it
        self._errors.close()

    def send(self, do: str, **values: Any) -> None:
        """Send a command. Raises UserError if the process has died."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UserError(self._death()) from None

    def receive(self) -> dict[str, Any]:
        """Wait for an answer. Raises UserError if the process has died."""
        line = self._process.stdout.readline()
        if not line:
            raise UserError(self._death())
        return json.loads(line)

    def _death(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it left no message")
        return f"{self.name}: its process ended with code {code}: {last.strip()}"
