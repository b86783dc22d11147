"""Every error that gpt2-edge raises on purpose, and the exit status that a command ends with.

    GPT2EdgeError               2   the caller can mend it: bad usage or bad input
    |-- ConfigError                 a model configuration that no GPT-2 has, or that we do not support
    |-- CheckpointError             a checkpoint that is missing, damaged, or no GPT-2
    |-- QuantizationError           weights that cannot be quantized
    |-- PackageError                a package that is missing, damaged, or newer than this runtime
    |-- TokenizerError              tokenizer files that are missing or damaged, text that is no text
    |-- RequestError                a request that the model or its options cannot honour
    |-- SessionError                a saved session that is missing, damaged, or of another package
    |-- DeviceError                 the device that was asked for is not the one that would run
    |-- MachineError            1   the machine failed us: disk full, out of memory
    `-- VerificationError       3   a check ran and did not hold

A message says what, where, got against expected, and the next step, in one line.
"""

from __future__ import annotations


class GPT2EdgeError(Exception):
    """Root of the tree. `exit_status` is what a command line ends with."""

    exit_status = 2


class ConfigError(GPT2EdgeError):
    """A model configuration that no GPT-2 has, or that is not supported."""


class CheckpointError(GPT2EdgeError):
    """A checkpoint that is missing, damaged, or no GPT-2."""


class QuantizationError(GPT2EdgeError):
    """Weights that cannot be quantized."""


class PackageError(GPT2EdgeError):
    """A package that is missing, damaged, or of a format that this runtime does not read."""


class TokenizerError(GPT2EdgeError):
    """Tokenizer files that are missing or damaged, or bytes that are no text."""


class RequestError(GPT2EdgeError):
    """A generation request that the model or its options cannot honour."""


class SessionError(GPT2EdgeError):
    """A saved session that is missing, damaged, or of another package."""


class DeviceError(GPT2EdgeError):
    """The device that was asked for is not the one that would run."""


class MachineError(GPT2EdgeError):
    """The machine failed us: disk full, out of memory, device lost."""

    exit_status = 1


class VerificationError(GPT2EdgeError):
    """A check ran and did not hold."""

    exit_status = 3
