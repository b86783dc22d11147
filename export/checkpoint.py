"""Every checkpoint layout -> one canonical, lazy mapping from names to arrays, and a GPT2Config.

    openai-tensorflow      hparams.json and <prefix>.index, with <prefix>.data-?????-of-????? beside it
    safetensors            config.json and model.safetensors
    safetensors-sharded    config.json and model.safetensors.index.json, with its shards beside it

The canonical names are those of Hugging Face's state dict without "transformer."; matrices are [in, out]. Only this
file knows how others spell them. (Layout "onnx" are weights recovered from a graph: export/onnx_export.py.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.config import GPT2Config
from runtime.errors import CheckpointError

from .checkpoint_config import read_hf_config, read_hparams
from .checkpoint_files import Float32Array, StoredTensor, is_plain_name, read_small_file
from .safetensors_file import read_safetensors, read_sharded_safetensors
from .tensorbundle import read_index

Layout = Literal["openai-tensorflow", "safetensors", "safetensors-sharded", "onnx"]

FAULTS_SHOWN = 20
FILES_SHOWN = 8
POINTER_LIMIT_BYTES = 1 << 20  # of the text file "checkpoint", which lists every checkpoint that a training kept
HEAD = "lm_head.weight"
EMBEDDING = "wte.weight"
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old versions of transformers stored


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was recognised, and whose headers were checked.

    Attributes:
        folder: where it lies.
        layout: how it is stored.
        config: its numbers; `tie_word_embeddings` is what the tensors are, see `read_checkpoint`.
        source_config: its own config.json or hparams.json, as parsed, with all that GPT2Config has no field for.
        tensors: exactly the names and shapes of `canonical_shapes(config)`, in that order, each C-contiguous float32
            and finite. Every look-up reads from disk anew. Damage raises CheckpointError, with all damage there is.
    """

    folder: Path
    layout: Layout
    config: GPT2Config
    source_config: Mapping[str, Any]
    tensors: Mapping[str, Float32Array]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Recognise a checkpoint, and check its config and its headers; tensors are read later, one by one.

    A head (lm_head.weight) that equals the embedding bit for bit is tied, whatever the config says. A different one is
    kept where config.json says `tie_word_embeddings` false, else refused: transformers would ignore it.

    Args:
        folder: the checkpoint's folder.
    Returns:
        The checkpoint, its tensors unread (but for the head, if there is one).
    Raises:
        CheckpointError: no checkpoint, or no GPT-2, or not supported; or tensors are missing, unknown, misshaped, of
            another type, damaged or not finite. All faults of the tensors are named: once there is one, all are read.
    """
    layout = _recognise_layout(folder)
    if layout == "openai-tensorflow":
        source, declared = read_hparams(folder / "hparams.json")
        stored = {name: _drop_leading_one(tensor) for name, tensor in read_index(_find_index(folder)).items()}
    else:
        source, declared = read_hf_config(folder / "config.json")
        if layout == "safetensors":
            stored = read_safetensors(folder / "model.safetensors")
        else:
            stored = read_sharded_safetensors(folder / "model.safetensors.index.json")
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith(MASK_BUFFERS)}
    config, sources = _match_tensors(folder, layout, declared, stored)
    return Checkpoint(folder, layout, config, source, TensorsOnDisk(folder, sources))


def canonical_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a GPT-2, in canonical order: wte, wpe, h.0 ..., ln_f, and a head not tied.

    Matrices are [in, out]; wte.weight and lm_head.weight are both [n_vocab, n_embd].
    """
    embd, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.n_vocab, embd), "wpe.weight": (config.n_ctx, embd)}
    for layer in range(config.n_layer):
        for module, shape in {
            "ln_1": (embd,),
            "attn.c_attn": (embd, 3 * embd),
            "attn.c_proj": (embd, embd),
            "ln_2": (embd,),
            "mlp.c_fc": (embd, inner),
            "mlp.c_proj": (inner, embd),
        }.items():
            shapes[f"h.{layer}.{module}.weight"] = shape
            shapes[f"h.{layer}.{module}.bias"] = shape[-1:]
    shapes |= {"ln_f.weight": (embd,), "ln_f.bias": (embd,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.n_vocab, embd)
    return shapes


class TensorsOnDisk(Mapping[str, Float32Array]):
    """Canonical name -> array, read at the moment it is asked for."""

    def __init__(self, folder: Path, sources: Mapping[str, StoredTensor]) -> None:
        self._folder = folder
        self._sources = sources

    def __getitem__(self, name: str) -> Float32Array:
        tensor = self._sources[name]
        try:
            return tensor.read()
        except CheckpointError as error:
            faults = [*_find_damage(self._sources.values()), str(error)]
            raise _list_faults(self._folder, faults) from error

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


# --- layouts -----------------------------------------------------------------------------------------------------


def _recognise_layout(folder: Path) -> Layout:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} is no checkpoint folder: {error.strerror or error}") from error
    layouts: list[Layout] = []
    if "hparams.json" in names and any(name.endswith(".index") for name in names):
        layouts.append("openai-tensorflow")
    if "config.json" in names and "model.safetensors" in names:  # which transformers prefers to shards
        layouts.append("safetensors")
    elif "config.json" in names and "model.safetensors.index.json" in names:
        layouts.append("safetensors-sharded")
    if len(layouts) > 1:
        raise CheckpointError(f"{folder} holds two checkpoints, {' and '.join(layouts)}: move one to its own folder")
    if not layouts:
        more = f" and {len(names) - FILES_SHOWN} more" if len(names) > FILES_SHOWN else ""
        raise CheckpointError(
            f"{folder} is no checkpoint that can be read: looked for hparams.json with *.index (OpenAI), and for "
            "config.json with model.safetensors or model.safetensors.index.json (Hugging Face); found "
            f"{', '.join(names[:FILES_SHOWN]) or 'nothing'}{more}"
        )
    return layouts[0]


