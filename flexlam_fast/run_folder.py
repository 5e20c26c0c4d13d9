"""Which checkpoint a path means: a policy, a stage of a training run, the whole run, or a name that ships with us.

A run's folder holds a folder for each stage and the finished ``policy``; a stage's folder holds ``best`` (lowest
validation loss) and ``last`` (to resume from). Wherever a part is read, ``best`` is taken if there is one, else
``last``; and what joint alignment trained goes before what it started from.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flexlam_fast.checkpoint import holds_checkpoint, load_checkpoint
from flexlam_fast.checks import describe
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.errors import CheckpointError, ConfigError, FlexLAMError, InputError
from flexlam_fast.manifest import CONFIG

ASSETS = Path(__file__).parent / "assets"
LAM, JOINT, SEQUENCE, TRANSLATOR, POLICY = "lam", "joint", "sequence", "translator", "policy"
BEST, LAST, TRAINER = "best", "last", "trainer.json"
#: What a caller may ask for, and the folders of a run that hold it, the first that is there before the others.
PARTS = {
    LAM: (JOINT, LAM, POLICY),
    SEQUENCE: (SEQUENCE, POLICY),
    TRANSLATOR: (JOINT, TRANSLATOR, POLICY),
    POLICY: (POLICY,),
}
_NAMES = {
    LAM: "a latent action model",
    SEQUENCE: "a sequence model",
    TRANSLATOR: "a translator",
    POLICY: "a policy",
    JOINT: "a latent action model with a translator",
}
_STAGES = (LAM, JOINT, TRANSLATOR, SEQUENCE)


class Found(NamedTuple):
    """A part of a checkpoint.

    ``path`` of the checkpoint, its configuration, the tensors of the part by the part's own names, ``notes`` of the
    training that wrote it (empty if none did), and in ``choice`` how it was chosen (empty if it was named).
    """

    part: str
    path: Path
    cfg: FlexLAMConfig
    tensors: dict[str, Tensor]
    notes: dict[str, Any]
    choice: str

    def __str__(self) -> str:
        return f"{_NAMES[self.part]} from {self.path}{self.choice}"


def shipped() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(p.name for p in ASSETS.iterdir() if (p / CONFIG).is_file()) if ASSETS.is_dir() else []


def find_stage(name: str | Path, part: str) -> Found:
    """Load a part from whatever holds it.

    Args:
        name: the folder of a run, of a stage, of a stage's ``best`` or ``last``, or of a policy, or a shipped name.
        part: ``"lam"``, ``"sequence"``, ``"translator"``, or ``"policy"`` for all three.

    Raises:
        CheckpointError: nothing is there, something else, or a checkpoint that is damaged, foreign or too new; of a
            part that is not trained yet it says which command does it.
        InputError: ``name`` is no path.
    """
    try:
        path = Path(name)
    except TypeError:
        raise InputError(f"checkpoint: expected a path or a name, got {describe(name)}") from None
    try:
        return _find(path, part)
    except (OSError, ValueError) as error:  # a path that no file system takes, or may not be looked at
        if isinstance(error, FlexLAMError):
            raise
        cause = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(f"{path}: expected to read a checkpoint, got: {cause}") from error


def find_in_run(run: Path, part: str, *, finished: bool = True) -> Found:
    """The same from the folder of a run, which need not be there yet; ``finished`` says whether its policy will do.

    Raises:
        CheckpointError: as :func:`find_stage`.
    """
    for stage in PARTS[part]:
        if stage == POLICY and finished and _is_there(run / POLICY):
            return _load(run / POLICY, part, " (the finished policy)" if part != POLICY else "")
        if checkpoints_of(run / stage):
            return _find_best(run / stage, part)
    raise CheckpointError(_untrained(run, part))


def _find(path: Path, part: str) -> Found:
    if not _is_there(path):
        if str(path) in shipped():
            return _load(ASSETS / str(path), part)
        if path.name in PARTS[part][:-1]:
            raise CheckpointError(_untrained(path.parent, path.name))
        raise CheckpointError(f"{path}: expected a directory or one of {shipped()}, got neither")
    if not path.is_dir() or holds_checkpoint(path):
        return _load(path, part)
    if checkpoints_of(path):
        return _find_best(path, part)
    if any((path / stage).is_dir() for stage in (*_STAGES, POLICY)):
        return find_in_run(path, part)
    if path.name in _STAGES:
        raise CheckpointError(_untrained(path.parent, path.name))
    got = "other files" if any(path.iterdir()) else "an empty folder"
    raise CheckpointError(f"{path}: expected the folder of a checkpoint, a stage or a run, got {got}")


def checkpoints_of(stage: Path) -> list[str]:
    """Which of ``best`` and ``last`` the folder of a stage holds, the one that is taken first."""
    return [name for name in (BEST, LAST) if _is_there(stage / name)]


def _is_there(path: Path) -> bool:
    return path.exists() or holds_checkpoint(path)


def _find_best(stage: Path, part: str) -> Found:
    there = checkpoints_of(stage)
    return _load(stage / there[0], part, " (of best and last)" if len(there) > 1 else f" (there is only {there[0]})")


def _load(path: Path, part: str, choice: str = "") -> Found:
    found = load_checkpoint(path)
    kind = _kind(found.tensors)
    if part != kind and not (kind == POLICY or (kind == JOINT and part in (LAM, TRANSLATOR))):
        raise CheckpointError(f"{path}: expected {_NAMES[part]}, got {_NAMES.get(kind, kind)}")
    try:
        cfg = FlexLAMConfig.from_json(found.config_json)
    except ConfigError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error
    tensors = found.tensors
    if part != kind:
        tensors = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
    return Found(part, path, cfg, tensors, _notes(path, found.extra_text.get(TRAINER, "{}")), choice)


def _kind(names: Iterable[str]) -> str:
    """What holds tensors of such names: a part, joint alignment's two, or in words something else."""
    heads = {name.split(".")[0] for name in names}
    if LAM in heads:
        return POLICY if SEQUENCE in heads else JOINT
    for kind, own in ((LAM, "encoder"), (SEQUENCE, "observe"), (TRANSLATOR, "stem")):
        if own in heads:
            return kind
    return "another model's weights"


def _notes(path: Path, text: str) -> dict[str, Any]:
    try:
        notes = json.loads(text)
    except ValueError:
        notes = None
    if not isinstance(notes, dict):
        raise CheckpointError(f"{path / TRAINER}: expected what a training was given, got other text")
    return notes


def _untrained(run: Path, part: str) -> str:
    """One sentence: what the folder of a run lacks, and the command that makes it."""
    missing = next((stage for stage in _needed(run, part) if not checkpoints_of(run / stage)), None)
    where = f"--output {shlex.quote(str(run))}"
    if missing is None:
        return f"{run}: expected a policy, got a run of stages apart; flexlam-fast train policy {where} joins them"
    command = f"flexlam-fast train {missing} --data DATA {where}"
    return f"{run}: expected {_NAMES[part]}, got a run without a checkpoint of stage {missing}; {command} makes it"


def _needed(run: Path, part: str) -> tuple[str, ...]:
    if part != POLICY:
        return (part,)
    joint = bool(checkpoints_of(run / JOINT))
    return (SEQUENCE,) if joint else (LAM, TRANSLATOR, SEQUENCE)
