"""From the checkpoints of a run to models: the frozen LAM that later stages start from, and the finished policy."""

from __future__ import annotations

from pathlib import Path

import torch

from flexlam_fast.backend import DTYPES
from flexlam_fast.checkpoint import copy_tensors
from flexlam_fast.errors import CheckpointError, InputError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.manifest import MODEL
from flexlam_fast.policy import Policy
from flexlam_fast.run_folder import JOINT, LAM, POLICY, SEQUENCE, TRANSLATOR, Found, find_in_run, find_stage
from flexlam_fast.train.codes import fingerprint


def load_lam(path: str | Path) -> LatentActionModel:
    """Load a frozen LAM, as training takes it, from whatever holds one (``run_folder.find_stage``).

    Raises:
        CheckpointError: nothing there, or not a LAM.
    """
    return frozen(find_stage(path, LAM))


def frozen(found: Found) -> LatentActionModel:
    """The LAM that has been found, in fp32 on the CPU, in evaluation mode and without gradients."""
    return LatentActionModel.loaded(found, "reference").eval().requires_grad_(False)


def check_dtype(name: str) -> torch.dtype:
    """The dtype of exported weights by its name.

    Raises:
        InputError: no such dtype.
    """
    if name not in DTYPES:
        raise InputError(f"export_dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def export(run: Path, dtype: torch.dtype = torch.float16) -> Policy:
    """Put the stages of a run together as a policy and write it to ``run/policy``.

    Args:
        run: a run directory with lam (or joint), sequence and translator trained.
        dtype: of the stored weights.

    Raises:
        CheckpointError: a stage is missing, or was trained with another LAM than the run has now.
    """
    found = {part: find_in_run(run, part, finished=False) for part in (LAM, TRANSLATOR, SEQUENCE)}
    lam = frozen(found[LAM])
    source = fingerprint(lam)
    for part in (TRANSLATOR, SEQUENCE):
        _, path, _, _, notes, _ = found[part]
        if notes.get("stage") != JOINT and notes.get("lam") != source:
            theirs = str(notes.get("lam"))[:12]
            raise CheckpointError(
                f"{path}: expected stage {part} trained with {found[LAM].path} (LAM {source[:12]}), got LAM {theirs}; "
                f"delete {path.parent} and train that stage again"
            )
    made = Policy(lam.cfg)
    for part, model in made.parts().items():
        copy_tensors(str(found[part].path / MODEL), model.state_dict(), found[part].tensors)
    made.save_pretrained(run / POLICY, dtype=dtype)
    print(f"{run / POLICY}: {made.describe()}")
    return made
