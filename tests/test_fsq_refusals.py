"""What the ops of FSQ refuse, in one sentence each."""

from __future__ import annotations

import pytest
import torch
from fsq_rule import KEEP, L

from flexlam_fast import ops
from flexlam_fast.errors import BackendError, InputError

Z, NULL = torch.zeros(3, 6, 4), torch.zeros(4)
WRONG_FSQ = [
    (dict(z=Z.to(torch.int32)), r"^z: expected \[\.\.\.,K,4\] float32 or .*, got \[3,6,4\] int32 cpu$"),
    (dict(z=torch.zeros(3, 6, 5)), r"^z: expected .*, got \[3,6,5\] float32 cpu$"),
    (dict(z=torch.zeros(4)), r"^z: expected .*, got \[4\] float32 cpu$"),
    (dict(z=[1.0]), r"^z: expected .*, got list"),
    (dict(levels=(8, 5, 5, 1)), r"^levels: expected integers of at least 2, got \[8, 5, 5, 1\]$"),
    (dict(levels=()), r"^levels: expected integers"),
    (dict(levels=(8, 5, 5, 2.5)), r"^levels: expected integers"),
    (dict(levels=(2**16, 2**15)), r"^levels: expected a codebook below 2\^31"),
    (dict(keep=KEEP.float()), r"^keep: expected \[3\] int32 or int64 cpu, got \[3\] float32 cpu$"),
    (dict(keep=KEEP[:2]), r"^keep: expected \[3\] .*, got \[2\] int64 cpu$"),
    (dict(keep=torch.tensor([0, 3, 7])), r"^keep: expected 0\.\.6, got 0\.\.7$"),
    (dict(keep=torch.tensor([-1, 3, 6])), r"^keep: expected 0\.\.6, got -1\.\.6$"),
    (dict(keep=KEEP.to("meta")), r"^keep: expected \[3\] int32 or int64 cpu, got \[3\] int64 meta$"),
    (dict(null=None), r"^null: expected a null latent with keep, got None$"),
    (dict(null=torch.zeros(5)), r"^null: expected \[4\] .*, got \[5\] float32 cpu$"),
    (dict(null=torch.zeros(4, dtype=torch.int64)), r"^null: expected .*, got \[4\] int64 cpu$"),
    (dict(null=NULL.to("meta")), r"^null: expected .* cpu, got \[4\] float32 meta$"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG_FSQ, ids=[s for _, s in WRONG_FSQ])
def test_fsq_says_in_one_sentence_what_is_wrong(change: dict[str, object], sentence: str) -> None:
    arguments: dict[str, object] = {"z": Z, "levels": L, "keep": KEEP, "null": NULL, **change}
    with pytest.raises(InputError, match=sentence) as caught:
        ops.fsq(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


CODES = torch.zeros(3, 6, dtype=torch.int32)
WRONG_CODES = [
    (dict(codes=CODES.float()), r"^codes: expected \[\.\.\.,K\] int32 or int64, got \[3,6\] float32 cpu$"),
    (dict(codes=torch.tensor(3)), r"^codes: expected .*, got \[\] int64 cpu$"),
    (dict(codes=CODES + 1000), r"^codes: expected 0\.\.999, got int 1000$"),
    (dict(codes=CODES - 1), r"^codes: expected 0\.\.999, got int -1$"),
    (dict(codes=CODES + 1000, keep=None), r"^codes: expected 0\.\.999, got int 1000$"),
    (dict(keep=torch.tensor([0, 3, 7])), r"^keep: expected 0\.\.6, got 0\.\.7$"),
    (dict(null=torch.zeros(3)), r"^null: expected \[4\]"),
    (dict(levels=(1, 5)), r"^levels: expected integers of at least 2, got \[1, 5\]$"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG_CODES, ids=[s for _, s in WRONG_CODES])
def test_codes_to_latents_says_in_one_sentence_what_is_wrong(change: dict[str, object], sentence: str) -> None:
    arguments: dict[str, object] = {"codes": CODES, "levels": L, "keep": KEEP, "null": NULL, **change}
    with pytest.raises(InputError, match=sentence) as caught:
        ops.codes_to_latents(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BackendError, match="^backend: expected"):
        ops.fsq(Z, L, backend="cuda")
    with pytest.raises(BackendError, match="^backend: expected"):
        ops.codes_to_latents(CODES, L, backend="cuda")
