"""Conversions from end to end: what comes out, and what a reader sees meanwhile."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from export.calibration_text import SEQUENCES
from export.checkpoint import canonical_shapes, read_checkpoint
from export.convert import convert, main
from export.verification import MAX_KL, PROMPTS
from quantization.divergence import kl_divergence
from quantization.recipes import Quantized
from quantization.smooth import OUTLIERS
from runtime.errors import PackageError, VerificationError
from runtime.package import MODEL_FILES, Precision, open_package, read_manifest
from runtime.text_generator import TextGenerator
from tests.convert_command import assert_one_line, names, run_main
from tests.outliers import plant_activation_outliers
from tests.tiny import tiny_weights, write_safetensors_checkpoint
from tests.write_layouts import write_llmc_checkpoint
from tests.write_tensorbundle import write_openai_checkpoint

REPOSITORY = Path(__file__).parent.parent
DEMO = REPOSITORY / "models" / "demo"

DEMO_KL: Mapping[Precision, float] = {"int8": 0.001, "int4": 0.04}
"""Nats a token that a precision may cost the demo model on the built-in prompts. Measured: 0.00046 and 0.020."""

DEMO_INT4_BITS = 4.9
"""A weight of the demo model may take, scales, head and embedding included. Measured: 4.48."""

DEMO_FP32_ERROR = 2e-4
"""Of an fp32 logit of the demo model, whose logits reach 16. Measured: 2.5e-5."""


def with_outliers(folder: Path, tiny_checkpoint: Path) -> Path:
    """What int8 activations cannot take: more large features behind the activation than can be set apart."""
    config = read_checkpoint(tiny_checkpoint).config
    channels = 2 * max(OUTLIERS)
    config, weights = plant_activation_outliers(config, tiny_weights(config), factor=1000, channels=channels)
    return write_safetensors_checkpoint(folder, config, weights, tokenizer_dir=tiny_checkpoint)


# What comes out


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_demo_becomes_a_whole_package(request: pytest.FixtureRequest, precision: Precision) -> None:
    package: Path = request.getfixturevalue(f"demo_{precision}")
    manifest = open_package(package, full=True).manifest
    assert manifest.precision == precision
    assert manifest.config == read_checkpoint(DEMO).config
    assert manifest.source.name == "demo"
    assert manifest.source.layout == "safetensors"
    assert set(manifest.tools) == {"gpt2-edge", "python", "numpy", "onnx", "onnxruntime", "tokenizers"}
    on_disk = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert set(manifest.files) == on_disk - {"manifest.json"}
    assert len(manifest.golden) == len(PROMPTS)
    assert all(golden.greedy_ids for golden in manifest.golden[1:])
    assert set(manifest.quality) == {"tokens", "kl", "top1", "largest_difference", "greedy_agreement"}


@pytest.mark.parametrize("precision", DEMO_KL)
def test_the_demo_loses_little(request: pytest.FixtureRequest, precision: Precision) -> None:
    assert 0 < read_manifest(request.getfixturevalue(f"demo_{precision}")).quality["kl"] <= DEMO_KL[precision]


def test_an_int4_weight_takes_less_than_five_bits(demo_int4: Path) -> None:
    """Of the matrices, head and embedding among them, which are one."""
    graph = onnx.load(demo_int4 / MODEL_FILES["int4"], load_external_data=False).graph
    matrices = {name for name, shape in canonical_shapes(read_manifest(demo_int4).config).items() if len(shape) == 2}
    matrices.remove("wpe.weight")
    stored = {name for matrix in matrices for name in (matrix, f"{matrix}.scale", f"{matrix}.column_scale")}
    bytes_of_matrices = sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
        if tensor.name in stored
    )
    n_weights = sum(math.prod(canonical_shapes(read_manifest(demo_int4).config)[name]) for name in matrices)
    assert 8 * bytes_of_matrices / n_weights <= DEMO_INT4_BITS


def test_the_demo_loses_nothing_at_fp32(demo_fp32: Path) -> None:
    quality = read_manifest(demo_fp32).quality
    assert quality["largest_difference"] <= DEMO_FP32_ERROR
    assert quality["top1"] == quality["greedy_agreement"] == 1


def test_every_layout_of_the_demo_gives_the_same_package(tmp_path: Path, demo_int8: Path) -> None:
    checkpoint = read_checkpoint(DEMO)
    weights = {name: checkpoint.tensors[name] for name in checkpoint.tensors}
    writers: dict[str, Callable[..., Path]] = {
        "openai-tensorflow": write_openai_checkpoint,
        "safetensors": write_safetensors_checkpoint,
        "safetensors-sharded": partial(write_safetensors_checkpoint, shards=3),
    }
    expected = read_manifest(demo_int8)
    same = set(expected.files) - {"MODEL_CARD.md", "LICENSE"}
    assert {"onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data", "tokenizer.json"} < same
    for layout, write in writers.items():
        folder = write(tmp_path / layout, checkpoint.config, weights, tokenizer_dir=DEMO)
        manifest = convert(folder, tmp_path / "packages" / layout).manifest
        assert manifest.source.layout == layout
        assert manifest.source.fingerprint == expected.source.fingerprint
        assert {name: manifest.files[name] for name in same} == {name: expected.files[name] for name in same}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_files_are_readable_for_all(tiny_checkpoint: Path, tmp_path: Path, precision: Precision) -> None:
    before = os.umask(0o022)
    try:
        package = convert(tiny_checkpoint, tmp_path / "x", precision=precision, allow_loss=True).package
    finally:
        os.umask(before)
    files = [path for path in package.rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
    assert oct((package / "onnx").stat().st_mode & 0o777) == oct(package.stat().st_mode & 0o777) == "0o755"


def test_a_folder_whose_name_is_no_text_is_converted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le"))
    folder.symlink_to(tiny_checkpoint)
    real = Path(os.fsdecode(os.fsencode(tmp_path) + b"/vrai mod\xe8le"))
    write_safetensors_checkpoint(
        real, read_checkpoint(tiny_checkpoint).config, read_checkpoint(tiny_checkpoint).tensors, tokenizer_dir=folder
    )
    assert convert(real, tmp_path / "x", precision="fp32").manifest.source.name == "vrai mod?le"


# Checkpoints that are one file


def test_a_file_without_tokenizer_needs_one_that_is_named(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read_checkpoint(tiny_checkpoint)
    write_llmc_checkpoint(tmp_path / "run", checkpoint.config, checkpoint.tensors)
    monkeypatch.chdir(tmp_path)
    status, out, err = run_main(capsys, "run/gpt2.bin", "--precision", "fp32")
    assert (status, out) == (2, "")
    assert_one_line(err, "run: no tokenizer; looked for tokenizer.json, or", "with --tokenizer DIR")
    assert names(tmp_path) == ["run"]
    status, out, err = run_main(capsys, "run/gpt2.bin", "--precision", "fp32", "--tokenizer", tiny_checkpoint)
    assert (status, err) == (0, "")
    source = read_manifest(tmp_path / "packages" / "gpt2-fp32").source
    assert (source.name, source.layout) == ("gpt2", "llm.c")


def test_rows_without_tokens_are_dropped_with_a_line_on_stderr(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = replace(read_checkpoint(tiny_checkpoint).config, n_vocab=300)
    folder = write_llmc_checkpoint(tmp_path / "run", config, tiny_weights(config))
    command = [sys.executable, "-m", "export.convert", folder, "--precision", "fp32", "--tokenizer", tiny_checkpoint]
    result = subprocess.run(
        [*command, "--output", tmp_path / "x", "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert json.loads(result.stdout)["parameters"] == read_manifest(tmp_path / "x").config.parameter_count
    assert result.stderr == (
        f"{folder}: the last 43 of 300 rows of the embedding are padding, and dropped: the tokenizer has 257 tokens\n"
    )
    assert read_manifest(tmp_path / "x").config == replace(config, n_vocab=257, eos_token_id=256)


# The text that quantization is measured on


def test_the_recipe_tells_where_the_text_came_from(tiny_int8: Path, tiny_fp32: Path) -> None:
    recipe = read_manifest(tiny_int8).recipe
    assert recipe["calibration"] == "calibrated on 512 tokens that the model wrote"
    assert f"int8: {'; '.join(recipe.values())} |" in (tiny_int8 / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert read_manifest(tiny_fp32).recipe == {
        "weights": "weights as in the checkpoint",
        "cache": "keys and values float32",
    }


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_text_of_the_user_s_is_taken(tiny_checkpoint: Path, tmp_path: Path, precision: Quantized) -> None:
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 20)
    arguments = [tiny_checkpoint, "--precision", precision, "--calibration", tmp_path / "text.txt", "--allow-loss"]
    assert main([*map(str, arguments), "--output", str(tmp_path / "x")]) == 0
    manifest = open_package(tmp_path / "x", full=True).manifest
    assert (
        manifest.recipe["calibration"]
        == f"calibrated on {min(640, 64 * SEQUENCES[precision])} tokens of a text that was given"
    )
    assert names(tmp_path) == ["text.txt", "x"]


def test_a_text_that_is_too_short_is_refused_before_anything_is_made(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("Too short.")
    arguments = (tiny_checkpoint, "--calibration", tmp_path / "text.txt", "--output", tmp_path / "x")
    status, out, err = run_main(capsys, *arguments)
    assert (status, out) == (2, "")
    assert_one_line(err, f"--calibration {tmp_path / 'text.txt'}: 10 tokens, expected at least 64")
    assert names(tmp_path) == ["text.txt"]


def test_a_text_means_nothing_at_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_main(capsys, "demo", "--precision", "fp32", "--calibration", tmp_path / "text.txt")
    assert "--calibration says how to quantize, and --precision fp32 does not; leave one out" in capsys.readouterr().err


# The command line


def test_json_is_one_object_and_nothing_else(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "x"
    status, out, err = run_main(capsys, tiny_checkpoint, "--precision", "fp32", "--output", package, "--json")
    result, manifest = json.loads(out), read_manifest(package)
    assert (status, err, out.count("\n")) == (0, "", 1)
    described = {"package", "precision", "device", "bytes", "parameters", "fingerprint", "recipe", "quality", "seconds"}
    assert set(result) == described
    assert result["package"] == str(package)
    assert result["parameters"] == manifest.config.parameter_count
    assert result["fingerprint"] == manifest.source.fingerprint
    assert result["recipe"] == manifest.recipe
    assert result["quality"] == manifest.quality
    on_disk = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    assert result["bytes"] == on_disk - (package / "manifest.json").stat().st_size


def test_people_are_told_what_it_cost_and_what_to_try(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run_main(capsys, tiny_checkpoint, "--precision", "fp32", "--output", tmp_path / "x")
    assert (status, err) == (0, "")
    size, cost, next_step = out.splitlines()
    assert size.startswith(f"{tmp_path / 'x'}: 0.")
    assert cost.startswith("against the float32 reference over ")
    assert next_step == f'try: python -m runtime.generate {tmp_path / "x"} "Once upon a time"'


def test_names_give_the_default_places(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(tiny_checkpoint)
    assert run_main(capsys, "mine", "--allow-loss")[0] == 0
    assert names(tmp_path / "packages") == ["tiny-int8"]


def test_the_bar_is_drawn_on_a_terminal(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What is no terminal gets no bar: see the other tests, whose stderr is empty."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, "-m", "export.convert", str(tiny_checkpoint), "--precision", "fp32", "--output"]
    done = subprocess.run(
        [*command, str(tmp_path / "x")], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=theirs, check=True, text=True
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "weights 100%" in shown
    assert "verification 100%" in shown
    assert "%|" not in done.stdout
    assert done.stdout.count("\n") == 3


# The bars


def test_a_model_that_int8_ruins_is_not_published(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_outliers(tmp_path / "checkpoint", tiny_checkpoint)
    status, out, err = run_main(capsys, folder, "--output", tmp_path / "x")
    assert (status, out) == (3, "")
    assert_one_line(err, "int8 loses too much on this model: KL 0.", "--precision fp32", "--allow-loss")
    assert names(tmp_path) == ["checkpoint"]


def test_a_loss_that_is_allowed_is_published_and_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = with_outliers(tmp_path / "checkpoint", tiny_checkpoint)
    manifest = convert(folder, tmp_path / "x", allow_loss=True).manifest
    assert manifest.quality["kl"] > MAX_KL["int8"]
    assert f"| {manifest.quality['kl']:.2g} |" in (tmp_path / "x" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert convert(folder, tmp_path / "y", precision="fp32").manifest.quality["kl"] < 1e-6


def test_a_checkpoint_that_changes_meanwhile_is_not_published(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The graph is built of other weights than those that it is then held against."""
    config = read_checkpoint(tiny_checkpoint).config
    write = partial(write_safetensors_checkpoint, tmp_path / "checkpoint", config, tokenizer_dir=tiny_checkpoint)
    write(tiny_weights(config))

    def progress(what: str, done: int, _total: int) -> None:
        if (what, done) == ("verification", 1):
            write(tiny_weights(config, seed=1))

    with pytest.raises(VerificationError, match="the fp32 graph is not the model"):
        convert(tmp_path / "checkpoint", tmp_path / "x", precision="fp32", progress=progress)
    assert names(tmp_path) == ["checkpoint"]


