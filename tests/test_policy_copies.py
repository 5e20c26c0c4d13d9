"""Copies of what a user holds: deep, shallow, pickled; independent, and going on where the original stands."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import needs_extension
from policy_cases import K, build, small, video
from small import small_data

from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.encoder import Encoder, NativeEncoder
from flexlam_fast.errors import DataError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.ops.block import BlockEngine
from flexlam_fast.policy import Policy
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.layers import pack, tensors_of
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.sequence.native import Native, NativeBlock
from flexlam_fast.sequence.packed import Packed
from flexlam_fast.translator import PackedTranslator, Translator
from flexlam_fast.types import Decision

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the cases are on the GPU")


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def by_torch(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_queue(thing: Any) -> Any:
    """As ``multiprocessing`` hands it to a spawned worker: tensors by shared memory."""
    return pickle.loads(ForkingPickler.dumps(thing))


WAYS: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, by_pickle, by_torch, by_queue]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def act(policy: Policy, frames: torch.Tensor) -> list[Decision]:
    return [policy.act(frame, 1 + t % K, temperature=0.7) for t, frame in enumerate(frames)]


def same(left: Any, right: Any) -> bool:
    """Equal values, through tuples and lists of tensors."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize(("backend", "before"), [("reference", 3), ("auto", 0), ("auto", 3)])
@every_way
def test_a_copy_goes_on_as_the_original_would(way: Callable[[Any], Any], backend: str, before: int) -> None:
    frames, untouched, policy = video(before + 4, 2), build(backend=backend), build(backend=backend)
    for one in (untouched, policy):
        one.reset(2, seed=3, capacity=3)
        act(one, frames[:before])
        one.imagine(Decision(one.previous, torch.zeros(2, K, dtype=torch.int32), K, torch.zeros(2)))  # draws noise
    twin = way(policy)
    expected = act(untouched, frames[before:])
    assert same(act(twin, frames[before:]), expected)
    twin.reset(1)  # whatever becomes of the copy, the original stands where it stood
    assert same(act(policy, frames[before:]), expected)
    again = way(policy)
    assert same(again.imagine(expected[-1]), policy.imagine(expected[-1]))
    assert again.open() == policy.open() == [2]
    policy.cache.verify()


@every_way
def test_weights_loaded_into_a_copy_reach_its_runner_and_not_the_original(way: Callable[[Any], Any]) -> None:
    frames, policy, other = video(3, 1), build(), build(seed=5)
    with torch.no_grad():
        for p in other.sequence.parameters():
            p.mul_(1.5)
    act(policy, frames)
    twin = way(policy)
    act(twin, frames)
    if way is copy.copy:  # which shares them
        twin = copy.deepcopy(twin)
    twin.load_state("other", other.state())
    for one in (policy, twin, other):
        one.reset()
    expected = act(other, frames)
    assert same(act(twin, frames), expected)
    assert not same([d.codes for d in act(policy, frames)], [d.codes for d in expected])
    assert same(policy.state()["sequence.head.weight"], build().state()["sequence.head.weight"])


def test_a_shallow_copy_holds_the_weights_once() -> None:
    policy = build()
    policy.warmup([1], warm=0, rounds=1)
    twin = copy.copy(policy)
    assert twin.sequence is policy.sequence
    assert twin.stages.runner.model is policy.sequence
    twin.latencies.clear()
    assert policy.latencies
    other = build(seed=5)
    policy.load_state("other", other.state())
    assert same(act(twin, video(3, 1)), act(other, video(3, 1)))


def test_packed_weights_are_pickled_once() -> None:
    policy = build()
    fresh = len(pickle.dumps(policy.sequence))
    policy.act(video(1, 1)[0], K)
    assert len(pickle.dumps(policy.sequence)) < 1.02 * fresh


@needs_extension
def test_weights_that_move_in_memory_are_found_again() -> None:
    frames, policy, other = video(6, 1), build(backend="native"), build(seed=5)
    act(policy, frames)
    policy.sequence.share_memory()  # what sending a module to another process does to the original
    policy.load_state("other", other.state())
    policy.reset()
    assert same(act(policy, frames), act(other, frames))


