"""Which calls of a ``transformers`` model's ``generate`` are plain greedy decoding, and what they ask for."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexlam_fast.swapped import is_plain

#: Options that are read here.
_READ = {"max_length", "max_new_tokens", "eos_token_id", "pad_token_id"}
#: Options that say nothing when the likeliest token is taken; a Qwen3 that is downloaded brings some of them along.
_IDLE = {
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "bos_token_id",
    "disable_compile", "transformers_version",
}  # fmt: skip
_EVERY = 16  # tokens between two looks at what a GPU has found: a look waits for it


class Greedy(NamedTuple):
    """A prompt int64 ``[B, N]``, the most new tokens, which tokens end a row, and what fills it from there on."""

    prompt: Tensor
    most: int
    ends: tuple[int, ...]
    pad: int

    def finish(self, codes: Tensor) -> Tensor:
        """The prompt and ``codes`` integers ``[B, k]``, int64, padded behind each row's end and cut at the last."""
        codes = codes.long()
        if self.ends:
            ends = torch.isin(codes, self.end_tensor())
            ended = ends.cumsum(1)
            codes = codes.masked_fill(ended - ends.long() > 0, self.pad)
            open_ones = int((ended == 0).any(0).sum())  # columns before the one in which the last row ends
            codes = codes[:, : open_ones + 1]
        return torch.cat([self.prompt, codes], dim=1)

    def end_tensor(self) -> Tensor:
        """The tokens that end a row, on the prompt's device."""
        return torch.tensor(self.ends, device=self.prompt.device)


class AllEnded:
    """Asked after every code, whether all rows have ended; on a GPU it looks at every 16th only."""

    def __init__(self, asked: Greedy) -> None:
        self.ends, self.count = asked.end_tensor(), 0
        self.ended = torch.zeros(len(asked.prompt), dtype=torch.bool, device=asked.prompt.device)
        self.every = 1 if asked.prompt.device.type == "cpu" else _EVERY

    def __call__(self, code: Tensor) -> bool:
        # not in place: what inference mode made may not be written to outside of it, where codes are generated
        self.ended = self.ended | torch.isin(code, self.ends)
        self.count += 1
        return self.count % self.every == 0 and bool(self.ended.all())


def read(model: Any, original: type, inputs: Any, config: Any, options: dict[str, Any]) -> Greedy | str:
    """What ``model.generate(inputs, config, **options)`` asks for, or in one sentence why it is not plain greedy.

    The installed version works out itself which option applies, and its own defaults count as saying nothing, so that
    an option of a newer version is not overlooked.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("synced_gpus") is False:
        del given["synced_gpus"]
    for name in inspect.signature(original.generate).parameters:  # type: ignore[attr-defined]
        if name in given:
            return f"{name} is given"
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    if (ids is None) == (inputs is None):
        return "expected one of inputs and input_ids"
    prompt = inputs if ids is None else ids
    if not is_plain(prompt) or prompt.dim() != 2 or prompt.dtype != torch.int64 or not prompt.numel():
        return "input_ids are not int64 [B, N]"
    if prompt.device != model.lm_head.weight.device:
        return "input_ids are on another device"
    try:
        options_now, left = model._prepare_generation_config(config, **given)
    except Exception as error:  # the original says the same, in its own words
        return f"{type(error).__name__}: {error}"
    usual = _defaults(type(options_now))
    special = [name for name in left if left[name] is not None]
    special += [name for name, value in vars(options_now).items() if not _says_nothing(name, value, usual)]
    if special:
        return f"{special[0]} is given"
    absolute = "max_length" in given or options_now.max_length != usual.get("max_length")
    return _asked(prompt, mask, options_now, absolute)


def _asked(prompt: Tensor, mask: Any, options: Any, absolute: bool) -> Greedy | str:
    """The request, from options that are in force; ``absolute`` says that somebody chose ``max_length``."""
    ends, pad = options.eos_token_id, options.pad_token_id
    ends = [] if ends is None else ends if isinstance(ends, list | tuple) else [ends]
    if not ends and options.eos_token_id is not None:
        return "eos_token_id is empty"
    pad = ends[0] if pad is None and ends else pad
    if not all(type(token) is int and token >= 0 for token in [*ends, 0 if pad is None else pad]):
        return "eos_token_id and pad_token_id are no plain numbers"
    if mask is not None:
        full = isinstance(mask, Tensor) and mask.shape == prompt.shape and bool((mask == 1).all())
    else:  # which is then made from the padding, if there is a token for it alone
        full = pad is None or pad in ends or not bool((prompt == pad).any())
    if not full:
        return "the prompt is padded"
    most = options.max_new_tokens
    if most is None and absolute and type(options.max_length) is int:
        most = options.max_length - prompt.shape[1]
    if type(most) is not int or most < 1:
        return "no number of new tokens is given"
    return Greedy(prompt, most, tuple(ends), pad or 0)


def _defaults(kind: type) -> dict[str, Any]:
    """What the options are when nobody has said anything; in transformers 5 a new configuration says None."""
    usual = {name: value for name, value in vars(kind()).items() if value is not None}
    return {**getattr(kind, "_get_default_generation_params", dict)(), **usual}


def _says_nothing(name: str, value: Any, usual: dict[str, Any]) -> bool:
    if value is None or name.startswith("_") or name in _READ or name in _IDLE:
        return True
    if isinstance(value, dict | list):
        return not value
    return not isinstance(value, Tensor) and bool(value == usual.get(name, False))
