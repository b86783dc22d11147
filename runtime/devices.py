"""What this machine can do, and for the rest, why not.

    python -m runtime.devices

Each device is tried: a graph of one node is opened on it, proven to run there, and run. What is told of a device that
does not run is what loading a package for it would say.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from .command_line import CommandLineParser, print_json, run_command
from .control_group import memory_limit_bytes
from .driver import Driver, Gpu
from .errors import DeviceError, GPT2EdgeError
from .package import Device
from .place import Place
from .processor import available_processors
from .provider import versions
from .session import open_session
from .wheel import installed_wheels, wheels_in_each_others_way

ONE_NODE = bytes.fromhex(
    "080812003a350a0e0a01780a017812017922034d756c1201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a02"
    "080142040a00100d"
)
"""An ONNX model: x [1] float32 -> y = x * x."""


@dataclass(frozen=True, slots=True)
class Ability:
    """Whether a device runs here; if not, why not and what mends it."""

    runs: bool
    why_not: str | None
    versions: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Machine:
    """What is here to run on."""

    devices: dict[Device, Ability]
    gpus: tuple[Gpu, ...]
    processors: int  # that this process may use
    memory_limit_bytes: int | None  # of the container
    wheels: dict[str, str]  # that brought an onnxruntime
    warning: str | None


def examine() -> Machine:
    """Try every device.

    Raises:
        DeviceError: onnxruntime does not import.
    """
    driver = Driver.here()
    return Machine(
        devices={device: _try(Place(device)) for device in get_args(Device)},
        gpus=driver.gpus if driver else (),
        processors=available_processors(),
        memory_limit_bytes=memory_limit_bytes(),
        wheels=installed_wheels(),
        warning=wheels_in_each_others_way(),
    )


def _try(place: Place) -> Ability:
    try:
        _run_one_node(place)
    except GPT2EdgeError as error:
        return Ability(False, str(error), versions(place))
    return Ability(True, None, versions(place))


def _run_one_node(place: Place) -> None:
    """Square a number.

    Raises:
        GPT2EdgeError: the session does not open, runs elsewhere, or gives another number.
    """
    with tempfile.TemporaryDirectory() as folder:
        model_path = Path(folder) / "model.onnx"
        model_path.write_bytes(ONE_NODE)
        session = open_session(model_path, place=place, threads=1).session
    try:
        (squared,) = session.run(None, {"x": np.array([3], np.float32)})
    except Exception as error:
        raise DeviceError(f"{place} opens a graph but does not run it ({' '.join(str(error).split())})") from error
    if squared.tolist() != [9.0]:
        raise DeviceError(f"{place} computes wrongly: 3 squared is {squared.tolist()} there; use another device")


def _show(*, as_json: bool) -> int:
    machine = examine()
    if as_json:
        print_json(asdict(machine))
    else:
        _print(machine)
    return 0


def _print(machine: Machine) -> None:
    for device, ability in machine.devices.items():
        known = ", ".join(f"{name} {version}" for name, version in ability.versions.items() if version)
        print(f"{device:<10} {f'yes: {known}' if ability.runs else f'no: {ability.why_not}'}")
    for index, gpu in enumerate(machine.gpus):
        print(
            f"{f'GPU {index}':<10} {gpu.name}, {gpu.memory_bytes / 1e9:.1f} GB, compute capability "
            f"{gpu.compute_capability}"
        )
    limit = "" if machine.memory_limit_bytes is None else f", memory {machine.memory_limit_bytes / 1e9:.1f} GB"
    print(f"{'processors':<10} {machine.processors} for this process{limit}")
    if machine.warning:
        print(f"{'warning':<10} {machine.warning}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = CommandLineParser(
        prog="python -m runtime.devices", description="Tell what this machine can run packages on, and why not on more."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else")
    options = parser.parse_args(argv)
    return run_command(lambda: _show(as_json=options.json))


if __name__ == "__main__":
    sys.exit(main())
