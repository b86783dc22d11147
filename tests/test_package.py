"""The contract: a package that is whole opens, and every way in which it is not is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from runtime.errors import PackageError
from runtime.package import (
    FORMAT_VERSION,
    GENERATION_CONFIG,
    MANIFEST,
    MODEL_FILES,
    TOKENIZER,
    WEIGHTS_SUFFIX,
    FileEntry,
    Needs,
    file_entry,
    open_package,
    past_name,
    present_name,
    read_manifest,
    write_manifest,
)
from runtime.text_generator import TextGenerator, open_decoder

Copy = Callable[[Path], Path]

MODEL = MODEL_FILES["fp32"]
WEIGHTS = MODEL + WEIGHTS_SUFFIX
FILES = [
    MODEL,
    WEIGHTS,
    "LICENSE",
    "MODEL_CARD.md",
    "config.json",
    "genai_config.json",
    GENERATION_CONFIG,
    TOKENIZER,
    "tokenizer_config.json",
]


@pytest.fixture
def package(tiny_fp32: Path, copied: Copy) -> Path:
    return copied(tiny_fp32)


def alter_one_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite_manifest(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's JSON and give it a digest that fits."""
    values = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
    change(values)
    del values["digest"]
    values["digest"] = _digest(values)
    (package / MANIFEST).write_text(json.dumps(values), encoding="utf-8")


def _digest(values: dict[str, Any]) -> str:
    import hashlib

    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def list_file(package: Path, name: str, entry: FileEntry) -> None:
    manifest = read_manifest(package)
    write_manifest(package, replace(manifest, files={**manifest.files, name: entry}))


# What is whole


def test_a_package_lists_every_file_it_holds_but_the_manifest(tiny_fp32: Path) -> None:
    held = {path.relative_to(tiny_fp32).as_posix() for path in tiny_fp32.rglob("*") if path.is_file()}
    assert held - {MANIFEST} == set(open_package(tiny_fp32).manifest.files) == set(FILES)


def test_a_manifest_is_read_as_it_was_written(tiny_fp32: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_fp32)
    manifest = replace(manifest, needs=Needs(onnxruntime="1.32.0", processor=("a", "b")), quality={"kl": 0.1})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_a_copy_under_another_name_is_the_same_package(tiny_fp32: Path, package: Path) -> None:
    assert open_package(package, full=True).manifest == open_package(tiny_fp32).manifest


def test_a_file_beside_the_listed_ones_is_no_fault(package: Path) -> None:
    (package / "notes.txt").write_text("mine")
    open_package(package)


def test_hashing_reports_every_byte(tiny_fp32: Path) -> None:
    read: list[int] = []
    package = open_package(tiny_fp32, full=True, progress=read.append)
    assert sum(read) == sum(entry.bytes for entry in package.manifest.files.values())


def test_weights_are_hashed_only_when_asked_for(tiny_fp32: Path) -> None:
    read: list[int] = []
    package = open_package(tiny_fp32, progress=read.append)
    assert sum(read) == sum(entry.bytes for name, entry in package.manifest.files.items() if name != WEIGHTS)


def test_a_link_within_the_package_is_followed(package: Path) -> None:
    (package / "LICENSE").rename(package / "onnx" / "LICENSE")
    (package / "LICENSE").symlink_to(Path("onnx") / "LICENSE")
    open_package(package)


def test_a_package_reached_by_a_link_opens(tiny_fp32: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_fp32, target_is_directory=True)
    open_package(tmp_path / "link")


def test_tensor_names_are_hugging_faces() -> None:
    assert past_name(3, "key") == "past_key_values.3.key"
    assert present_name(0, "value") == "present.0.value"


# Files that are not what the manifest says


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(package: Path, name: str) -> None:
    (package / name).unlink()
    with pytest.raises(PackageError, match=rf"{name} is missing; copy the package again or convert again"):
        open_package(package)


