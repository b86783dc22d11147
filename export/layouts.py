"""Every checkpoint layout, recognised and read in its own names.

openai-tensorflow           hparams.json and <prefix>.index, with <prefix>.data-?????-of-????? beside it
safetensors                 config.json and model.safetensors
safetensors-sharded         config.json and model.safetensors.index.json, with its shards beside it
hugging-face-bin            config.json and pytorch_model.bin
hugging-face-bin-sharded    config.json and pytorch_model.bin.index.json, with its shards beside it
nanogpt                     ckpt.pt, or any .pt file by its path
llm.c                       the only file *.bin that begins with llm.c's magic number, or any such file by its path
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from runtime.config import GPT2Config
from runtime.errors import CheckpointError

from .checkpoint_config import read_hf_config, read_hparams, read_llmc_header, read_model_args
from .checkpoint_files import HeldTensor, StoredTensor, Tensor, is_plain_name, read_small_file
from .llmc_file import is_llmc, read_llmc
from .safetensors_file import read_safetensors, read_sharded_safetensors
from .shards import read_shards
from .tensorbundle import read_index
from .torch_file import read_torch_file

Layout = Literal[
    "openai-tensorflow",
    "safetensors",
    "safetensors-sharded",
    "hugging-face-bin",
    "hugging-face-bin-sharded",
    "nanogpt",
    "llm.c",
    "onnx",  # weights recovered from a graph, see onnx_export
]

# File -> layout, in the order in which transformers prefers them: a folder often holds several of one model.
HUGGING_FACE: Mapping[str, Layout] = {
    "model.safetensors": "safetensors",
    "model.safetensors.index.json": "safetensors-sharded",
    "pytorch_model.bin": "hugging-face-bin",
    "pytorch_model.bin.index.json": "hugging-face-bin-sharded",
}

FILES_SHOWN = 8
POINTER_LIMIT_BYTES = 1 << 20  # of the text file "checkpoint", which lists every checkpoint that a training kept
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old versions of transformers stored
NANOGPT = "ckpt.pt"
WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # what torch.compile and DataParallel put before every name


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint as its layout has it.

    Attributes:
        config: what the layout's own config declares.
        source_config: that config as parsed.
        tensors: by the layout's own names, wrappers and mask buffers taken off.
        linears_out_in: matrices of the blocks are [out, in], not [in, out].
        has_biases: False: there are no biases at all, and the function is that of biases of zero.
    """

    layout: Layout
    config: GPT2Config
    source_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    linears_out_in: bool = False
    has_biases: bool = True


def read_layout(path: Path) -> StoredCheckpoint:
    """Recognise a checkpoint, a folder or one file, and read its config and its headers.

    Raises:
        CheckpointError: no checkpoint, or two; or its config or a header is damaged, or not supported.
    """
    layout, file = _recognise_file(path) if path.is_file() else _recognise_folder(path)
    if layout == "openai-tensorflow":
        stored = _read_openai(file)
    elif layout == "nanogpt":
        stored = _read_nanogpt(file)
    elif layout == "llm.c":
        header, parts = read_llmc(file)
        config = read_llmc_header(file, header)
        stored = StoredCheckpoint(
            layout=layout, config=config, source_config=asdict(header), tensors=parts, linears_out_in=True
        )
    else:
        stored = _read_hugging_face(layout, file)
    kept = {name: tensor for name, tensor in stored.tensors.items() if not name.endswith(MASK_BUFFERS)}
    return replace(stored, tensors=kept)


def _recognise_file(path: Path) -> tuple[Layout, Path]:
    if is_llmc(path):
        return "llm.c", path
    if path.suffix == ".pt":
        return "nanogpt", path
    raise CheckpointError(
        f"{path} is no checkpoint that is one file, *.pt (nanoGPT) or one that begins as llm.c's do; of any other "
        "layout, name the folder"
    )


def _recognise_folder(folder: Path) -> tuple[Layout, Path]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} is no checkpoint folder: {error.strerror or error}") from error
    found: list[tuple[Layout, Path]] = []
    if "hparams.json" in names and any(name.endswith(".index") for name in names):
        found.append(("openai-tensorflow", folder))
    if "config.json" in names:
        found += [(layout, folder / name) for name, layout in HUGGING_FACE.items() if name in names][:1]
    if NANOGPT in names:
        found.append(("nanogpt", folder / NANOGPT))
    of_llmc = [folder / name for name in names if name.endswith(".bin") and is_llmc(folder / name)]
    if len(of_llmc) > 1:
        raise CheckpointError(
            f"{folder} holds {len(of_llmc)} checkpoints of llm.c ({of_llmc[0].name}, {of_llmc[1].name} ...): name one "
            "of these files"
        )
    found += [("llm.c", path) for path in of_llmc]
    if len(found) > 1:
        layouts = " and ".join(layout for layout, _ in found)
        raise CheckpointError(f"{folder} holds two checkpoints, {layouts}: move one to its own folder")
    if not found:
        more = f" and {len(names) - FILES_SHOWN} more" if len(names) > FILES_SHOWN else ""
        raise CheckpointError(
            f"{folder} is no checkpoint that can be read: looked for hparams.json with *.index (OpenAI), for "
            f"config.json with {' or '.join(HUGGING_FACE)} (Hugging Face), for {NANOGPT} (nanoGPT), and for *.bin of "
            f"llm.c; found {', '.join(names[:FILES_SHOWN]) or 'nothing'}{more}"
        )
    return found[0]


# --- OpenAI ------------------------------------------------------------------------------------------------------


def _read_openai(folder: Path) -> StoredCheckpoint:
    source, config = read_hparams(folder / "hparams.json")
    tensors = {name: _drop_leading_one(tensor) for name, tensor in read_index(_find_index(folder)).items()}
    return StoredCheckpoint(layout="openai-tensorflow", config=config, source_config=source, tensors=tensors)


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


# --- Hugging Face ------------------------------------------------------------------------------------------------


def _read_hugging_face(layout: Layout, file: Path) -> StoredCheckpoint:
    source, config = read_hf_config(file.with_name("config.json"))
    tensors: Mapping[str, Tensor]
    if layout == "safetensors":
        tensors = read_safetensors(file)
    elif layout == "safetensors-sharded":
        tensors = read_sharded_safetensors(file)
    elif layout == "hugging-face-bin":
        tensors = _read_state_dict(file)
    else:
        tensors = read_shards(file, ".bin", _read_state_dict)
    return StoredCheckpoint(layout=layout, config=config, source_config=source, tensors=tensors)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    return _only_tensors(path, read_torch_file(path))


def _only_tensors(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, (StoredTensor, HeldTensor)):
            raise CheckpointError(f"{path}: {str(name)[:80]!r} is a {type(value).__name__}, expected a tensor")
    return dict(content)


# --- nanoGPT -----------------------------------------------------------------------------------------------------


def _read_nanogpt(path: Path) -> StoredCheckpoint:
    content = read_torch_file(path)
    model, model_args = content.get("model"), content.get("model_args")
    if not isinstance(model, dict) or not isinstance(model_args, dict):
        raise CheckpointError(f"{path} is no checkpoint of nanoGPT: it has no model and model_args")
    config, has_biases = read_model_args(path, model_args)
    stored = _only_tensors(path, model)
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in stored.items()}
    if len(tensors) != len(stored):
        raise CheckpointError(f"{path} holds a tensor twice, with and without _orig_mod. or module. before its name")
    return StoredCheckpoint(
        layout="nanogpt",
        config=config,
        source_config=model_args,
        tensors=tensors,
        linears_out_in=True,
        has_biases=has_biases,
    )