def _find_index(folder: Path) -> Path:
    """The index that the file "checkpoint" names, or the only one there is."""
    pointer = folder / "checkpoint"
    if not pointer.exists():
        indices = sorted(folder.glob("*.index"))
        if len(indices) > 1:
            raise CheckpointError(
                f"{folder} holds {len(indices)} checkpoints ({indices[0].name}, {indices[1].name} ...) and no file "
                "named checkpoint that says which one counts"
            )
        return indices[0]
    text = read_small_file(pointer, POINTER_LIMIT_BYTES).decode("utf-8", "replace")
    found = re.search(r'^model_checkpoint_path:\s*"([^"\n]+)"', text, re.MULTILINE)
    # The path may be absolute, and of the machine that trained: what counts is the file name at its end.
    prefix = re.split(r"[/\\]", found[1])[-1] if found else ""
    if not is_plain_name(prefix):
        raise CheckpointError(f'{pointer} has no line model_checkpoint_path: "..." that ends in a file name')
    return folder / f"{prefix}.index"


def _drop_leading_one(tensor: StoredTensor) -> StoredTensor:
    """OpenAI's matrices are convolutions of width one, [1, in, out]."""
    return replace(tensor, shape=tensor.shape[1:]) if len(tensor.shape) == 3 and tensor.shape[0] == 1 else tensor


def _spell(name: str, layout: Layout, prefix: str) -> str:
    """How the layout spells a canonical name: h.0.attn.c_attn.weight is model/h0/attn/c_attn/w in OpenAI's."""
    if layout != "openai-tensorflow":
        return name if name == HEAD else prefix + name
    module, _, kind = name.rpartition(".")
    module = re.sub(r"^h\.", "h", module).replace(".", "/")
    if module in ("wte", "wpe"):
        return f"model/{module}"
    letter = "b" if kind == "bias" else "g" if "ln_" in module else "w"
    return f"model/{module}/{letter}"


# --- tensors -----------------------------------------------------------------------------------------------------


def _match_tensors(
    folder: Path, layout: Layout, declared: GPT2Config, stored: Mapping[str, StoredTensor]
) -> tuple[GPT2Config, dict[str, StoredTensor]]:
    """The configuration with the head as it is, and the stored tensors by canonical name, in canonical order."""
    if declared.n_layer > len(stored):  # before names are made up for so many blocks
        raise CheckpointError(f"{folder}: its config says n_layer {declared.n_layer}, it holds {len(stored)} tensors")
    prefix = "transformer." if any(name.startswith("transformer.") for name in stored) else ""
    faults: list[str] = []
    config = declared
    if layout != "openai-tensorflow" and HEAD in stored:
        tied = _is_tied(stored[HEAD], stored.get(prefix + EMBEDDING), declared.tie_word_embeddings, faults)
        config = replace(declared, tie_word_embeddings=tied)
        if tied:
            stored = {name: tensor for name, tensor in stored.items() if name != HEAD}
    shapes = canonical_shapes(config)
    spelled = {name: _spell(name, layout, prefix) for name in shapes}
    sources = {name: stored[spelling] for name, spelling in spelled.items() if spelling in stored}
    known = set(spelled.values())
    faults += [f"{spelling} is missing" for spelling in spelled.values() if spelling not in stored]
    faults += [f"{name} is no tensor of this GPT-2" for name in stored if name not in known]
    faults += [
        f"{tensor.name} is {list(tensor.shape)}, expected {list(shapes[name])}"
        for name, tensor in sources.items()
        if tensor.shape != shapes[name]
    ]
    faults += [tensor.fault for tensor in sources.values() if tensor.fault]
    if faults:
        raise _list_faults(folder, [*faults, *_find_damage(sources.values())])
    return config, sources


def _is_tied(head: StoredTensor, embedding: StoredTensor | None, declared: bool, faults: list[str]) -> bool:
    """Whether the head that is stored is the embedding, bit for bit; a difference that is not declared is a fault."""
    if embedding is None:
        return False
    try:
        tied = head.shape == embedding.shape and all(
            np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
            for ours, theirs in zip(head.pieces(), embedding.pieces(), strict=True)
        )
    except CheckpointError as error:
        faults.append(str(error))
        return False
    if declared and not tied:
        faults.append(
            f"{HEAD} differs from {embedding.name}, but config.json says or implies tie_word_embeddings true: set it "
            f"to false to use both, or remove {HEAD}"
        )
    return tied


def _find_damage(tensors: Iterable[StoredTensor]) -> Iterator[str]:
    """Read everything, a piece at a time, and say what cannot be read."""
    for tensor in tensors:
        try:
            for _ in tensor.pieces():
                pass
        except CheckpointError as error:
            yield str(error)


def _list_faults(folder: Path, faults: Iterable[str]) -> CheckpointError:
    unique = list(dict.fromkeys(faults))
    more = f"; and {len(unique) - FAULTS_SHOWN} more" if len(unique) > FAULTS_SHOWN else ""
    count = "1 fault" if len(unique) == 1 else f"{len(unique)} faults"
    return CheckpointError(f"{folder}: {count} in its tensors: {'; '.join(unique[:FAULTS_SHOWN])}{more}")
