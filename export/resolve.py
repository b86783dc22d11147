"""What the user calls a checkpoint -> where it lies."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import CheckpointError


def find_checkpoint(name: str, models_dir: Path) -> Path:
    """Find a checkpoint, a folder or a file: a path as it stands, else a name under the models folder.

    Raises:
        CheckpointError: neither exists; both places are named.
    """
    places = dict.fromkeys((Path(name), models_dir / name))  # one, if the name is an absolute path
    for place in places:
        if place.exists():
            return place
    known = sorted(path.name for path in models_dir.iterdir() if path.is_dir()) if models_dir.is_dir() else []
    raise CheckpointError(
        f"{name}: no checkpoint folder; looked at {' and '.join(map(str, places))}; "
        f"{models_dir} holds {', '.join(known) or 'no checkpoints'}; this version downloads nothing"
    )
