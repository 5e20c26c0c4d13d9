"""From codes to action scores: null-filled latents and the translator as one op (paper sections 4.2, A.4, Table 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexlam_fast.ambient import outside_autocast
from flexlam_fast.backend import AUTO, NAMES, NATIVE, REFERENCE, TRITON, choose, named, probe
from flexlam_fast.checks import check_budget, check_tensor, describe
from flexlam_fast.errors import BackendError, InputError
from flexlam_fast.ops import arguments as check
from flexlam_fast.ops import contracts, gradients, reference

EPS = 1e-5  # of torch's LayerNorm
_MOST_WIDE_BYTES = 2048  # of one row of weights: what a program of the Triton kernel holds, doubly, on chip


class TranslatorWeights(NamedTuple):
    """A translator's weights, contiguous and of one floating dtype, which is also that of its latents.

    ``I = K d + A`` inputs. ``stem`` and ``up`` are transposed, so that what belongs to one input or one hidden unit is
    one row.
    """

    stem: Tensor  # [I, wide]
    stem_bias: Tensor  # [wide]
    norm: Tensor  # [depth, wide]
    norm_bias: Tensor  # [depth, wide]
    down: Tensor  # [depth, hidden, wide]
    down_bias: Tensor  # [depth, hidden]
    up: Tensor  # [depth, hidden, wide]
    up_bias: Tensor  # [depth, wide]
    final: Tensor  # [wide]
    final_bias: Tensor  # [wide]
    head: Tensor  # [A, wide]
    head_bias: Tensor  # [A]


def pack_translator(state: Mapping[str, Tensor]) -> TranslatorWeights:
    """Copy a translator's ``state_dict()`` into the layout that :func:`translate` takes; once, at construction.

    Args:
        state: ``stem``, ``blocks.i.norm``, ``blocks.i.down``, ``blocks.i.up``, ``norm`` and ``head``, each with
            ``.weight`` and ``.bias``, all of one floating dtype on one device.

    Raises:
        InputError: a tensor that is missing or of another dtype.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise InputError(f"state: expected a translator's tensors by name, got {describe(state)}")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    parts = [f"blocks.{i}.{part}" for i in range(depth) for part in ("norm", "down", "up")]
    names = [f"{part}.{end}" for part in ("stem", *parts, "norm", "head") for end in ("weight", "bias")]
    missing = [name for name in names if name not in state]
    if missing or not depth:
        raise InputError(f"state: expected a translator's tensors, got none named {(missing or ['blocks.0'])[0]}")
    dtype, device = state["stem.weight"].dtype, state["stem.weight"].device
    for name in names:
        check_tensor(name, state[name], ["..."], dtype if dtype in check.FLOATS else check.FLOATS, device)

    def stacked(part: str) -> Tensor:
        return torch.stack([state[f"blocks.{i}.{part}"].detach() for i in range(depth)])

    down = [stacked(f"{part}.{end}") for part in ("norm", "down") for end in ("weight", "bias")]
    up = [stacked("up.weight").transpose(1, 2).contiguous(), stacked("up.bias")]
    ends = [state[f"{part}.{end}"].detach().clone() for part in ("norm", "head") for end in ("weight", "bias")]
    stem = state["stem.weight"].detach().t().clone(memory_format=torch.contiguous_format)
    return TranslatorWeights(stem, state["stem.bias"].detach().clone(), *down, *up, *ends)


@outside_autocast
def translate(
    codes: Tensor,
    k: int,
    levels: Sequence[int],
    null: Tensor,
    previous: Tensor,
    weights: TranslatorWeights,
    *,
    slots: int,
    backend: str | None = None,
) -> Tensor:
    """Score actions from the first ``k`` codes and the previous action, every other slot filled with the null latent.

    Latents and previous actions are rounded to the weights' dtype; products accumulate in fp32. Triton keeps the
    residual stream in fp32 and gives a row the same bits in any batch; it has no gradient, so a call that wants one
    takes the reference under ``auto``.

    Args:
        codes: ``[B, n]`` int32 or int64 in ``[0, C)``, ``n >= k``; what stands at or beyond ``k`` is not read.
        k: the budget, within ``0..K``.
        levels: ``d`` integers of at least 2.
        null: ``[d]`` floating, the shared null latent.
        previous: ``[B, A]`` floating, encoded previous actions.
        weights: from :func:`pack_translator`.
        slots: ``K``.
        backend: ``"reference"``, ``"triton"``; None or ``"auto"`` takes Triton on a GPU, else the reference.

    Returns:
        The heads' outputs, fp32 ``[B, A]``: logits of each discrete dimension, then the continuous values.

    Raises:
        BudgetError: ``k`` outside ``0..K``, or more than there are codes.
        InputError: wrong shape, dtype or device, or a code below ``k`` outside ``[0, C)``. Values are read on the CPU
            only; on a GPU such a code gives some finite result of no meaning.
        BackendError: a backend asked for by name that cannot run here or has no code for this.
    """
    levels = check.levels_of(levels)
    _check(codes, k, levels, null, previous, weights, slots)
    name = _pick(named(backend), codes.device, weights.stem.dtype, weights.stem.shape[1])
    differentiated = gradients.wants_gradient(null, previous, *weights)
    if name == TRITON and (differentiated or gradients.is_transformed()):
        if backend == TRITON:
            raise BackendError("backend: expected one with gradients for translate, got 'triton'")
        name = REFERENCE
    if name == REFERENCE:
        return translate_reference(codes, k, levels, null, previous, weights, slots).float()
    run = translate_codes if gradients.is_plain(codes, null, previous) else gradients.OPS.translate_codes.default
    return run(codes, k, levels, null, previous, list(weights), slots)


