"""What a forward pass stores for backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd stores in a forward pass, in storages other than the model's weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored = {}

    def keep(packed: Any) -> Any:
        if isinstance(packed, Tensor):
            storage = packed.untyped_storage()
            stored[storage.data_ptr()] = storage  # held, or its address may come again
        return packed

    class Counted(torch.autograd.graph.saved_tensors_hooks):
        """Counts what the model's hooks store too: of nested ones only the innermost are called."""

        def __init__(self, pack: Callable, unpack: Callable) -> None:
            super().__init__(lambda tensor: keep(pack(tensor)), unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", Counted)
        with Counted(lambda tensor: tensor, lambda packed: packed):
            forward()
    return sum(s.nbytes() for address, s in stored.items() if address not in weights)