# Readers meanwhile


def test_a_reader_sees_the_old_package_or_the_new_one_or_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A package of other weights takes the name again and again while a reader opens it.

    Between two files of one reading the exchange may come: that is refused as altered, and never a missing package.
    """
    config, package = read_checkpoint(tiny_checkpoint).config, tmp_path / "x"
    folders = [
        write_safetensors_checkpoint(
            tmp_path / str(seed), config, tiny_weights(config, seed), tokenizer_dir=tiny_checkpoint
        )
        for seed in (0, 1)
    ]
    published = {
        convert(folder, package, precision="fp32", force=True).manifest.source.fingerprint for folder in folders
    }
    done, opened, refused = threading.Event(), set(), []

    def read() -> None:
        while not done.is_set():
            try:
                opened.add(open_package(package, full=True).manifest.source.fingerprint)
            except PackageError as error:
                refused.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    for folder in folders * 5:
        convert(folder, package, precision="fp32", force=True)
    done.set()
    reader.join()
    assert opened == published
    assert all("was altered" in message or "bytes, the manifest says" in message for message in refused)
    assert all("missing" not in message and "no such folder" not in message for message in refused)
    open_package(package, full=True)


def test_a_generator_keeps_the_package_that_it_loaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, package = read_checkpoint(tiny_checkpoint).config, tmp_path / "x"
    convert(tiny_checkpoint, package, precision="fp32")
    generator, ids = TextGenerator.load(package), np.arange(20)
    before = np.concatenate(list(generator.decoder.logits(ids)))
    other = write_safetensors_checkpoint(
        tmp_path / "other", config, tiny_weights(config, seed=1), tokenizer_dir=tiny_checkpoint
    )
    convert(other, package, precision="fp32", force=True)
    np.testing.assert_array_equal(np.concatenate(list(generator.decoder.logits(ids))), before)
    after = np.concatenate(list(TextGenerator.load(package).decoder.logits(ids)))
    assert kl_divergence(before, after).mean() > MAX_KL["int8"]
