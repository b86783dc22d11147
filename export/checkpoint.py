"""Every checkpoint layout -> one canonical, lazy mapping from names to arrays, and a GPT2Config.

The canonical names are those of Hugging Face's state dict without "transformer."; matrices are [in, out]. Only this
file and `layouts`, which reads each layout as it is, know how others spell and turn them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.config import GPT2Config
from runtime.errors import CheckpointError

from .checkpoint_files import Float32Array, HeldTensor, Tensor
from .layouts import HUGGING_FACE, NANOGPT, Layout, StoredCheckpoint, read_layout
from .lazy_tensors import LazyTensors
from .tokenizer_files import END_OF_TEXT

logger = logging.getLogger(__name__)

FAULTS_SHOWN = 20
HEAD = "lm_head.weight"
EMBEDDING = "wte.weight"
WITHOUT_VOCABULARY: tuple[Layout, ...] = ("nanogpt", "llm.c")
"""Layouts that say how many rows the embedding has, not what they mean: the last ones may be padding."""
PADDING_LIMIT = 1024
"""Rows; vocabularies are padded to a multiple of 64 or 128, of 1024 at most. More is no padding: another tokenizer."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was recognised, and whose headers were checked.

    Attributes:
        folder: where it lies, its tokenizer beside it.
        name: of its folder, or of its file where that has a name of its own.
        layout: how it is stored.
        config: its numbers; `tie_word_embeddings` is what the tensors are, see `read_checkpoint`.
        source_config: its own config.json, hparams.json, model_args or header, as parsed, with all that GPT2Config
            has no field for.
        tensors: exactly the names and shapes of `canonical_shapes(config)`, in that order, each C-contiguous float32
            and finite. Every look-up reads from disk anew. Damage raises CheckpointError, with all damage there is.
    """

    folder: Path
    name: str
    layout: Layout
    config: GPT2Config
    source_config: Mapping[str, Any]
    tensors: Mapping[str, Float32Array]


def read_checkpoint(path: Path) -> Checkpoint:
    """Recognise a checkpoint, and check its config and its headers; tensors are read later, one by one.

    A head (lm_head.weight) that equals the embedding bit for bit is tied, whatever the config says. A different one is
    kept where config.json says `tie_word_embeddings` false, else refused: transformers would ignore it.

    Args:
        path: the checkpoint's folder, or its file where it is one file; see `layouts`.
    Returns:
        The checkpoint, its tensors unread (but for the head, if there is one).
    Raises:
        CheckpointError: no checkpoint, or no GPT-2, or not supported; or tensors are missing, unknown, misshaped, of
            another type, damaged or not finite. All faults of the tensors are named: once there is one, all are read.
    """
    stored = read_layout(path)
    config, tensors = _match_tensors(path, stored)
    return Checkpoint(
        folder=path.parent if path.is_file() else path,
        name=checkpoint_name(path),
        layout=stored.layout,
        config=config,
        source_config=stored.source_config,
        tensors=tensors,
    )


def checkpoint_name(path: Path) -> str:
    """What a checkpoint is called: as its folder, or as its file, unless that is called as all others are."""
    path = path.resolve()
    if not path.is_file():
        return path.name
    return path.parent.name if path.name == NANOGPT else path.stem


def fit_vocabulary(checkpoint: Checkpoint, ids: Mapping[str, int]) -> Checkpoint:
    """The checkpoint with the vocabulary of its tokenizer, where the layout has none of its own.

    Rows of the embedding beyond the tokens are padding there, and are dropped: no text has them, and what the model
    makes of them is chance. Layouts that declare a vocabulary keep it.

    Args:
        checkpoint: of any layout.
        ids: token -> id of its tokenizer, without gaps, `<|endoftext|>` among them.
    Raises:
        CheckpointError: there are far too many rows for padding.
    """
    n_vocab, n_tokens = checkpoint.config.n_vocab, len(ids)
    if checkpoint.layout not in WITHOUT_VOCABULARY:
        return checkpoint
    if n_vocab - n_tokens >= PADDING_LIMIT:
        raise CheckpointError(
            f"{checkpoint.folder}: the embedding has {n_vocab} rows, the tokenizer {n_tokens} tokens, more rows than "
            "padding explains; name a folder with its own tokenizer with --tokenizer DIR"
        )
    if n_tokens < n_vocab:
        logger.warning(
            "%s: the last %d of %d rows of the embedding are padding, and dropped: the tokenizer has %d tokens",
            checkpoint.folder,
            n_vocab - n_tokens,
            n_vocab,
            n_tokens,
        )
    assert isinstance(checkpoint.tensors, TensorsOnDisk), "these layouts lie on disk"
    config = replace(checkpoint.config, n_vocab=n_tokens, eos_token_id=ids[END_OF_TEXT])
    return replace(checkpoint, config=config, tensors=checkpoint.tensors.with_rows(EMBEDDING, n_tokens))


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


class TensorsOnDisk(LazyTensors[Float32Array]):
    """Canonical name -> array, read at the moment it is asked for."""

    def __init__(self, where: Path, sources: Mapping[str, Tensor], turned: frozenset[str]) -> None:
        """`where` is for messages; `turned` are the matrices that are stored [out, in]."""
        super().__init__(sources)
        self._where = where
        self.sources = sources
        self._turned = turned

    def __getitem__(self, name: str) -> Float32Array:
        tensor = self.sources[name]
        try:
            values = tensor.read()
        except CheckpointError as error:
            faults = [*_find_damage(self.sources.values()), str(error)]
            raise _list_faults(self._where, faults) from error
        return np.ascontiguousarray(values.T) if name in self._turned else values

    def with_rows(self, name: str, count: int) -> TensorsOnDisk:
        """The same tensors, one of them cut to its first rows."""
        return TensorsOnDisk(self._where, {**self.sources, name: self.sources[name].rows(count)}, self._turned)


# --- tensors -----------------------------------------------------------------------------------------------------


def _match_tensors(where: Path, checkpoint: StoredCheckpoint) -> tuple[GPT2Config, TensorsOnDisk]:
    """The configuration with the head as it is, and the stored tensors by canonical name, in canonical order."""
    layout, config, stored = checkpoint.layout, checkpoint.config, checkpoint.tensors
    if config.n_layer > len(stored):  # before names are made up for so many blocks
        raise CheckpointError(f"{where}: its config says n_layer {config.n_layer}, it holds {len(stored)} tensors")
    prefix = "transformer." if any(name.startswith("transformer.") for name in stored) else ""
    faults: list[str] = []
    if layout != "openai-tensorflow" and HEAD in stored:
        tied = _is_tied(checkpoint, stored.get(prefix + EMBEDDING), faults)
        config = replace(config, tie_word_embeddings=tied)
        if tied:
            stored = {name: tensor for name, tensor in stored.items() if name != HEAD}
    shapes = canonical_shapes(config)
    absent = {name for name in shapes if name.endswith(".bias") and not checkpoint.has_biases}
    turned = {name for name in shapes if checkpoint.linears_out_in and name.startswith("h.") and len(shapes[name]) == 2}
    spelled = {name: _spell(name, layout, prefix) for name in shapes if name not in absent}
    found = {name: stored[spelling] for name, spelling in spelled.items() if spelling in stored}
    known = set(spelled.values())
    faults += [f"{spelling} is missing" for spelling in spelled.values() if spelling not in stored]
    faults += [f"{name} is no tensor of this GPT-2" for name in stored if name not in known]
    for name, tensor in found.items():
        expected = shapes[name][::-1] if name in turned else shapes[name]
        if tensor.shape != expected:
            faults.append(f"{tensor.name} is {list(tensor.shape)}, expected {list(expected)}")
    faults += [tensor.fault for tensor in found.values() if tensor.fault]
    if faults:
        raise _list_faults(where, [*faults, *_find_damage(found.values())])
    sources = {
        name: HeldTensor(name, np.zeros(shape, np.float32)) if name in absent else found[name]
        for name, shape in shapes.items()
    }
    return config, TensorsOnDisk(where, sources, frozenset(turned))


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


def _is_tied(checkpoint: StoredCheckpoint, embedding: Tensor | None, faults: list[str]) -> bool:
    """Whether the head that is stored is the embedding, bit for bit; a difference that is not declared is a fault."""
    head = checkpoint.tensors[HEAD]
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
    if checkpoint.config.tie_word_embeddings and not tied:
        in_config = (
            f"config.json says or implies tie_word_embeddings true: set it to false to use both, or remove {HEAD}"
        )
        ties = in_config if checkpoint.layout in HUGGING_FACE.values() else f"{checkpoint.layout} ties them"
        faults.append(f"{HEAD} differs from {embedding.name}, but {ties}")
    return tied


def _find_damage(tensors: Iterable[Tensor]) -> Iterator[str]:
    """Read everything, a piece at a time, and say what cannot be read."""
    for tensor in tensors:
        try:
            for _ in tensor.pieces():
                pass
        except CheckpointError as error:
            yield str(error)


def _list_faults(where: Path, faults: Iterable[str]) -> CheckpointError:
    unique = list(dict.fromkeys(faults))
    more = f"; and {len(unique) - FAULTS_SHOWN} more" if len(unique) > FAULTS_SHOWN else ""
    count = "1 fault" if len(unique) == 1 else f"{len(unique)} faults"
    return CheckpointError(f"{where}: {count} in its tensors: {'; '.join(unique[:FAULTS_SHOWN])}{more}")
