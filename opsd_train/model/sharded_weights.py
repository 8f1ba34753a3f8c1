"""Each rank's part of a model's weights, read slice by slice from a safetensors file.

A rank never holds the whole model: `without_weights` builds it without memory for its weights,
fully_shard then decides which part each rank has, and `read_weights` gives the parts memory and
reads them, one decoder layer at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from opsd_train.distributed.fsdp import local_shard


def weights_folder(name: str) -> Path | None:
    """The folder of the model's safetensors files, from the hub if need be; None if there is none.

    None too if the folder has other safetensors files than the model's.
    """
    folder = Path(name)
    if not folder.is_dir():
        patterns = [SAFE_WEIGHTS_NAME, "model-*.safetensors", SAFE_WEIGHTS_INDEX_NAME]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    wanted = {SAFE_WEIGHTS_NAME}
    if index.exists():
        wanted = set(json.loads(index.read_text())["weight_map"].values())
    return folder if {path.name for path in folder.glob("*.safetensors")} == wanted else None


def without_weights(
    config: Any, folder: Path, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel | None:
    """The causal LM of a transformers config without memory for its weights, but with its buffers.

    None if the files in `folder` hold other tensors than the model: quantised ones, or some that
    transformers converts when it loads them; or if the model leaves a buffer unfilled. Adapters
    can be added to the model as to any other.
    """
    with torch.device("meta"):
        core = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if getattr(config, "quantization_config", None) or not _has_tensors(core, folder):
        return None
    if not _fill_buffers(core):
        return None
    # One number in place of a weight: peft gives an adapter the device and dtype of its layer.
    _replace(core.modules(), lambda p: torch.zeros((), dtype=p.dtype).expand(p.shape))
    core.eval()
    return cast(PreTrainedModel, core)


def empty_weights(core: nn.Module) -> None:
    """Make the weights of `without_weights` meta tensors, which fully_shard takes; not adapters."""
    _replace(core.modules(), lambda p: p.detach().to("meta") if not any(p.stride()) else p.detach())


@torch.no_grad()
def read_weights(
    core: PreTrainedModel, layers: Iterable[nn.Module], folder: Path, device: torch.device
) -> None:
    """Give the meta parameters of a sharded `core` memory on `device`, and read their values.

    Buffers and adapters keep theirs. Tensors of a decoder layer are read together.
    """
    kept = {
        name: local_shard(tensor).clone()
        for name, tensor in _tensors(core).items()
        if not tensor.is_meta
    }
    with _tied_weights_kept():
        core.to_empty(device=device)
    groups: dict[str, dict[str, Tensor]] = {}
    prefixes = {id(module): name for name, module in core.named_modules()}
    within = [f"{prefixes[id(layer)]}." for layer in layers]
    for name, tensor in _tensors(core).items():
        if name in kept:
            local_shard(tensor).copy_(kept[name])
            continue
        layer = next((prefix for prefix in within if name.startswith(prefix)), name)
        groups.setdefault(layer, {})[_name_in_file(name)] = tensor.detach()
    reader = HuggingFaceStorageReader(str(folder))
    for tensors in groups.values():
        load(tensors, storage_reader=reader, no_dist=True)


def _fill_buffers(core: PreTrainedModel) -> bool:
    """Make the buffers that no file has, as from_pretrained does; whether all are filled."""
    found = list(_own_buffers(core))
    for buffers, name in found:
        buffer = buffers[name]
        buffers[name] = torch.full_like(buffer, _unset(buffer.dtype), device="cpu")
    for module in core.modules() if found else ():  # a model may fill those of its layers
        core._init_weights(module)
    made = (buffers[name] for buffers, name in _own_buffers(core))
    return not any((b.isnan() | (b == _unset(b.dtype))).any() for b in made)


def _own_buffers(core: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where each buffer is that is saved in no file."""
    for module in core.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None:
                yield module._buffers, name


def _unset(dtype: torch.dtype) -> float | int:
    """A value that no buffer has by itself; of bool there is none, so True counts as unset."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).min


@contextmanager
def _tied_weights_kept() -> Iterator[None]:
    """Context in which a module that moves changes its parameters instead of replacing them."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _tensors(core: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and buffers."""
    return {**dict(core.named_parameters()), **dict(core.named_buffers())}


def _name_in_file(name: str) -> str:
    return name.replace(".base_layer", "")


def _has_tensors(core: nn.Module, folder: Path) -> bool:
    """Whether the files hold a tensor of this shape for every parameter and persistent buffer."""
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    saved = core.state_dict(keep_vars=True)
    wanted = {name: t for name, t in _tensors(core).items() if name in saved}
    return all(shapes.get(name) == list(tensor.shape) for name, tensor in wanted.items())


def _replace(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(make(parameter), parameter.requires_grad)
                module._parameters[name] = made[parameter]
