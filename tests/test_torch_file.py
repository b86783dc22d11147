from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoint import read_checkpoint
from export.checkpoint_files import HeldTensor, StoredTensor, Tensor
from export.torch_file import read_torch_file
from runtime.errors import CheckpointError
from tests.memory import no_more_memory_than
from tests.tiny import tiny_config, tiny_weights
from tests.write_layouts import need_torch, state_dict, write_bin_checkpoint

CONFIG = tiny_config()
WEIGHTS = tiny_weights(CONFIG)


@pytest.fixture(scope="module")
def torch() -> Any:
    return need_torch()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    return str(caught.value)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with other contents in its records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
    return path


def saved(torch: Any, path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


# --- facts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_values_are_read_from_where_they_lie(torch: Any, tmp_path: Path, dtype: str) -> None:
    values = torch.randn(5, 300_001, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    path = saved(torch, tmp_path / "a.bin", {"a": values, "tail": values[3:], "inner": {"a": values[0]}, "lr": 0.5})
    content = read_torch_file(path)
    for tensor, expected in ((content["a"], values), (content["tail"], values[3:]), (content["inner"]["a"], values[0])):
        assert isinstance(tensor, StoredTensor)
        np.testing.assert_array_equal(tensor.read(), expected.float().numpy())
    assert content["lr"] == 0.5


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_files_from_before_torch_1_6_are_read_as_a_whole(
    torch: Any, tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = torch.randn(5, 100_001, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    path = saved(torch, tmp_path / "a.bin", {"a": values}, _use_new_zipfile_serialization=False)
    tensor = read_torch_file(path)["a"]
    assert isinstance(tensor, HeldTensor)
    np.testing.assert_array_equal(tensor.read(), values.float().numpy())
    np.testing.assert_array_equal(np.concatenate(list(tensor.pieces())), values.float().numpy().reshape(-1))
    assert f"in torch's layout from before 1.6: all of its {path.stat().st_size} bytes are in memory" in caplog.text


def test_views_that_are_no_plain_arrays_are_read_too(
    torch: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = torch.arange(12.0).reshape(3, 4)
    content = read_torch_file(saved(torch, tmp_path / "a.bin", {"a": values.t(), "b": values}))
    np.testing.assert_array_equal(content["a"].read(), values.t().numpy())
    np.testing.assert_array_equal(content["b"].read(), values.numpy())
    assert content["a"].read().flags.c_contiguous
    assert "is read as a whole" in caplog.text


def test_tensors_of_a_gpu_are_read_without_one(torch: Any, tmp_path: Path) -> None:
    """As nanoGPT saves them: torch writes the device into the pickle."""
    path = saved(torch, tmp_path / "a.bin", {"a": torch.ones(3)})

    def on_gpu(_: str, content: bytes) -> bytes:
        return content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")

    with zipfile.ZipFile(rewritten(path, on_gpu)) as archive:
        assert b"cuda:0" in archive.read("a/data.pkl")
    np.testing.assert_array_equal(read_torch_file(path)["a"].read(), np.ones(3))


def test_a_parameter_and_a_mask_come_through(torch: Any, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    content = read_torch_file(saved(torch, tmp_path / "a.bin", {"a": parameter, "m": torch.ones(2, dtype=torch.bool)}))
    np.testing.assert_array_equal(content["a"].read(), np.ones(2))
    assert content["m"].fault == "m has dtype torch.bool, expected one of F32, F16, BF16, F64"


@pytest.mark.parametrize("held", [False, True])
def test_the_first_rows_of_a_tensor(torch: Any, tmp_path: Path, held: bool) -> None:
    values = torch.arange(12.0).reshape(4, 3)
    tensor: Tensor = read_torch_file(
        saved(torch, tmp_path / "a.bin", {"a": values}, _use_new_zipfile_serialization=not held)
    )["a"]
    np.testing.assert_array_equal(tensor.rows(2).read(), values[:2].numpy())


@pytest.mark.parametrize("held", [False, True])
def test_values_that_are_not_finite_are_refused(torch: Any, tmp_path: Path, held: bool) -> None:
    values = torch.zeros(3, 100_000)
    values[2, 99_999] = np.inf
    path = saved(torch, tmp_path / "a.bin", {"a": values}, _use_new_zipfile_serialization=not held)
    with pytest.raises(CheckpointError, match=r"^a holds NaN or Inf, first at \[2, 99999\]$"):
        read_torch_file(path)["a"].read()


# --- refusals ------------------------------------------------------------------------------------------------------


def test_without_torch_the_extra_is_named(torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(torch, tmp_path / "a.bin", {"a": torch.ones(3)})
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refusal(path) == f"{path} can be read with torch only: pip install 'gpt2-edge[torch]'"


class Malicious:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("form", ["archive", "before 1.6", "pickle"])
def test_code_in_a_file_is_refused_and_does_not_run(torch: Any, tmp_path: Path, form: str) -> None:
    path, mark = tmp_path / "a.bin", tmp_path / "mark"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"a": Malicious(mark)}, protocol=2))
    else:
        saved(torch, path, {"a": Malicious(mark)}, _use_new_zipfile_serialization=form == "archive")
    message = refusal(path)
    assert not mark.exists()
    assert "a.bin cannot be read as tensors and plain values: Unsupported " in message
    assert message.endswith("; copy it again, or save its state dict as safetensors where you trust it")


def test_a_file_that_is_nothing_is_refused(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "a.bin"
    assert refusal(path).endswith("a.bin cannot be read: No such file or directory")
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", b"\x80\x02."):
        path.write_bytes(content)
        assert "a.bin cannot be read as tensors and plain values: " in refusal(path)


def test_a_list_of_tensors_is_refused(torch: Any, tmp_path: Path) -> None:
    message = refusal(saved(torch, tmp_path / "a.bin", [torch.ones(2)]))
    assert message.endswith("a.bin holds a list, expected a dictionary of tensors")


def test_archives_that_torch_does_not_write_are_refused(torch: Any, tmp_path: Path) -> None:
    path = saved(torch, tmp_path / "a.bin", {"a": torch.ones(1000)})
    rewritten(path, lambda name, content: b"big" if name.endswith("byteorder") else content)
    assert "its tensors are big-endian, which is not supported" in refusal(path)
    rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert "is compressed or encrypted" in refusal(path)


def test_a_storage_of_another_size_is_refused(torch: Any, tmp_path: Path) -> None:
    path = saved(torch, tmp_path / "a.bin", {"a": torch.ones(1000)})
    rewritten(path, lambda name, content: content[:-4] if name.endswith("data/0") else content)
    assert "a.bin: a is of another size than its bytes in the file" in refusal(path)


def test_a_view_that_repeats_its_values_cannot_ask_for_more_than_the_file(torch: Any, tmp_path: Path) -> None:
    path = saved(torch, tmp_path / "a.bin", {"a": torch.ones(1).expand(1 << 40)})
    assert "a.bin: a is of another size than its bytes in the file" in refusal(path)


def test_a_file_cut_anywhere_is_refused(torch: Any, tmp_path: Path) -> None:
    path = saved(torch, tmp_path / "a.bin", {"a": torch.ones(1000)})
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        refusal(path)


def test_what_is_no_tensor_in_a_state_dict_is_refused(torch: Any, tmp_path: Path) -> None:
    folder = write_bin_checkpoint(tmp_path, CONFIG, WEIGHTS)
    saved(torch, folder / "pytorch_model.bin", {**state_dict(WEIGHTS), "step": 3})
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: 'step' is a int, expected a tensor"):
        read_checkpoint(folder)


# --- mutations: parsed or refused, nothing else --------------------------------------------------------------------


@pytest.fixture(scope="module")
def archives(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path = tmp_path_factory.mktemp("archives") / "a.bin"
    content = {"a": torch.ones(2, 3), "inner": {"b": torch.zeros(4)}, "lr": 0.5}
    written = [saved(torch, path, content, _use_new_zipfile_serialization=new).read_bytes() for new in (True, False)]
    for archive in (*written, b"neither"):  # what torch imports at its first file is not this file's memory
        path.write_bytes(archive)
        with suppress(CheckpointError):
            read_torch_file(path)
    return written


@pytest.mark.filterwarnings("ignore")  # torch's, about what it finds in a damaged file
@settings(max_examples=500, deadline=2000, derandomize=True, database=None)
@given(
    which=st.integers(0, 1),
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 3000),
)
def test_mutated_files(
    tmp_path_factory: pytest.TempPathFactory,
    archives: list[bytes],
    which: int,
    changes: list[tuple[int, int]],
    cut: int | None,
) -> None:
    mutated = bytearray(archives[which])
    for at, value in changes:
        mutated[at % len(mutated)] = value
    path = tmp_path_factory.getbasetemp() / "mutated.bin"
    path.write_bytes(mutated[:cut])
    with no_more_memory_than(path):
        try:
            content = read_torch_file(path)
            for value in [*content.values(), *content.get("inner", {}).values()]:
                if isinstance(value, (StoredTensor, HeldTensor)):
                    value.read()
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_config_json_is_needed_beside_a_bin(torch: Any, tmp_path: Path) -> None:
    folder = write_bin_checkpoint(tmp_path, CONFIG, WEIGHTS)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is no checkpoint that can be read: .*; found pytorch_model.bin$"):
        read_checkpoint(folder)
