"""Hugging Face's shards: an index in JSON that maps each tensor to the file beside it that holds it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from runtime.errors import CheckpointError

from .checkpoint_files import Tensor, is_plain_name, read_json_object

FAULTS_SHOWN = 20

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def read_shards(index: Path, suffix: str, read_shard: Callable[[Path], dict[str, AnyTensor]]) -> dict[str, AnyTensor]:
    """Read and verify the headers of all files that an index names.

    Args:
        index: the index; its files lie beside it.
        suffix: with which the name of each file must end.
        read_shard: reads one file.
    Returns:
        Tensors by name, shard after shard.
    Raises:
        CheckpointError: the index or any shard is missing or damaged, or they contradict each other; all are named.
    """
    weight_map = _read_weight_map(index, suffix)
    faults: list[str] = []
    found: dict[str, AnyTensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        try:
            tensors = read_shard(index.with_name(shard))
        except CheckpointError as error:
            faults.append(str(error))
            continue
        faults += [
            f"{name} is in {shard}, the index says {weight_map.get(name, 'nothing of it')}"
            for name in tensors
            if weight_map.get(name) != shard
        ]
        faults += [
            f"{name} is not in {shard}" for name, of in weight_map.items() if of == shard and name not in tensors
        ]
        found |= tensors
    if faults:
        more = "; and more" if len(faults) > FAULTS_SHOWN else ""
        raise CheckpointError(f"{index}: {'; '.join(faults[:FAULTS_SHOWN])}{more}")
    return found


def _read_weight_map(index: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file name, each of a file beside the index."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for name, shard in weight_map.items():
        if not is_plain_name(name):
            raise CheckpointError(f"{index}: tensor name {name[:80]!r} is not printable text")
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(suffix):
            raise CheckpointError(f"{index}: {name} lies in {reprlib.repr(shard)}, expected a {suffix} file")
        if "/" in shard or "\\" in shard or ":" in shard:
            raise CheckpointError(f"{index}: {name} lies in {shard!r}, expected a file beside the index")
    return weight_map
