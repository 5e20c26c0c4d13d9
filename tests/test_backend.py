"""Backends: auto takes what works, a name works or raises."""

from __future__ import annotations

import pytest

from flexlam_fast.backend import NAMES, choose, probe
from flexlam_fast.errors import BackendError


def test_probe_names_every_backend_once_with_a_reason() -> None:
    statuses = probe()
    assert sorted(["auto", *(status.name for status in statuses)]) == sorted(NAMES)
    for status in statuses:
        assert len(status.reason) > 10
        assert "\n" not in status.reason


def test_auto_takes_the_reference_and_says_why_not_the_others() -> None:
    choice = choose("auto", "cpu")
    assert choice.name == "reference"
    for status in probe():
        assert status.available or status.reason in choice.reason


def test_a_backend_asked_for_by_name_works_or_raises() -> None:
    for status in probe():
        if status.available:
            assert choose(status.name, "cpu").name == status.name
        else:
            with pytest.raises(BackendError, match=status.reason):
                choose(status.name, "cpu")
    with pytest.raises(BackendError, match="expected one of auto, reference, triton, native, got 'cudnn'"):
        choose("cudnn", "cpu")
