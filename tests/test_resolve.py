"""What the user calls a checkpoint, and where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.resolve import find_checkpoint
from runtime.errors import CheckpointError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("beta", "alpha"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "README.md").touch()
    return tmp_path / "models"


def test_a_path_is_taken_as_it_stands(models: Path) -> None:
    assert find_checkpoint(str(models / "alpha"), models) == models / "alpha"


def test_a_file_is_taken_too(models: Path) -> None:
    assert find_checkpoint(str(models / "README.md"), models) == models / "README.md"


def test_a_name_is_looked_up_under_the_models_folder(models: Path) -> None:
    assert find_checkpoint("alpha", models) == models / "alpha"


def test_a_folder_here_goes_before_the_models_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models.parent)
    (models.parent / "alpha").mkdir()
    assert find_checkpoint("alpha", models) == Path("alpha")


def test_an_unknown_name_is_refused_with_the_known_ones(models: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("gamma", models)
    assert str(caught.value) == (
        f"gamma: no checkpoint folder; looked at gamma and {models}/gamma; {models} holds alpha, beta; "
        "this version downloads nothing"
    )


def test_an_absolute_path_is_looked_at_once(models: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"; looked at {models}/gamma; "):
        find_checkpoint(f"{models}/gamma", models)


def test_a_missing_models_folder_holds_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere holds no checkpoints; "):
        find_checkpoint("gamma", tmp_path / "nowhere")
