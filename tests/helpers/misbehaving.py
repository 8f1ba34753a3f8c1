"""Functions for worker processes: they hang, die, raise or eat memory, as told."""

import os
import signal
import sys
import time


def behave(what: object) -> object:
    """Runs in the other process: does what it is told."""
    if what == "hang":
        time.sleep(1000)
    elif what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "exit":
        os._exit(3)
    elif what == "raise":
        raise KeyError("numbers")
    elif what == "recurse":
        return behave_deeper(0)
    elif what == "eat":
        return len(bytearray(8 * 2**30))
    elif what == "modules":
        return "torch" in sys.modules
    elif what == "spin":
        return 3 ** (10**9)  # no signal handler of Python's runs before it ends
    elif isinstance(what, tuple):
        time.sleep(what[1])
    elif what == "process":
        return os.getpid()
    return what


def behave_deeper(depth: int) -> int:
    return behave_deeper(depth + 1) + 1


def doze(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