@pytest.mark.parametrize("name", FILES)
def test_a_short_file_is_told_with_both_sizes(package: Path, name: str) -> None:
    size = (package / name).stat().st_size
    os.truncate(package / name, size - 1)
    with pytest.raises(PackageError, match=rf"{name} has {size - 1} bytes, the manifest says {size}"):
        open_package(package)


@pytest.mark.parametrize("name", [name for name in FILES if name != WEIGHTS])
def test_an_altered_file_is_named(package: Path, name: str) -> None:
    alter_one_byte(package / name)
    with pytest.raises(PackageError, match=rf"{name} was altered \(its sha256 is not the manifest's\)"):
        open_package(package)


def test_altered_weights_are_found_by_a_full_check(package: Path) -> None:
    alter_one_byte(package / WEIGHTS)
    open_package(package)
    with pytest.raises(PackageError, match=rf"{WEIGHTS} was altered"):
        open_package(package, full=True)


def test_all_faults_are_named_in_one_line(package: Path) -> None:
    (package / "LICENSE").unlink()
    alter_one_byte(package / TOKENIZER)
    os.truncate(package / WEIGHTS, 10)
    with pytest.raises(PackageError) as caught:
        open_package(package)
    assert all(name in str(caught.value) for name in ("LICENSE", TOKENIZER, WEIGHTS))
    assert "\n" not in str(caught.value)


def test_a_folder_in_a_files_place_is_no_file(package: Path) -> None:
    (package / "LICENSE").unlink()
    (package / "LICENSE").mkdir()
    with pytest.raises(PackageError, match="LICENSE is missing"):
        open_package(package)


def test_a_circle_of_links_is_no_file(package: Path) -> None:
    (package / "LICENSE").unlink()
    (package / "LICENSE").symlink_to("LICENSE")
    with pytest.raises(PackageError, match="LICENSE is missing"):
        open_package(package)


# Manifests


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"absent: no such folder; .*python -m export\.convert CHECKPOINT"):
        open_package(tmp_path / "absent")


def test_a_folder_without_a_manifest_is_taken_for_a_checkpoint_to_convert(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=rf"without a manifest is no package; .*export\.convert {tmp_path}"):
        open_package(tmp_path)


def test_a_file_is_no_package(tiny_fp32: Path) -> None:
    with pytest.raises(PackageError, match=r"manifest\.json: a file is no package, which is a folder"):
        open_package(tiny_fp32 / MANIFEST)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "no text", "deep"])
def test_a_manifest_that_is_no_json(package: Path, content: bytes) -> None:
    (package / MANIFEST).write_bytes(content)
    with pytest.raises(PackageError, match=r"manifest\.json cannot be read \(.*\); copy the package again"):
        open_package(package)


def test_a_manifest_that_is_no_object(package: Path) -> None:
    (package / MANIFEST).write_text("[]")
    with pytest.raises(PackageError, match=r"manifest\.json holds no JSON object"):
        open_package(package)


@pytest.mark.parametrize(
    ("version", "step"),
    [(FORMAT_VERSION + 1, "update gpt2-edge"), (0, "convert again"), (None, "convert again"), ("1", "convert again")],
)
def test_another_format_version_is_refused_with_what_to_do(package: Path, version: object, step: str) -> None:
    rewrite_manifest(package, lambda values: values.update(format_version=version))
    with pytest.raises(
        PackageError, match=rf"has format version {version!r}, this runtime reads 2 and {FORMAT_VERSION}; {step}"
    ):
        open_package(package)


def test_an_altered_manifest_is_refused(package: Path) -> None:
    text = (package / MANIFEST).read_text(encoding="utf-8")
    (package / MANIFEST).write_text(text.replace('"n_head": 2', '"n_head": 4'), encoding="utf-8")
    with pytest.raises(PackageError, match=r"was altered \(its digest does not match\); copy the package again"):
        open_package(package)


