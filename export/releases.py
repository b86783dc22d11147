"""OpenAI's four releases: what people call them, where they are published, and how their files are known to be genuine.

Their numbers (layers, heads, widths) are in runtime/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.config import OFFICIAL_SIZES

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """What is known of a file before it is downloaded; None where nobody wrote it down."""

    sha256: str | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One size, as Hugging Face and OpenAI publish it.

    Attributes:
        aliases: other names for it, in lower case.
        repository: Hugging Face id.
        revision: commit of that repository.
        weights_sha256: of its model.safetensors.
        openai_url: folder of OpenAI's own files.
        openai_files: their names. What has no sha256 is proved when it is read: the index holds a crc32c of itself and
            of every tensor.
    """

    aliases: tuple[str, ...]
    repository: str
    revision: str
    weights_sha256: str
    openai_url: str
    openai_files: Mapping[str, PublishedFile]

    @property
    def repositories(self) -> tuple[str, ...]:
        """Where it may lie in a cache: openai-community/gpt2-large, and gpt2-large from before there were owners."""
        return self.repository, self.repository.rpartition("/")[2]


def _openai_files(size: str, index_sha256: str | None, data_sha256: str | None) -> dict[str, PublishedFile]:
    """The files of one size; all have the same vocabulary, and hparams.json is not the same bytes everywhere."""
    return {
        "checkpoint": PublishedFile(),
        "hparams.json": PublishedFile(),
        "encoder.json": PublishedFile(sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
        "vocab.bpe": PublishedFile(sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        "model.ckpt.index": PublishedFile(sha256=index_sha256),
        "model.ckpt.data-00000-of-00001": PublishedFile(
            sha256=data_sha256, bytes=4 * OFFICIAL_SIZES[size].parameter_count
        ),
    }


RELEASES: Mapping[str, Release] = {
    "124M": Release(
        aliases=("117m", "gpt2", "small", "openai-community/gpt2"),
        repository="openai-community/gpt2",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
        weights_sha256="248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        openai_url=f"{OPENAI_URL}/124M",
        openai_files=_openai_files(
            "124M",
            index_sha256="71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
            data_sha256="2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
        ),
    ),
    "355M": Release(
        aliases=("345m", "gpt2-medium", "medium", "openai-community/gpt2-medium"),
        repository="openai-community/gpt2-medium",
        revision="6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        weights_sha256="fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
        openai_url=f"{OPENAI_URL}/355M",
        openai_files=_openai_files("355M", None, None),
    ),
    "774M": Release(
        aliases=("gpt2-large", "large", "openai-community/gpt2-large"),
        repository="openai-community/gpt2-large",
        revision="32b71b12589c2f8d625668d2335a01cac3249519",
        weights_sha256="5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
        openai_url=f"{OPENAI_URL}/774M",
        openai_files=_openai_files("774M", None, None),
    ),
    "1558M": Release(
        aliases=("1.5b", "gpt2-xl", "xl", "openai-community/gpt2-xl"),
        repository="openai-community/gpt2-xl",
        revision="15ea56dee5df4983c59b2538573817e1667135e2",
        weights_sha256="0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        openai_url=f"{OPENAI_URL}/1558M",
        openai_files=_openai_files("1558M", None, None),
    ),
}


def canonical_size(name: str, releases: Mapping[str, Release]) -> str | None:
    """The size that a name stands for, in upper or lower case: "1558M" for "gpt2-xl"; None if it is no size's name."""
    wanted = name.lower()
    for size, release in releases.items():
        if wanted == size.lower() or wanted in release.aliases:
            return size
    return None
