"""What conftest sets before torch is loaded."""

import os
import subprocess
import sys
from pathlib import Path


def test_idle_threads_do_not_spin() -> None:
    """OpenMP itself says what it read."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", "import tests.conftest"],
        cwd=Path(__file__).parents[1],
        env={**environment, "OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if "OMP_WAIT_POLICY" in done.stderr:  # GNU's and LLVM's do; a torch without OpenMP does not
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
