"""Publishing: what stands under the name, before, during and after, and what is never touched."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest

from export.publish import staged
from runtime.errors import PackageError
from runtime.package import MANIFEST


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "packages" / "x"


@pytest.fixture(params=["exchange", "two renames"])
def each_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux exchanges two names in one step; elsewhere it takes two renames."""
    if request.param == "two renames":
        monkeypatch.setattr(sys, "platform", "darwin")


def write_package(folder: Path, content: str) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text(content)
    (folder / MANIFEST).write_text(json.dumps({"format_version": 1, "content": content}))


def publish_package(target: Path, content: str, *, force: bool = False) -> None:
    with staged(target, force=force) as staging:
        write_package(staging, content)


def content(target: Path) -> str:
    whole = (target / "onnx" / "model.onnx").read_text()
    assert json.loads((target / MANIFEST).read_text())["content"] == whole
    return whole


def only_the_package_is_there(target: Path) -> bool:
    return [path.name for path in target.parent.iterdir()] == [target.name]


class Boom(Exception):
    pass


# What is published


def test_a_package_appears_when_it_is_done(target: Path) -> None:
    with staged(target) as staging:
        assert list(staging.iterdir()) == []
        write_package(staging, "new")
        assert not target.exists()
    assert content(target) == "new"
    assert only_the_package_is_there(target)


@pytest.mark.usefixtures("each_system")
def test_force_replaces_a_package(target: Path) -> None:
    publish_package(target, "old")
    with staged(target, force=True) as staging:
        write_package(staging, "new")
        assert content(target) == "old"
    assert content(target) == "new"
    assert only_the_package_is_there(target)


def test_a_relative_name_is_of_the_folder_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with staged(Path("x")) as staging:
        monkeypatch.chdir("elsewhere")
        write_package(staging, "new")
    assert content(tmp_path / "x") == "new"


def test_force_takes_an_empty_folder(target: Path) -> None:
    target.mkdir(parents=True)
    publish_package(target, "new", force=True)
    assert content(target) == "new"


def test_others_may_read_what_is_published(target: Path) -> None:
    before = os.umask(0o022)
    try:
        publish_package(target, "new")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in [target, target / "onnx"]} == {"0o755"}
    assert oct((target / MANIFEST).stat().st_mode & 0o777) == "0o644"


# What is kept


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_a_failure_leaves_the_old_package_and_nothing_else(target: Path, error: type[BaseException]) -> None:
    publish_package(target, "old")
    with pytest.raises(error), staged(target, force=True) as staging:
        write_package(staging, "half")
        raise error
    assert content(target) == "old"
    assert only_the_package_is_there(target)


def test_a_package_is_kept_without_force(target: Path) -> None:
    publish_package(target, "old")
    with pytest.raises(
        PackageError, match=r"x exists and was kept; replace it with --force, or name another --output$"
    ):
        publish_package(target, "new")
    assert content(target) == "old"


def test_a_package_that_came_meanwhile_is_kept(target: Path) -> None:
    with pytest.raises(PackageError, match="exists and was kept"), staged(target) as staging:
        write_package(staging, "new")
        target.mkdir()
        write_package(target, "another's")
    assert content(target) == "another's"
    assert only_the_package_is_there(target)


@pytest.mark.parametrize("manifest", [None, '{"name": "My web application"}', "[1]", "not JSON", b"\xff"])
def test_a_folder_that_is_no_package_is_kept(target: Path, manifest: str | bytes | None) -> None:
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")
    if manifest is not None:
        (target / MANIFEST).write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    with pytest.raises(PackageError, match=r"x is no package and was kept, --force or not; name another --output$"):
        publish_package(target, "new", force=True)
    assert (target / "thesis.txt").read_text() == "years of work"
    assert only_the_package_is_there(target)


def test_a_file_is_kept(target: Path) -> None:
    target.parent.mkdir()
    target.write_text("years of work")
    with pytest.raises(PackageError, match="is no package and was kept"):
        publish_package(target, "new", force=True)
    assert target.read_text() == "years of work"


