"""Metrics of a run: one JSON object a line, always; TensorBoard on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexlam_fast.errors import FlexLAMError, StorageError


class MetricsLog:
    """Appends to ``metrics.jsonl``; a resumed run first drops the lines of steps that will be done again."""

    def __init__(self, directory: Path, step: int, tensorboard: bool = False) -> None:
        self.path = directory / "metrics.jsonl"
        self.board = _board(directory) if tensorboard else None
        try:
            old = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            kept = [line for line in old if _step_of(line) <= step]
            self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise _full(self.path, error) from error

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log ``metrics`` as what was known after ``step`` steps."""
        try:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        except OSError as error:
            raise _full(self.path, error) from error
        if self.board is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files.

        Raises:
            StorageError: what was written last did not reach the disk.
        """
        try:
            self.file.close()
        except OSError as error:
            raise _full(self.path, error) from error
        finally:
            if self.board is not None:
                self.board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


def _full(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: expected to write the metrics, got: {error.strerror or error}")


def _board(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FlexLAMError(
            "--tensorboard: expected the tensorboard package, got none: pip install tensorboard"
        ) from error
    return SummaryWriter(str(directory / "tensorboard"))