def translate_reference(
    codes: Tensor,
    k: int,
    levels: Sequence[int],
    null: Tensor,
    previous: Tensor,
    weights: TranslatorWeights,
    slots: int,
) -> Tensor:
    """:func:`translate` in plain PyTorch, unchecked; the result has the weights' dtype."""
    w = weights
    values = reference.dequantize(codes[:, :k], levels)
    null = null.to(torch.promote_types(null.dtype, torch.float32))
    fill = null.expand(codes.shape[0], slots - k, len(levels))
    latents = torch.cat([values.to(null.dtype), fill], dim=1).to(w.stem.dtype)
    x = F.linear(torch.cat([latents.flatten(1), previous.to(w.stem.dtype)], dim=1), w.stem.t(), w.stem_bias)
    wide = [x.shape[1]]
    for i in range(w.down.shape[0]):
        narrow = F.linear(F.layer_norm(x, wide, w.norm[i], w.norm_bias[i], EPS), w.down[i], w.down_bias[i])
        x = x + F.linear(F.gelu(narrow), w.up[i].t(), w.up_bias[i])
    return F.linear(F.layer_norm(x, wide, w.final, w.final_bias, EPS), w.head, w.head_bias)


def translate_codes(
    codes: Tensor, k: int, levels: Sequence[int], null: Tensor, previous: Tensor, weights: list[Tensor], slots: int
) -> Tensor:
    """Run the Triton kernel on checked arguments; ``torch.ops.flexlam_fast.translate_codes``."""
    launcher = contracts.compiled(TRITON, "launch_translate")
    return launcher.translate(codes, k, tuple(levels), null, previous, weights, slots)


def _fake(codes: Tensor, k: Any, levels: Any, null: Any, previous: Tensor, weights: list[Tensor], slots: Any) -> Tensor:
    return previous.new_empty((codes.shape[0], weights[10].shape[0]), dtype=torch.float32)


contracts.define(
    "(Tensor codes, int k, int[] levels, Tensor null, Tensor previous, Tensor[] weights, int slots) -> Tensor",
    translate_codes,
    _fake,
)


def _pick(backend: str, device: torch.device, dtype: torch.dtype, wide: int) -> str:
    return _known_pick(backend, device, dtype, wide)


# a backend is no part of a traced graph; see arguments.pick
_pick._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _known_pick(backend: str, device: torch.device, dtype: torch.dtype, wide: int) -> str:
    if backend == NATIVE or backend not in NAMES:
        expected = ", ".join(name for name in NAMES if name != NATIVE)
        raise BackendError(f"backend: expected one of {expected} for translate, got {backend!r}")
    fits = dtype in check.FLOATS[:3] and wide * dtype.itemsize <= _MOST_WIDE_BYTES
    if backend == AUTO:
        there = device.type == "cuda" and any(s.name == TRITON and s.available for s in probe(device))
        return TRITON if there and fits else REFERENCE
    name = choose(backend, device).name
    if name == TRITON and not fits:
        most = f"at most {_MOST_WIDE_BYTES} bytes wide, in float32, float16 or bfloat16"
        kind = str(dtype).removeprefix("torch.")
        raise BackendError(f"backend: expected a translator {most}, for 'triton', got {wide} in {kind}")
    return name


def _check(
    codes: Tensor,
    k: int,
    levels: tuple[int, ...],
    null: Tensor,
    previous: Tensor,
    weights: TranslatorWeights,
    slots: int,
) -> None:
    check_tensor("codes", codes, ["B", "n"], check.INTEGERS)
    check_budget("slots", slots, 1, 2**31 - 1)
    check_budget("k", k, 0, min(slots, codes.shape[1]))
    check.check_null(null, len(levels), codes.device)
    if not isinstance(weights, TranslatorWeights):
        raise InputError(f"weights: expected TranslatorWeights, got {describe(weights)}")
    actions, (depth, hidden, wide) = weights.head.shape[0], weights.down.shape
    check_tensor("previous", previous, [codes.shape[0], actions], check.FLOATS, codes.device)
    sizes: dict[str, list[int]] = {name: [depth, wide] for name in ("norm", "norm_bias", "up_bias")}
    sizes |= {name: [wide] for name in ("stem_bias", "final", "final_bias")} | {"down_bias": [depth, hidden]}
    sizes |= {"stem": [slots * len(levels) + actions, wide], "down": [depth, hidden, wide], "up": [depth, hidden, wide]}
    sizes |= {"head": [actions, wide], "head_bias": [actions]}
    kinds = weights.stem.dtype if weights.stem.dtype in check.FLOATS else check.FLOATS
    for name, tensor in zip(weights._fields, weights, strict=True):
        check_tensor(f"weights.{name}", tensor, sizes[name], kinds, codes.device)
    check.check_codes(codes[:, :k], levels, None)
