"""Which provider runs the nodes of a session: proven of every session, and what is not what was asked for refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DeviceError
from .place import Place
from .provider import CPU_PROVIDER, PROVIDERS, versions
from .wheel import load_onnxruntime

if TYPE_CHECKING:
    import onnxruntime

RECORD = ("session.record_ep_graph_assignment_info", "1")
"""A session's option. Told after it was opened are the nodes of each provider; it costs less than a millisecond for the
1,211 nodes of 774M. Source: onnxruntime_session_options_config_keys.h"""

SHAPE_OPERATORS = frozenset({"Add", "Cast", "Concat", "Gather", "Neg", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"})
"""What may run on the CPU beside a GPU: it computes lengths there from shapes, which the CPU knows. Where such a node
would read what the GPU wrote, or the other way round, there is a copy, and the session is refused for it."""

COPIES = (b"\x22\x0eMemcpyFromHost", b"\x22\x0cMemcpyToHost")
"""The nodes that onnxruntime puts between host and device, as a serialized graph holds them (NodeProto.op_type)."""

OPERATORS_NAMED = 5
"""A message names an example of so many operators; a graph for another device has hundreds of nodes."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph as it runs, and the provider that it was given to."""

    name: str
    operator: str
    provider: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Where a session runs. None stands for what this onnxruntime does not tell, and for libraries that do not run."""

    asked_for: str  # as cuda:1
    providers: tuple[str, ...]  # that run at least one node; where that is unknown, those of the session
    nodes: Mapping[str, int] | None  # by provider
    copies: int | None  # nodes that copy between host and device in every run
    versions: Mapping[str, str | None]  # of onnxruntime, its wheel, CUDA, cuDNN, TensorRT and the driver

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """On one line."""
        nodes = "unknown" if self.nodes is None else ", ".join(f"{count} {name}" for name, count in self.nodes.items())
        copies = "unknown" if self.copies is None else self.copies
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return f"asked for {self.asked_for}; nodes: {nodes}; copies between host and device: {copies}; {versions}"


def prove(session: onnxruntime.InferenceSession, place: Place, optimized: Path | None) -> Receipt:
    """Tell where a session runs, and refuse it if that is not where it was to run.

    Args:
        session: opened with `RECORD`.
        place: what was asked for.
        optimized: the graph as onnxruntime wrote it when it opened the session; None where it did not.
    Raises:
        DeviceError: nodes run elsewhere, or this cannot be told; names them.
    """
    nodes, copies = _nodes(session), _copies(place, optimized)
    if place.device != "cpu":
        _refuse_strays(session.get_providers(), place, nodes, copies)
    counts = None if nodes is None else dict(Counter(node.provider for node in nodes))
    return Receipt(
        asked_for=str(place),
        providers=tuple(counts or session.get_providers()),
        nodes=counts,
        copies=copies,
        versions=versions(place),
    )


def _nodes(session: onnxruntime.InferenceSession) -> list[Node] | None:
    """Every node that runs; None where this onnxruntime does not tell: 1.23.2 does not, 1.24.4 does."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return None
    return [Node(node.name, node.op_type, part.ep_name) for part in tell() for node in part.get_nodes()]


def _copies(place: Place, optimized: Path | None) -> int | None:
    if place.device == "cpu":
        return 0
    if optimized is None or not optimized.is_file():
        return None
    graph = optimized.read_bytes()
    return sum(graph.count(copy) for copy in COPIES)


def _refuse_strays(listed: Sequence[str], place: Place, nodes: Sequence[Node] | None, copies: int | None) -> None:
    provider, version = PROVIDERS[place.device], load_onnxruntime().__version__
    if provider not in listed:
        raise DeviceError(
            f"asked for {place}, onnxruntime {version} opened the session on {', '.join(listed)} without a word; "
            "python -m runtime.devices tells what is missing"
        )
    if nodes is None:
        raise DeviceError(
            f"onnxruntime {version} does not tell which nodes run on {place}, so that some might run on the CPU "
            "unseen; update it with: pip install --upgrade onnxruntime-gpu"
        )
    strays = [node for node in nodes if node.provider != provider and not _is_shape_node(node)]
    if strays or copies:
        where = f"{_in_words(strays)} would run on the CPU" if strays else "all others run there"
        raise DeviceError(
            f"asked for {place}, but of {len(nodes)} nodes {where}, with {copies or 'no'} copies between host and "
            f"device in every run; convert the checkpoint with --device {place.device}"
        )


def _is_shape_node(node: Node) -> bool:
    return node.provider == CPU_PROVIDER and node.operator in SHAPE_OPERATORS


def _in_words(nodes: Sequence[Node]) -> str:
    """8 MatMulIntegerToFloat (h.0.attn.c_attn ...), 2 GroupQueryAttention (...)."""
    counts = Counter(node.operator for node in nodes)
    examples = {node.operator: node.name for node in reversed(nodes)}
    named = [f"{count} {operator} ({examples[operator]})" for operator, count in counts.most_common(OPERATORS_NAMED)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(OPERATORS_NAMED))
    return ", ".join([*named, *([f"{rest} others"] if rest else [])])
