"""The part that goes to the device: opens a package and writes text with it.

    from runtime import TextGenerator
    print(TextGenerator.load("packages/demo-int8").generate("Once upon a time").text)

Imports numpy, tokenizers, onnxruntime and the standard library, and nothing of the other rooms; imports inside it are
relative, so that an application may copy the folder into its own tree under any name.
"""

from importlib.util import find_spec

if find_spec("onnxruntime") is None:
    raise ImportError(
        "gpt2-edge runs on ONNX Runtime, which is not installed; install one of: pip install 'gpt2-edge[cpu]' (any "
        "processor), pip install 'gpt2-edge[gpu]' (NVIDIA)"
    )

from .config import GPT2Config
from .errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    GPT2EdgeError,
    MachineError,
    PackageError,
    QuantizationError,
    RequestError,
    SessionError,
    TokenizerError,
    VerificationError,
)
from .request import Generation, Request, Sample, SampleStats
from .sampling import SamplingOptions
from .text_generator import TextGenerator
from .text_session import TextSession

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "GPT2Config",
    "GPT2EdgeError",
    "Generation",
    "MachineError",
    "PackageError",
    "QuantizationError",
    "Request",
    "RequestError",
    "Sample",
    "SampleStats",
    "SamplingOptions",
    "SessionError",
    "TextGenerator",
    "TextSession",
    "TokenizerError",
    "VerificationError",
]