@needs_extension
@every_way
def test_what_holds_a_c_object_or_packed_weights_is_made_anew(way: Callable[[Any], Any]) -> None:
    policy = build(backend="native")
    model = policy.sequence
    policy.act(video(1, 1)[0], K)
    engine = BlockEngine(tensors_of(model, pack(model, [])), 1e4, 1e-6)
    assert same(way(engine).weights, engine.weights)
    for runner in (NativeBlock(model), Native(model), Packed(model), Fused(model, "native"), policy.stages.runner):
        twin = way(runner)
        assert type(twin) is type(runner)
        assert twin.layers == [] or isinstance(twin, Native)
        assert same(list(twin.model.state_dict().values()), list(model.state_dict().values()))
    encoder = NativeEncoder(Encoder(small()))
    pixels = torch.randn(1, 3, 16, 16)
    assert same(way(encoder)(pixels, -pixels), encoder(pixels, -pixels))


@every_way
def test_models_decisions_and_configurations(way: Callable[[Any], Any]) -> None:
    cfg = small()
    lam, model, translator = LatentActionModel(cfg), SequenceModel(cfg), Translator(cfg)
    codes = torch.randint(0, 16, (2, 3))
    model.generate(codes, 3)
    o_t, o_next = video(2, 2)
    assert same(way(lam).encode(o_t, o_next), lam.encode(o_t, o_next))
    assert same(way(model).generate(codes, 4), model.generate(codes, 4))
    latents, previous = torch.randn(2, K, cfg.bottleneck.dim), torch.zeros(2, cfg.translator.action_dim)
    assert same(way(translator)(latents, previous), translator(latents, previous))
    decision = build().act(o_t[:1], 2)
    assert same(way(decision), decision)
    assert way(cfg) == cfg


@every_way
def test_a_data_set_is_opened_again_and_not_copied(way: Callable[[Any], Any], tmp_path: Path) -> None:
    store = EpisodeStore.open(small_data(tmp_path / "data", 6))
    twin = way(store)
    every = np.arange(store.num_frames)
    assert np.array_equal(twin.take(every), store.take(every))
    assert np.array_equal(twin.actions, store.actions)
    twin.actions[:] = 0
    assert store.actions.min() == -1
    assert twin.episodes == store.episodes


def test_a_pickled_data_set_is_small_and_knows_when_another_took_its_place(tmp_path: Path) -> None:
    stored = pickle.dumps(EpisodeStore.open(small_data(tmp_path / "data", 12)))
    assert len(stored) < 1000
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    small_data(tmp_path / "data", 5)
    with pytest.raises(DataError, match="expected the data set that was pickled, got another"):
        pickle.loads(stored)


@every_way
@pytest.mark.parametrize("inside", [False, True])
def test_a_packed_translator_follows_its_weights_also_from_inference_mode(
    way: Callable[[Any], Any], inside: bool
) -> None:
    cfg = small()
    with torch.inference_mode(inside):
        translator = Translator(cfg)
        packed = PackedTranslator(translator, cfg.bottleneck.levels, K, "reference")
    codes, null = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(cfg.bottleneck.dim)
    previous = torch.zeros(1, cfg.translator.action_dim)

    def scores(of: PackedTranslator) -> torch.Tensor:
        of.refresh()
        return of.scores(codes, 2, null, previous).logits[0]

    before = scores(packed)
    twin = way(packed)
    assert torch.equal(scores(twin), before)
    with torch.inference_mode(inside), torch.set_grad_enabled(False):
        twin.translator.head.bias.add_(1.0)
    assert torch.allclose(scores(twin), before + 1, atol=1e-6)
    shared = way in (copy.copy, by_queue)  # as torch has it for a module that is given to another process
    assert torch.allclose(scores(packed), before + 1 if shared else before, atol=1e-6)


def test_a_policy_made_in_inference_mode_decides_and_loads_in_and_out_of_it() -> None:
    frames, policy = video(4, 1), build(backend="reference")
    with torch.inference_mode():
        made = build(backend="reference")
        made.stages = made.stages._replace(
            fused=PackedTranslator(made.translator, made.cfg.bottleneck.levels, K, "reference")
        )
        found = act(made, frames[:2])
    assert same([*found, *act(made, frames[2:])], [*act(policy, frames[:2]), *act(policy, frames[2:])])
    made.load_state("policy", policy.state())
    with torch.inference_mode():
        made.load_state("policy", policy.state())
        made.reset()
    policy.reset()
    assert not any(t.is_inference() for t in made.state().values())
    assert same(act(made, frames), act(policy, frames))
