"""Policy: whole decisions against the parts they are made of, sessions and budgets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from policy_cases import SIZE, K, build, play, video
from torch import Tensor

from flexlam_fast.backend import choose
from flexlam_fast.errors import InputError
from flexlam_fast.layers import normalise
from flexlam_fast.policy import Policy
from flexlam_fast.sequence.layout import OBSERVATION, history_layout
from flexlam_fast.translator import encode_actions, no_actions
from flexlam_fast.types import Actions, Decision


def decided_by_the_parts(policy: Policy, frames: Tensor, decisions: list[Decision]) -> list[tuple[Tensor, Actions]]:
    """Logits ``[k, C]`` and actions of one episode, from the dense mask over its whole history and no cache."""
    cfg, pixels = policy.cfg, normalise(frames)
    blocks = policy.lam.encode(frames[:-1], frames[1:])
    layout = history_layout(cfg, len(frames), 0, "all")
    parts = []
    for s in layout.segments:
        if s.kind == OBSERVATION:
            parts.append(policy.sequence.embed_frames(pixels[s.frame : s.frame + 1]))
        else:
            block = torch.zeros(K, dtype=torch.int32)
            if s.scratch:
                block[: decisions[s.frame].budget] = decisions[s.frame].codes[0]
            else:
                block = blocks[s.frame]
            parts.append(policy.sequence.embed_codes(block[None, : s.length], torch.arange(s.length)))
    hidden = policy.sequence(torch.cat(parts, dim=1), layout.positions, layout.mask)
    logits = policy.sequence.logits(hidden[0, layout.source])
    out, previous = [], no_actions(1, cfg.translator, torch.device("cpu"))
    for t, decision in enumerate(decisions):
        k = decision.budget
        latents = policy.lam.latents(decision.codes, k)
        previous = policy.translator.decide(latents, encode_actions(previous, cfg.translator))
        out.append((torch.stack([logits[(layout.frame == t) & (layout.slot == j)][0] for j in range(k)]), previous))
    return out


@torch.no_grad()
def test_every_decision_is_that_of_the_parts_without_a_cache() -> None:
    policy, steps = build(), 26
    frames = video(steps, 3)
    resets = {4: [1], 11: [2], 12: [1]}
    decisions = play(policy, frames, [1 + (5 * t) % K for t in range(steps)], resets)
    for session, start, stop in [(0, 0, 26), (1, 0, 4), (1, 4, 12), (1, 12, 26), (2, 0, 11), (2, 11, 26)]:
        own = [
            Decision(Actions(*(x[[session]] for x in d.actions)), d.codes[[session]], d.budget, d.frames[[session]])
            for d in decisions[start:stop]
        ]
        expected = decided_by_the_parts(policy, frames[start:stop, session], own)
        for t, (decision, (logits, actions)) in enumerate(zip(own, expected, strict=True)):
            assert decision.frames.tolist() == [t]
            best = logits.topk(2).values
            clear = best[:, 0] - best[:, 1] > 1e-3
            assert bool(clear.float().mean() > 0.5)
            assert torch.equal(logits.argmax(-1)[clear].int(), decision.codes[0][clear])
            assert torch.equal(decision.actions.discrete, actions.discrete)
    chosen = torch.cat([d.actions.discrete.flatten() for d in decisions])
    assert len(chosen.unique()) > 2, "actions should vary"


def test_a_session_decides_alone_as_it_does_in_a_batch() -> None:
    policy, frames = build(), video(15, 3)
    together = play(policy, frames, [K] * 15)
    for b in range(3):
        alone = play(policy, frames[:, b : b + 1], [K] * 15)
        for x, y in zip(together, alone, strict=True):
            assert torch.equal(x.codes[b], y.codes[0])
            assert torch.equal(x.actions.discrete[b], y.actions.discrete[0])


def test_a_smaller_budget_generates_a_prefix_and_leaves_no_trace() -> None:
    policy, frames = build(), video(12, 2)
    full = play(policy, frames, [K] * 12)
    for k in range(1, K):
        some = play(policy, frames, [k] * 12)
        for x, y in zip(full, some, strict=True):
            assert y.budget == k
            assert y.codes.shape == (2, k)
            assert torch.equal(x.codes[:, :k], y.codes)


@pytest.mark.parametrize("k", [1, 3, K - 1])
def test_slots_beyond_the_budget_change_no_bit_of_the_action(k: int) -> None:
    policy, frames = build(), video(6, 4)
    decisions = play(policy, frames, [k] * 6)
    previous = no_actions(4, policy.cfg.translator, policy.device)
    generator = torch.Generator().manual_seed(k)
    for decision in decisions:
        before = encode_actions(previous, policy.cfg.translator)
        exact = policy.translator(policy.lam.latents(decision.codes, k), before)
        for _ in range(5):
            tail = torch.randint(-(2**31), 2**31 - 1, (4, K - k), generator=generator).to(torch.int32)
            block = torch.cat([decision.codes, tail], dim=1)
            out = policy.translator(policy.lam.latents(block, k), before)
            assert torch.equal(out.logits[0], exact.logits[0])
            assert torch.equal(out.logits[0].argmax(-1), decision.actions.discrete[:, 0])
        previous = decision.actions


def test_the_previous_action_reaches_the_translator_until_a_reset() -> None:
    policy, frames = build(), video(5, 2)
    play(policy, frames, [2] * 5)
    assert int(policy.previous.discrete.min()) >= 0
    policy.reset(sessions=[1])
    assert int(policy.previous.discrete[0, 0]) >= 0
    assert policy.previous.discrete[1].tolist() == [-1]
    first = policy.act(frames[0], 2)
    assert first.frames.tolist() == [5, 0]
    again = play(policy, frames[:1], [2])[0]
    assert torch.equal(first.actions.discrete[1], again.actions.discrete[1])
    assert torch.equal(first.codes[1], again.codes[1])


def test_codes_drawn_at_a_temperature_repeat_from_the_seed() -> None:
    policy, frames = build(), video(6, 2)

    def run(seed: int, temperature: float | None) -> Tensor:
        policy.reset(2, seed=seed)
        return torch.stack([policy.act(frame, K, temperature=temperature).codes for frame in frames])

    greedy = run(0, None)
    assert torch.equal(run(1, 0.0), greedy), "greedy is the configuration's default and draws nothing"
    assert torch.equal(run(0, 1e-30), greedy), "the limit of a low temperature"
    warm = run(0, 1.0)
    assert torch.equal(run(0, 1.0), warm)
    assert not torch.equal(run(1, 1.0), warm)
    assert not torch.equal(warm, greedy)
    policy.cfg = dataclasses.replace(policy.cfg, sequence=dataclasses.replace(policy.cfg.sequence, temperature=1.0))
    assert torch.equal(run(0, None), warm)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"^temperature: expected a finite number of at least 0, got "):
            policy.act(frames[0], K, temperature=wrong)


def test_frames_may_be_numpy_strided_or_read_only(recwarn: pytest.WarningsRecorder) -> None:
    policy, frames = build(), video(3, 2)
    expected = play(policy, frames, [K] * 3)[-1]
    array = frames.numpy()
    fixed = array.copy()
    fixed.flags.writeable = False
    mirrored = array[:, :, :, ::-1].copy()[:, :, :, ::-1]
    for form in (array, fixed, mirrored, frames.transpose(2, 3).contiguous().transpose(2, 3)):
        policy.reset(2)
        for frame in form:
            decision = policy.act(frame, np.int64(K))  # type: ignore[arg-type]
        assert torch.equal(decision.codes, expected.codes)
    assert not recwarn.list


def test_a_decision_is_on_the_host_in_the_documented_types() -> None:
    decision = play(build(), video(2, 3), [4, 4])[-1]
    assert decision.codes.dtype == torch.int32
    assert decision.actions.discrete.shape == (3, 1)
    assert decision.actions.discrete.dtype == torch.int64
    assert decision.actions.continuous.shape == (3, 0)
    assert decision.frames.dtype == torch.int64
    assert decision.frames.tolist() == [1, 1, 1]


def test_a_decision_handed_out_and_the_policy_do_not_share_memory() -> None:
    policy, frames = build(), video(4, 2)
    decision = play(policy, frames, [4] * 4)[-1]
    kept = [x.clone() for x in (decision.actions.discrete, decision.codes, decision.frames)]
    policy.reset(sessions=[0, 1])
    for x, y in zip(kept, (decision.actions.discrete, decision.codes, decision.frames), strict=True):
        assert torch.equal(x, y)
    expected = play(policy, frames, [4] * 4)[-1]
    policy.reset(2)
    for frame in frames:
        again = policy.act(frame, 4)
        last = again.actions.discrete.clone(), again.codes.clone()
        again.actions.discrete.fill_(6)
        again.codes.fill_(999)
    assert torch.equal(last[0], expected.actions.discrete)
    assert torch.equal(last[1], expected.codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_acts_and_imagines(dtype: torch.dtype) -> None:
    policy, frames = build(dtype=dtype), video(10, 2)
    decisions = play(policy, frames, [1 + t % K for t in range(10)])
    assert all(int(d.codes.min()) >= 0 and int(d.codes.max()) < 1000 for d in decisions)
    assert policy.imagine(decisions[-1]).shape == (2, SIZE, SIZE, 3)


def test_imagination_repeats_from_its_seed() -> None:
    policy, frames = build(), video(2, 2)

    def imagine(seed: int) -> Tensor:
        policy.reset(2, seed=seed)
        return policy.imagine(policy.act(frames[0], K))

    first = imagine(0)
    assert first.dtype == torch.uint8
    assert first.shape == frames[0].shape
    assert torch.equal(imagine(0), first)
    assert not torch.equal(imagine(1), first)


def test_describe_names_the_parts_the_device_and_the_backend() -> None:
    text = build().describe()
    for word in ("lam", "sequence", "translator", "cpu", "float32", choose("auto", "cpu").name):
        assert word in text
    assert "\n" not in text
