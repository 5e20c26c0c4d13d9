"""Weights of the blocks laid out for deciding: projections of the same input in one matrix, held once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexlam_fast.ops.block import LayerTensors, ModelTensors
from flexlam_fast.sequence.model import SequenceBlock, SequenceModel


class Layer(NamedTuple):
    """One block, with its query, key and value projections as qkv ``[(H + 2G) * D, W]``, gate and up ``[2I, W]``."""

    block: SequenceBlock
    qkv: Tensor
    gate_up: Tensor


def pack(model: SequenceModel, layers: list[Layer]) -> list[Layer]:
    """Return packed weights of every block, the old ones where parameters still are views of them.

    The parameters become views of what is packed. Loading weights in place changes both; moving or casting the model
    parts them, and then they are packed anew.
    """
    packed = []
    for i, block in enumerate(model.blocks):
        assert isinstance(block, SequenceBlock)
        old = layers[i] if i < len(layers) and layers[i].block is block else None
        qkv = _joined([block.q, block.k, block.v], old.qkv if old else None)
        gate_up = _joined([block.gate, block.up], old.gate_up if old else None)
        packed.append(Layer(block, qkv, gate_up))
    return packed


def tensors_of(model: SequenceModel, layers: list[Layer]) -> ModelTensors:
    """The weights of ``model``, whose layers have been packed, as an engine takes them.

    Each is an alias of its own: a parameter that is given other data would take a tensor that is kept along.
    """
    packed = []
    for block, qkv, gate_up in layers:
        norms = block.norm1.weight, qkv, block.q_norm.weight, block.k_norm.weight
        tensors = *norms, block.out.weight, block.norm2.weight, gate_up, block.down.weight
        packed.append(LayerTensors(*(t.detach() for t in tensors)))
    place = model.slot_place.detach() if model.cfg.sequence.places else None
    norm, head = (part.weight.detach() for part in (model.norm, model.head))
    return ModelTensors(tuple(packed), model.codes.weight.detach(), place, norm, head)


def _joined(parts: list[nn.Linear], old: Tensor | None) -> Tensor:
    """Return one matrix of whose rows the weights of ``parts`` are views."""
    if old is None:
        old = _whole(parts)  # what another way through the model has packed already, which may be in a captured graph
    if old is not None and _are_rows(parts, old):
        return old
    joined = torch.cat([part.weight.detach() for part in parts])
    for part, rows in zip(parts, joined.split([part.out_features for part in parts]), strict=True):
        if part.weight.is_inference():  # made in inference mode: its data cannot be exchanged
            part.weight = nn.Parameter(rows, requires_grad=part.weight.requires_grad)
        else:
            part.weight.data = rows
    return joined


def _whole(parts: list[nn.Linear]) -> Tensor | None:
    """The matrix at the start of the memory that holds the first of ``parts``, if all would fit into it."""
    first, rows = parts[0].weight.detach(), sum(part.out_features for part in parts)
    if first.untyped_storage().nbytes() != rows * first.shape[1] * first.element_size():
        return None
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), 0)


def _are_rows(parts: list[nn.Linear], whole: Tensor) -> bool:
    """Whether the weights of ``parts`` are, in order, the rows of ``whole``."""
    at = 0
    for part in parts:
        weight = part.weight
        if weight.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or weight.dtype != whole.dtype:
            return False
        if weight.storage_offset() != at:
            return False
        at += weight.numel()
    return True
