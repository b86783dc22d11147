"""What a package asks of the machine, held against this one."""

from __future__ import annotations

import platform

from .activations import NARROW, WIDE, Activations
from .control_group import memory_limit_bytes
from .errors import DeviceError, MachineError
from .package import Device, Needs
from .processor import X86, processor_features
from .wheel import load_onnxruntime


def check_needs(needs: Needs, *, device: Device) -> None:
    """Refuse a package that this onnxruntime cannot run, or whose arithmetic this processor would get wrong.

    Raises:
        DeviceError: as `unmet_needs` says.
    """
    if unmet := unmet_needs(needs, device=device, onnxruntime=load_onnxruntime().__version__):
        raise DeviceError("; ".join(unmet))


def unmet_needs(needs: Needs, *, device: Device, onnxruntime: str | None) -> list[str]:
    """Each need that this machine does not meet, and what to do; what cannot be told counts as met.

    Args:
        needs: the package's.
        device: where it would run.
        onnxruntime: the installed version, None where nobody knows.
    """
    unmet = []
    if onnxruntime is not None and _version(onnxruntime) < _version(needs.onnxruntime):
        wheel = "onnxruntime" if device == "cpu" else "onnxruntime-gpu"
        unmet.append(
            f"this package needs onnxruntime {needs.onnxruntime} or newer, installed is {onnxruntime}; update it with: "
            f"pip install --upgrade {wheel}"
        )
    if device == "cpu" and not needs.narrows and _lacks_features(needs):
        unmet.append(
            f"this package needs a processor with one of {', '.join(needs.processor)}, this one "
            f"({platform.machine()}) has none, and its results would be wrong; convert again, since int8 packages of "
            "today run here, or convert with --precision fp32"
        )
    return unmet


def check_memory(weights_bytes: int) -> None:
    """Refuse weights beyond the limit of the control group: the system would kill the process without a word.

    Raises:
        MachineError: they do not fit.
    """
    limit = memory_limit_bytes()
    if limit is not None and weights_bytes > limit:
        raise MachineError(
            f"the weights take {weights_bytes / 1e9:.2f} GB, and this container (its control group) may use "
            f"{limit / 1e9:.2f} GB; give it more memory, or convert to fewer bits or a smaller model"
        )


def activations_here(needs: Needs) -> Activations:
    """What a package's activations are to be rounded to on this processor.

    Where the system does not tell what an x86 processor has, it is what is safe on all of them; other processors are
    taken to have what is needed there.
    """
    unknown_x86 = processor_features() is None and platform.machine().lower() in X86
    return NARROW if needs.narrows and (unknown_x86 or _lacks_features(needs)) else WIDE


def _lacks_features(needs: Needs) -> bool:
    have = processor_features()
    return bool(needs.processor) and have is not None and have.isdisjoint(needs.processor)


def _version(text: str) -> tuple[int, ...]:
    """1.23.2 -> (1, 23, 2); what is no number (a development build's suffix) counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in text.split(".")[:3])
