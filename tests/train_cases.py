"""Small stages of every kind, with data that has something to learn; shared by the tests of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from small import small_config

from flexlam_fast.backend import REFERENCE
from flexlam_fast.config import FlexLAMConfig
from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.train.joint import JointModel, JointStage
from flexlam_fast.train.lam import LamStage
from flexlam_fast.train.loop import Stage
from flexlam_fast.train.sequence import SequenceStage
from flexlam_fast.train.translator import TranslatorStage, choose_labels
from flexlam_fast.translator import Translator

BATCH = 8
KINDS = ("lam", "sequence-all", "sequence-last", "translator", "joint")


def config(**sequence: Any) -> FlexLAMConfig:
    cfg = small_config()
    return dataclasses.replace(cfg, sequence=dataclasses.replace(cfg.sequence, **sequence))


def codes_of(store: EpisodeStore) -> np.ndarray[Any, Any]:
    """Codes that follow from the ones before, so that there is something to learn."""
    rows = np.arange(store.num_frames)[:, None] * np.array([1, 3, 5, 7]) + np.arange(4)
    return (rows % 11).astype(np.int32)


def made(kind: str, store: EpisodeStore, device: torch.device) -> Stage:
    """The stage of a kind; sequence models ask for decisions at all frames of a window or at its last."""
    common = (BATCH, 0, device)
    if kind == "lam":
        return LamStage(small_config(), store, *common)
    if kind.startswith("sequence"):
        decisions = kind.partition("-")[2]
        return SequenceStage(config(decisions=decisions), store, codes_of(store), *common)
    torch.manual_seed(0)
    lam, labels = LatentActionModel(small_config(), REFERENCE).to(device), choose_labels(store, "train", 40.0, 0)
    if kind == "joint":
        return JointStage(small_config(), store, JointModel(lam, Translator(small_config())), labels, *common)
    return TranslatorStage(small_config(), store, lam.requires_grad_(False), codes_of(store), labels, *common)
