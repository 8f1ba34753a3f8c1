"""The device that tests of whole trainers use: the CPU, or what OPSD_TEST_DEVICE says.

"cuda" is a GPU. "stand-in" needs none: its tensors say they are on one (stand_in_gpu.py).
"""

import os

import pytest

CHOICE = os.environ.get("OPSD_TEST_DEVICE", "cpu")
if CHOICE not in ("cpu", "cuda", "stand-in"):
    raise ValueError(f"OPSD_TEST_DEVICE={CHOICE}: expected cpu, cuda or stand-in")
NAME = "cpu" if CHOICE == "cpu" else "cuda"
ON_CPU = NAME == "cpu"

starts_a_process = pytest.mark.skipif(
    CHOICE == "stand-in", reason="the stand-in for a GPU is in this process alone"
)
