"""Seeds that are the same on every machine, and the state of PyTorch's generators."""

import hashlib

import torch
from torch import Tensor


def stable_seed(*parts: object) -> int:
    """A 32-bit seed from the parts' repr, the same in every process, unlike hash()."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def random_state() -> dict[str, Tensor]:
    """State of PyTorch's generators: "cpu", and "cuda" for the current GPU if there is one."""
    cuda = torch.cuda.is_available()
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if cuda else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    """Restore a state of `random_state`; "cuda" only if there is a GPU."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
