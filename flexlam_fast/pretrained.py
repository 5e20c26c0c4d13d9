"""Saving and loading a policy: a directory with its configuration, its weights, and their sha256 sums."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from flexlam_fast.checkpoint import load_checkpoint, match_tensors, save_checkpoint
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from flexlam_fast.lam import LatentActionModel
    from flexlam_fast.sequence.model import SequenceModel
    from flexlam_fast.translator import Translator

ASSETS = Path(__file__).parent / "assets"


class Pretrained:
    """What a policy can do with files; :class:`flexlam_fast.Policy` adds acting."""

    cfg: FlexLAMConfig
    lam: LatentActionModel
    sequence: SequenceModel
    translator: Translator

    if TYPE_CHECKING:

        def __init__(
            self, cfg: FlexLAMConfig, *, device: torch.device | str, dtype: torch.dtype, backend: str
        ) -> None: ...

    def parts(self) -> dict[str, nn.Module]:
        """The three stages by the names that checkpoints use."""
        return {"lam": self.lam, "sequence": self.sequence, "translator": self.translator}

    def sizes(self) -> str:
        """Parameters of each stage, in millions."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.parts().items()}
        return ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items())

    def save_pretrained(
        self, directory: str | Path, *, dtype: torch.dtype | None = None, notes: dict[str, str] | None = None
    ) -> None:
        """Write ``config.json``, ``model.safetensors`` and a manifest of sha256 sums.

        Args:
            directory: where; an older checkpoint there is replaced in one step.
            dtype: of the stored weights; None keeps them as they are.
            notes: further text files by name, for example a training log.

        Raises:
            StorageError: the disk is full or forbids it; what was there before is intact.
        """
        tensors = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in self.state().items()}
        save_checkpoint(directory, tensors, self.cfg.to_json(), extra_text=notes)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> Self:
        """Load a policy from a directory, or one that ships with the package by its name.

        Raises:
            CheckpointError: nothing of that name, or a checkpoint that is corrupt, foreign, or of a future version.
            BackendError: a backend asked for by name that cannot run here.
        """
        directory = Path(name)
        if not directory.exists() and str(name) in shipped():
            directory = ASSETS / str(name)
        if not directory.exists() and "/" not in str(name):
            raise CheckpointError(f"{name}: expected a directory or one of {shipped()}, got neither")
        found = load_checkpoint(directory)
        try:
            cfg = FlexLAMConfig.from_json(found.config_json)
        except ConfigError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from error
        policy = cls(cfg, device=device, dtype=dtype, backend=backend)
        policy.load_state(str(directory / "model.safetensors"), found.tensors)
        return policy

    def state(self) -> dict[str, Tensor]:
        """All weights by name, ``lam.``, ``sequence.`` and ``translator.`` in front."""
        return {f"{part}.{key}": t for part, m in self.parts().items() for key, t in m.state_dict().items()}

    def load_state(self, file: str, tensors: dict[str, Tensor]) -> None:
        """Take over weights of any floating dtype, after checking that names and shapes are exactly this model's.

        Raises:
            CheckpointError: naming ``file`` and the first tensor that does not fit.
        """
        ours = self.state()
        match_tensors(file, {k: t.to(tensors[k].dtype) if k in tensors else t for k, t in ours.items()}, tensors)
        for key, t in ours.items():
            if not tensors[key].is_floating_point() or not bool(torch.isfinite(tensors[key]).all()):
                raise CheckpointError(f"{file}: {key}: expected finite floating numbers, got others")
            t.copy_(tensors[key])


def shipped() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(p.name for p in ASSETS.iterdir() if (p / "config.json").is_file()) if ASSETS.is_dir() else []
