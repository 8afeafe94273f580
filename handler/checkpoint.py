"""placeholder"""
from __future__ import annotations
import os
from collections.abc import Callable, Mapping
from pathlib import Path
import torch
from torch import Tensor
from safetensors.torch import save_file


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbouring file, flush it to the disk, then put it in `path`'s place at once."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, half: bool = False) -> None:
    """Write floating-point tensors, as fp16 if `half`; counters such as `num_batches_tracked` are left out."""
    floats = {n: t.detach().cpu().to(torch.float16 if half else t.dtype).contiguous() for n, t in tensors.items() if t.is_floating_point()}
    write_atomically(path, lambda part: save_file(floats, part))
