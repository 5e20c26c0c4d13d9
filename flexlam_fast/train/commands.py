"""The commands ``flexlam-fast train {lam,sequence,translator,joint,all,policy}``.

A run directory holds one folder a stage (``lam``, ``sequence``, ``translator``, ``joint``), the encoded ``codes``, and
``policy``, the finished checkpoint. Every command resumes where it was stopped when it is given again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexlam_fast.backend import find_device
from flexlam_fast.checkpoint import copy_tensors
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import ConfigError, InputError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.layers import training_backend
from flexlam_fast.manifest import MODEL
from flexlam_fast.run_folder import LAM, TRANSLATOR, Found, checkpoints_of, find_in_run, find_stage
from flexlam_fast.train.codes import encode_dataset, fingerprint
from flexlam_fast.train.export import check_dtype, export, frozen
from flexlam_fast.train.joint import JointModel, JointStage
from flexlam_fast.train.lam import LamStage
from flexlam_fast.train.loop import Stage, Trainer
from flexlam_fast.train.memory import keep_memory
from flexlam_fast.train.options import RunOptions, check_label_options
from flexlam_fast.train.peers import Peers, is_shared
from flexlam_fast.train.recipes import COLLECTION, LABELS, RECIPES, Recipe
from flexlam_fast.train.sequence import SequenceStage
from flexlam_fast.train.translator import TranslatorStage, check_actions, choose_labels
from flexlam_fast.translator import Translator
from flexlam_fast.values import check_number, check_path, make_folder

#: A larger weight of the action loss leaves nothing of the LAM's own.
MAX_WEIGHT = 1e6


def lam(options: RunOptions) -> None:
    """Stage 1: train encoder, bottleneck and decoder on action-free transitions.

    Args:
        options: of the run.
    """
    store, recipe, device, peers, _ = _begin(options, "lam")
    _train(options, LamStage(_config(options), store, recipe.batch, options.seed, device, peers), recipe)


def sequence(options: RunOptions, lam: Path | None = None) -> None:
    """Stage 2: encode the data once with a frozen LAM, then train the sequence model on the codes.

    Args:
        options: of the run.
        lam: a LAM: another run, its stage lam or joint, a checkpoint of it, or a policy; left out, this run's own,
            from joint alignment where there is one.
    """
    own = functools.partial(find_in_run, options.output, LAM, finished=False)
    store, recipe, device, peers, found = _begin(options, "sequence", own if lam is None else lambda: _given(lam))
    model = _lam(found, peers).to(device)
    codes = _encode(options, model, store, device, peers)
    source = fingerprint(model)
    stage = SequenceStage(model.cfg, store, codes, recipe.batch, options.seed, device, source, peers)
    _train(options, stage, recipe)


def translator(
    options: RunOptions, labels: float | None = None, labels_from: str | None = None, lam: Path | None = None
) -> None:
    """Stage 3: train the translator on a few labelled transitions, with the LAM frozen.

    Args:
        options: of the run.
        labels: below 1 a share of the transitions (the paper: 0.00025), otherwise a count; left out, the preset's.
        labels_from: take all labels from this task (the narrow-source test); left out, equally from every task.
        lam: as for the sequence model; left out, the run's own, from stage lam.
    """
    check_label_options(labels, labels_from)
    where = options.output / LAM if lam is None else lam
    store, recipe, device, peers, found = _begin(options, "translator", lambda: _given(where))
    model = _lam(found, peers).to(device)
    chosen = choose_labels(store, "train", _labels(options, labels), options.seed, labels_from)
    codes = _encode(options, model, store, device, peers)
    source = fingerprint(model)
    stage = TranslatorStage(model.cfg, store, model, codes, chosen, recipe.batch, options.seed, device, source, peers)
    _train(options, stage, recipe)


def joint(
    options: RunOptions, labels: float | None = None, labels_from: str | None = None, weight: float = 1.0
) -> None:
    """Optional stage: let the action loss update encoder and bottleneck together with the translator.

    Needs the stage lam, and starts from the translator where there is one. Train the sequence model afterwards, because
    the codes change.

    Args:
        options: of the run.
        labels: as for the translator.
        labels_from: as for the translator.
        weight: of the action loss beside the LAM's own, 0 to 1,000,000.
    """
    check_label_options(labels, labels_from)
    check_number("weight", weight, 0, MAX_WEIGHT)
    store, recipe, device, peers, found = _begin(options, "joint", lambda: _given(options.output / LAM))
    model = _lam(found, peers).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = Translator(model.cfg)
    if checkpoints_of(options.output / TRANSLATOR):
        found = find_stage(options.output / TRANSLATOR, TRANSLATOR)
        copy_tensors(str(found.path / MODEL), head.state_dict(), found.tensors)
    chosen = choose_labels(store, "train", _labels(options, labels), options.seed, labels_from)
    source = fingerprint(model)
    both = JointModel(model, head)
    stage = JointStage(model.cfg, store, both, chosen, recipe.batch, options.seed, device, source, weight, peers)
    _train(options, stage, recipe)


def all_stages(
    options: RunOptions,
    labels: float | None = None,
    labels_from: str | None = None,
    with_joint: bool = False,
    export_dtype: str = "float16",
) -> None:
    """Everything: collect ViZDoom episodes if ``data`` does not exist, train all stages, write ``output/policy``.

    Args:
        options: of the run; ``steps``, ``batch`` and ``lr`` would mean every stage at once and are refused.
        labels: as for the translator.
        labels_from: as for the translator.
        with_joint: joint alignment in place of the translator stage: the labels also shape the codes.
        export_dtype: of the weights in ``output/policy``: float16, bfloat16 or float32.
    """
    if any(value is not None for value in (options.steps, options.batch, options.lr)):
        raise InputError("train all: expected no steps, batch or lr (they differ by stage), got one of them")
    dtype = check_dtype(export_dtype)
    check_label_options(labels, labels_from)
    options.check()
    cfg, device = _config(options), _device(options)
    peers = Peers.join(device)
    peers.first(lambda: _collect_missing(options, cfg.frame))
    store = EpisodeStore.open(options.data)
    check_actions(cfg, store)  # what would stop a later stage stops the first
    choose_labels(store, "train", _labels(options, labels), options.seed, labels_from)
    lam(options)
    align = joint if with_joint else translator
    align(options, labels, labels_from)
    sequence(options)
    peers.first(lambda: export(options.output, dtype))


def policy(output: Path, export_dtype: str = "float16") -> None:
    """Put the trained stages of a run together and write ``output/policy``, as ``all`` does at its end.

    Args:
        output: the run directory.
        export_dtype: of the weights: float16, bfloat16 or float32.
    """
    export(output, check_dtype(export_dtype))


class _Start(NamedTuple):
    """What every stage begins with."""

    store: EpisodeStore
    recipe: Recipe
    device: torch.device
    peers: Peers
    found: Any  # what holds the LAM; None where none is needed


def _begin(options: RunOptions, stage: str, find: Callable[[], Found] | None = None) -> _Start:
    """Check all that is known before any work, open the data, and ``find`` the LAM that the stage needs, if any."""
    options.check()
    recipe, device = _recipe(options, stage), _device(options)
    training_backend(options.backend, device)
    store = EpisodeStore.open(options.data)
    found = find() if find else None
    if found is not None:
        store.check_frames(found.cfg.frame, found.cfg.channels)
    make_folder(options.output)
    return _Start(store, recipe, device, Peers.join(device), found)


def _given(lam: Path) -> Found:
    return find_stage(check_path("lam", lam), LAM)


def _lam(found: Found, peers: Peers) -> LatentActionModel:
    """The frozen LAM that has been found, said aloud."""
    if peers.rank == 0:
        print(found, flush=True)
    return frozen(found)


def _device(options: RunOptions) -> torch.device:
    """The device of this process: of those that ``torchrun`` started on a machine, each takes a GPU of its own."""
    name = options.device
    if name in ("auto", "cuda") and torch.cuda.is_available() and is_shared():
        name = f"cuda:{torch.distributed.get_node_local_rank()}"
    return find_device(name)


def _collect_missing(options: RunOptions, size: int) -> None:
    if not options.data.exists():
        from flexlam_fast.data.collect import collect

        collect(options.data, tuple(COLLECTION), steps=tuple(COLLECTION.values()), seed=options.seed, size=size)


def _encode(
    options: RunOptions, model: LatentActionModel, store: EpisodeStore, device: torch.device, peers: Peers
) -> NDArray[np.int32]:
    """The codes of the data, encoded by the first process where they are not there yet."""
    store.check_frames(model.cfg.frame, model.cfg.channels)
    folder = options.output / "codes"
    peers.first(lambda: encode_dataset(model, store, folder, device))
    return encode_dataset(model, store, folder, device)


def _train(options: RunOptions, stage: Stage, recipe: Recipe) -> None:
    folder = options.output / stage.name
    keep_memory()
    trainer = Trainer(
        stage,
        recipe,
        folder,
        device=stage.device,
        precision=options.precision,
        tensorboard=options.tensorboard,
        shard=options.shard,
        backend=options.backend,
    )
    if trainer.writes:
        print(trainer.describe(), flush=True)
    done = trainer.run()
    if trainer.writes:
        print(f"{folder}: {done.step} steps, best validation loss {done.best:.4f}")


def _config(options: RunOptions) -> FlexLAMConfig:
    cfg = FlexLAMConfig.from_json(options.config) if options.config else FlexLAMConfig.preset(options.preset)
    if options.prefix is not None:
        cfg = dataclasses.replace(cfg, bottleneck=dataclasses.replace(cfg.bottleneck, prefix=options.prefix))
    return cfg


def _recipe(options: RunOptions, stage: str) -> Recipe:
    if options.preset not in RECIPES:
        raise ConfigError(f"preset: expected one of {sorted(RECIPES)}, got {options.preset!r}")
    given = {name: getattr(options, name) for name in ("steps", "batch", "lr", "save_every", "validate_every")}
    return dataclasses.replace(RECIPES[options.preset][stage], **{k: v for k, v in given.items() if v is not None})


def _labels(options: RunOptions, labels: float | None) -> float:
    return LABELS[options.preset] if labels is None else labels
