"""A digest of a model's weights from their files, without loading them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from transformers.utils import cached_file

from opsd_train.model.policy import PACKAGED, packaged_gguf

_BLOCK = 2**12  # bytes
_BLOCKS = 2**16  # of a file, at most: 256 MiB, about half a second
_KINDS = ("*.safetensors", "*.bin", "*.gguf")


def weight_digest(name: str) -> str | None:
    """SHA-256 of the names, sizes and bytes of a model's weight files.

    All bytes of a file of up to 256 MiB; of a larger one 65,536 blocks of 4 KiB, evenly spread.
    `name`: a model.name_or_path. None if the files are not on this machine.
    """
    files = _weight_files(name)
    if not files:
        return None
    digest = sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            for first in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(first)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _weight_files(name: str) -> list[Path]:
    """The files of the first kind that there are any of, as transformers prefers them."""
    if name == PACKAGED:
        return [Path(*packaged_gguf())]
    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except OSError:
        return []
    folder = Path(str(found)).parent
    return next(filter(None, (sorted(folder.glob(kind)) for kind in _KINDS)), [])