@pytest.mark.parametrize("name", ["/", ".."])
def test_a_folder_of_folders_is_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(PackageError, match="is no package and was kept"):
        publish_package(Path(name), "new", force=True)


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_kept_and_so_is_what_it_leads_to(tmp_path: Path, target: Path, dangling: bool) -> None:
    aim = tmp_path / "aim"
    if not dangling:
        publish_package(aim, "old")
    target.parent.mkdir()
    target.symlink_to(aim)
    with pytest.raises(
        PackageError, match=re.escape(f"x is a link and was kept; name the folder that it leads to, {aim}")
    ):
        publish_package(target, "new", force=True)
    assert target.is_symlink()
    assert dangling or content(aim) == "old"


def test_a_link_in_place_of_the_work_folder_is_not_followed(tmp_path: Path, target: Path) -> None:
    target.parent.mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    target.with_name(".x.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"\.x\.partial"):
        publish_package(target, "new")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


# After a kill


def test_what_a_killed_conversion_left_is_cleared(tmp_path: Path, target: Path) -> None:
    left = target.with_name(".x.partial")
    (left / "onnx").mkdir(parents=True)
    (left / "onnx" / "model.onnx_data").write_text("half")
    (left / MANIFEST).write_text("half")
    (tmp_path / "elsewhere").mkdir()
    (left / "link").symlink_to(tmp_path / "elsewhere")
    with staged(target) as staging:
        assert list(staging.iterdir()) == []
        write_package(staging, "new")
    assert content(target) == "new"
    assert only_the_package_is_there(target)
    assert (tmp_path / "elsewhere").is_dir()


def test_a_kill_between_the_two_renames_is_mended(target: Path) -> None:
    old = target.with_name(".x.old")
    old.mkdir(parents=True)
    write_package(old, "old")
    with pytest.raises(PackageError, match="exists and was kept"):
        publish_package(target, "new")
    assert content(target) == "old"
    assert only_the_package_is_there(target)


def test_a_kill_after_the_two_renames_is_mended(target: Path) -> None:
    publish_package(target, "new")
    target.with_name(".x.old").mkdir()
    write_package(target.with_name(".x.old"), "old")
    publish_package(target, "newest", force=True)
    assert content(target) == "newest"
    assert only_the_package_is_there(target)


# Several at once


def test_a_second_conversion_to_the_same_place_is_refused(target: Path) -> None:
    with staged(target) as staging:
        with pytest.raises(
            PackageError, match=r"x: another conversion is writing it; wait for it, or name another --output$"
        ):
            publish_package(target, "second")
        write_package(staging, "first")
    assert content(target) == "first"


def test_a_conversion_to_another_place_goes_on(target: Path) -> None:
    with staged(target) as staging:
        publish_package(target.with_name("y"), "other")
        write_package(staging, "first")
    assert content(target) == "first"
    assert content(target.with_name("y")) == "other"


def test_a_failure_leaves_the_work_folder_of_another_alone(target: Path) -> None:
    """The name may have gone over to the next conversion by the time that the first one cleans up."""
    with pytest.raises(Boom), staged(target) as staging:
        staging.rename(target.with_name("moved"))
        staging.mkdir()
        (staging / "of the next").touch()
        raise Boom
    assert (staging / "of the next").exists()


def test_many_at_once_leave_one_whole_package(target: Path) -> None:
    refused: list[str] = []

    def convert(name: str) -> None:
        for _ in range(20):
            try:
                publish_package(target, name, force=True)
            except PackageError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=convert, args=(name,)) for name in ("a", "b", "c", "d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) < 80
    assert all("another conversion is writing it" in message for message in refused)
    assert content(target) in ("a", "b", "c", "d")
    assert only_the_package_is_there(target)


def test_the_name_always_leads_to_a_package(target: Path) -> None:
    """With the exchange there is no moment without one."""
    publish_package(target, "0")
    done = threading.Event()
    seen: list[str] = []

    def read() -> None:
        while not done.is_set():
            seen.append(json.loads((target / MANIFEST).read_text())["content"])

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 30):
        publish_package(target, str(number), force=True)
    done.set()
    reader.join()
    assert [int(each) for each in seen] == sorted(int(each) for each in seen)
    assert len(set(seen)) > 1