def test_another_layout_of_the_same_json_is_no_alteration(package: Path) -> None:
    rewrite_manifest(package, lambda values: None)
    open_package(package)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(precision="int3"), "precision 'int3', expected one of fp32, fp16, int8, int4"),
        (lambda values: values.update(device="tpu"), "device 'tpu', expected one of cpu, cuda, tensorrt"),
        (
            lambda values: values.update(attention="magic"),
            "attention 'magic', expected one of GroupQueryAttention, plain",
        ),
        (lambda values: values.update(kv_cache="fp4"), "kv_cache 'fp4', expected one of float32, float16, int8"),
        (lambda values: values.update(decode_weight_bytes=1.5), "decode_weight_bytes 1.5, expected a whole number"),
        (lambda values: values.update(mood="good"), "mood"),
        (lambda values: values.pop("source"), "source"),
        (lambda values: values.update(files=[]), "items"),
        (lambda values: values.update(needs={}), "onnxruntime"),
        (lambda values: values["config"].update(n_head=7), "no multiple of n_head 7"),
        (lambda values: values["golden"][0].pop("top_ids"), "top_ids"),
        (lambda values: values["golden"][0].update(top_ids=[10**6]), "are not ids of the model"),
        (lambda values: values["golden"][0].update(top_ids=[]), "are not ids of the model"),
    ],
)
def test_a_malformed_manifest_is_refused(package: Path, change: Callable[[Any], None], message: str) -> None:
    rewrite_manifest(package, change)
    with pytest.raises(PackageError, match=rf"manifest\.json is malformed \(.*{message}.*convert the checkpoint again"):
        open_package(package)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, TOKENIZER, GENERATION_CONFIG])
def test_a_manifest_must_list_what_the_runtime_reads(package: Path, name: str) -> None:
    rewrite_manifest(package, lambda values: values["files"].pop(name))
    with pytest.raises(PackageError, match=rf"manifest\.json lists no {name}; convert the checkpoint again"):
        open_package(package)


# Paths that lead out


@pytest.mark.parametrize("name", ["../outside", "onnx/../../outside", "out\0side"])
def test_a_listed_path_that_climbs_out_is_refused(package: Path, name: str) -> None:
    (package.parent / "outside").write_text("x")
    list_file(package, name, file_entry(package.parent / "outside"))
    with pytest.raises(PackageError, match=r"'.*out.*' leads out of the package"):
        open_package(package)


def test_an_absolute_path_is_refused_even_to_the_package_itself(package: Path) -> None:
    list_file(package, str(package / "LICENSE"), file_entry(package / "LICENSE"))
    with pytest.raises(PackageError, match="leads out of the package"):
        open_package(package)


@pytest.mark.parametrize("name", ["LICENSE", WEIGHTS])
def test_a_link_to_outside_is_refused(package: Path, name: str) -> None:
    (package / name).rename(package.parent / "outside")
    (package / name).symlink_to(package.parent / "outside")
    with pytest.raises(PackageError, match=f"'{name}' leads out of the package"):
        open_package(package)


def test_a_linked_folder_to_outside_is_refused(package: Path) -> None:
    (package / "onnx").rename(package.parent / "outside")
    (package / "onnx").symlink_to(package.parent / "outside", target_is_directory=True)
    with pytest.raises(PackageError, match=f"'{MODEL}' leads out of the package"):
        open_package(package)


@pytest.mark.parametrize("location", ["../../outside", "absolute"])
def test_external_data_that_leads_out_is_refused_by_onnxruntime(package: Path, location: str) -> None:
    outside = package.parent / "outside"
    outside.write_bytes((package / WEIGHTS).read_bytes())
    model = onnx.load(package / MODEL, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(outside) if location == "absolute" else location
    (package / MODEL).write_bytes(model.SerializeToString())
    list_file(package, MODEL, file_entry(package / MODEL))
    with pytest.raises(PackageError, match=rf"{MODEL}: onnxruntime .* refuses it"):
        open_decoder(open_package(package))


def test_a_graph_that_is_no_onnx_is_refused(package: Path) -> None:
    (package / MODEL).write_bytes(b"no graph")
    list_file(package, MODEL, file_entry(package / MODEL))
    with pytest.raises(PackageError, match=rf"{MODEL}: onnxruntime .* refuses it"):
        TextGenerator.load(package)
