"""Saving, loading and copying a policy; on disk it is its configuration, its weights, and their sha256 sums."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from flexlam_fast.backend import find_device
from flexlam_fast.checkpoint import copy_tensors, save_weights
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.manifest import MODEL
from flexlam_fast.run_folder import POLICY, find_stage

if TYPE_CHECKING:
    from flexlam_fast.deadline import LatencyTable
    from flexlam_fast.graphs import GraphedLoop
    from flexlam_fast.lam import LatentActionModel
    from flexlam_fast.loop import DecisionLoop, Stages
    from flexlam_fast.sequence.model import SequenceModel
    from flexlam_fast.translator import Translator


class Pretrained:
    """What a policy can do with files and copies; :class:`flexlam_fast.Policy` adds acting."""

    cfg: FlexLAMConfig
    lam: LatentActionModel
    sequence: SequenceModel
    translator: Translator
    stages: Stages
    loop: DecisionLoop
    graphed: GraphedLoop | None
    generator: torch.Generator
    latencies: dict[int, LatencyTable]
    warmed: dict[tuple[int, float, int | None], LatencyTable]

    if TYPE_CHECKING:

        def __init__(
            self, cfg: FlexLAMConfig, *, device: torch.device | str, dtype: torch.dtype, backend: str
        ) -> None: ...

        def _prepare(self) -> None: ...

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
            dtype: of the stored weights, float32, bfloat16 or float16; None keeps them as they are.
            notes: further text files by name, for example a training log.

        Raises:
            StorageError: the disk is full or forbids it; what was there before is intact.
        """
        save_weights(directory, self.state(), self.cfg.to_json(), dtype, notes)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> Self:
        """Load a policy.

        Args:
            name: its folder, that of a training run which has one, or the name of one that ships with the package.
            device: where it shall live; ``"auto"`` takes a GPU where there is one.
            dtype: of the weights, as in the constructor.
            backend: likewise.

        Raises:
            CheckpointError: nothing of that name, or a checkpoint that is corrupt, foreign, or of a future version; of
                a run without a policy it says which stage is missing, and the command that makes it.
            BackendError: a backend asked for by name that cannot run here.
            InputError: a device that is not here, or another dtype.
        """
        found = find_stage(name, POLICY)
        policy = cls(found.cfg, device=find_device(device), dtype=dtype, backend=backend)
        policy.load_state(str(found.path / MODEL), found.tensors)
        return policy

    def __copy__(self) -> Self:
        """The same weights, held once, with sessions of its own, which go on from where these are."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__, stages=self.stages.twin())
        own = self.loop, self.graphed, self.generator, self.latencies, self.warmed
        twin.loop, twin.graphed, twin.generator, twin.latencies, twin.warmed = copy.deepcopy(own)
        twin._prepare()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Weights and sessions of its own; what runs on them is laid out anew when the copy first decides."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._prepare()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """A copy, because ``torch.multiprocessing`` gives another process the very memory of what it is handed."""
        return copy.deepcopy(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def state(self) -> dict[str, Tensor]:
        """All weights by name, ``lam.``, ``sequence.`` and ``translator.`` in front."""
        return {f"{part}.{key}": t for part, m in self.parts().items() for key, t in m.state_dict().items()}

    def load_state(self, file: str, tensors: dict[str, Tensor]) -> None:
        """Take over weights of any floating dtype, after checking that names and shapes are exactly this model's.

        Raises:
            CheckpointError: naming ``file`` and the first tensor that does not fit.
        """
        copy_tensors(file, self.state(), tensors)
