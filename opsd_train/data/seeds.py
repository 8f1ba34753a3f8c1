"""Seeds that are the same on every machine, and the random streams of a process."""

import hashlib

import torch
from torch import Tensor


def stable_seed(*parts: object) -> int:
    """The same seed for the same parts in every process, unlike hash()."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def random_state() -> dict[str, Tensor]:
    """State of PyTorch's generators: "cpu", and "cuda" where there is a GPU."""
    cuda = torch.cuda.is_available()
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if cuda else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    """Go on with the streams of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
