"""``flexlam-fast probe``: what it says of codes that hold the action, and of three kinds that are made to fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import small_config, small_data
from torch import Tensor

from flexlam_fast.data.store import EpisodeStore, EpisodeWriter
from flexlam_fast.errors import DataError, FlexLAMError
from flexlam_fast.evaluate import action_probe, fitting, picture_probe, probe
from flexlam_fast.evaluate.action_probe import LabelCount, opposites
from flexlam_fast.evaluate.fitting import Recipe
from flexlam_fast.evaluate.summary import Score
from flexlam_fast.lam import LatentActionModel

pytest.importorskip("torchmetrics")
NAMES, STEP = ("STAY", "TURN_LEFT", "TURN_RIGHT"), 4
CFG = dataclasses.replace(
    small_config(), bottleneck=dataclasses.replace(small_config().bottleneck, levels=(5, 5, 5), slots=16)
)
#: What a turn does to the picture.
ROLLS = (0, STEP, -STEP)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    """Pictures of 4 x 4 blocks in five shades a channel, which turn under the viewer."""
    path, rng = tmp_path_factory.mktemp("world") / "data", np.random.default_rng(0)
    with EpisodeWriter(path, (16, 16, 3), NAMES) as writer:
        for i in range(40):
            frame = np.kron(rng.integers(0, 5, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8) * 63
            actions, frames = rng.integers(0, 3, 12), [frame]
            for action in actions:
                frames.append(np.roll(frames[-1], ROLLS[action], axis=1))
            writer.add(np.stack(frames), actions, np.zeros(12), "turn", "test" if i % 4 == 3 else "train", seed=i)
    return EpisodeStore.open(path)


class Made(LatentActionModel):
    """Codes and pictures that are computed and not learned: slot 0 says which roll leads to the next frame."""

    def __init__(self) -> None:
        super().__init__(CFG, "reference")
        self.eval()

    def encode(self, o_t: Tensor, o_next: Tensor) -> Tensor:
        codes = torch.zeros(len(o_t), 16, dtype=torch.int32)
        errors = [(o_t.roll(roll, 2).float() - o_next.float()).abs().mean((1, 2, 3)) for roll in ROLLS]
        codes[:, 0] = torch.stack(errors).argmin(0).to(torch.int32)
        return codes

    def decode(self, o_t: Tensor, latents: Tensor, steps: object = None, generator: object = None) -> Tensor:
        known = self.latents(torch.arange(3, dtype=torch.int32).unsqueeze(1).expand(3, 16), 1)[:, 0]
        said = (latents[:, :1] - known).abs().sum(2)
        rolls = [ROLLS[int(i)] if float(d) < 1e-6 else 0 for d, i in zip(*said.min(1), strict=True)]
        return torch.stack([frame.roll(roll, 1) for frame, roll in zip(o_t, rolls, strict=True)])


class Collapsed(Made):
    def encode(self, o_t: Tensor, o_next: Tensor) -> Tensor:
        return torch.full((len(o_t), 16), 7, dtype=torch.int32)


class Ignored(Made):
    def decode(self, o_t: Tensor, latents: Tensor, steps: object = None, generator: object = None) -> Tensor:
        return o_t


class Leaking(Made):
    """The codes are the next picture, a block a slot."""

    def encode(self, o_t: Tensor, o_next: Tensor) -> Tensor:
        blocks = o_next[:, ::4, ::4].reshape(len(o_t), 16, 3).int() // 63
        return blocks @ torch.tensor([1, 5, 25], dtype=torch.int32)

    def decode(self, o_t: Tensor, latents: Tensor, steps: object = None, generator: object = None) -> Tensor:
        blocks = ((latents * 2).round().clamp(-2, 2) + 2) * 63
        blank = torch.all(latents == self.bottleneck.null, dim=2)
        picture = torch.where(blank.unsqueeze(2), 126.0, blocks).reshape(-1, 4, 4, 3).to(torch.uint8)
        return picture.repeat_interleave(4, 1).repeat_interleave(4, 2)


@pytest.fixture(scope="module")
def quick() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(action_probe, "FRAMES_RECIPE", Recipe(steps=300, batch=64, rate=2e-3))
        patch.setattr(action_probe, "Recipe", lambda: Recipe(steps=200))
        yield


def asked(model: type[Made], world: EpisodeStore) -> probe.Probe:
    return probe.probe_lam(model(), world, (1, 4), labels=(60, 10_000), transitions=40, seeds=2)


def test_codes_that_hold_the_action_carry_all_of_it_and_the_decoder_obeys(world: EpisodeStore, quick: object) -> None:
    found = asked(Made, world)
    assert found.faults() == []
    assert found.actions is not None
    few, many = found.actions.counts
    assert (few.labels, many.labels) == (60, 360)
    for k in (1, 4, 16):
        assert many.codes[k].mean == 1.0
    assert many.previous.mean < 0.5 > many.commonest.mean
    assert many.tasks == {"turn": many.codes[16]}
    assert found.actions.reversal is not None
    assert found.actions.reversal.share.mean == 1.0
    assert "odes carry 1" in found.verdict()
    pictures = found.pictures
    assert pictures.quality["k=16"].psnr.mean == 60.0  # the ceiling: every frame is exact
    assert pictures.quality["k=0"].psnr == pictures.quality["copy o_t"].psnr
    assert pictures.quality["swapped codes"].psnr.mean < pictures.quality["k=16"].psnr.mean
    assert pictures.leaked is not None
    assert abs(pictures.leaked.mean) < 0.3
    assert found.usage.bits[0] == pytest.approx(np.log2(3), abs=0.1)
    assert found.usage.bits[1:] == (0.0,) * 15


def test_a_collapsed_lam_is_found(world: EpisodeStore, quick: object) -> None:
    found = asked(Collapsed, world)
    (fault,) = found.faults()
    assert fault == "collapsed: no slot has more than 0.00 of 7.0 bits"
    assert found.verdict().startswith("collapsed: ")
    assert found.actions is not None
    carried = found.actions.counts[-1].carried()
    assert carried is not None
    assert abs(carried) < 0.3


def test_a_decoder_that_ignores_its_codes_is_found(world: EpisodeStore, quick: object) -> None:
    found = asked(Ignored, world)
    (fault,) = found.faults()
    assert fault == "ignored: a transition's own codes decode 0.00 dB better than another's"
    assert found.pictures.gain() == 0.0


def test_codes_that_hold_the_next_picture_are_found(world: EpisodeStore, quick: object) -> None:
    found = asked(Leaking, world)
    (fault,) = found.faults()
    assert fault == "leaking: at a cut to another episode the codes take away 100% of the error"
    assert found.pictures.gain(moving=True) > 20


def test_data_without_actions_is_asked_for_pictures_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with EpisodeWriter(tmp_path / "data", (16, 16, 3), ()) as writer:
        for i in range(4):
            frames = rng.integers(0, 255, (8, 16, 16, 3)).astype(np.uint8)
            writer.add(frames, None, None, "film", "test" if i == 3 else "train", seed=i)
    found = probe.probe_lam(Made(), EpisodeStore.open(tmp_path / "data"), transitions=6)
    assert found.actions is None
    assert found.pictures.leaked is None, "one test episode knows no other"
    assert "this data has no actions" in found.verdict()
    assert "actions" not in found.json()


def test_the_command_writes_what_it_prints(tmp_path: Path, quick: object) -> None:
    small_data(tmp_path / "data")
    LatentActionModel(small_config(), "reference").save_pretrained(tmp_path / "lam")
    found = probe.probe(
        tmp_path / "lam",
        tmp_path / "data",
        labels=(20,),
        transitions=8,
        seeds=2,
        output=tmp_path / "out",
        progress=False,
    )
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert written == json.loads(json.dumps(found.json()))
    assert written["actions"][0]["labels"] == 20
    assert list(written["actions"][0]["codes"]) == ["1", "2", "4"]
    text = (tmp_path / "out" / "probe.md").read_text()
    assert text == found.markdown()
    assert text.startswith(f"**{written['verdict']}**")
    again = probe.probe_lam(
        LatentActionModel.from_pretrained(tmp_path / "lam"), EpisodeStore.open(tmp_path / "data"), labels=(20,),
        transitions=8, seeds=2,
    )  # fmt: skip
    assert again == found, "the same seeds, the same figures"


def test_actions_are_undone_by_those_their_names_say() -> None:
    names = ("NOOP", "TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD", "MOVE_BACKWARD", "ATTACK", "MOVE_LEFT")
    assert opposites(names) == {1: 2, 2: 1, 3: 4, 4: 3}


def test_a_network_is_left_at_its_best_moment_on_labels_it_did_not_learn_from() -> None:
    """Labels that are noise: the best moment is an early one, and all later ones know the training rows by heart."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 8), torch.randint(3, (60,))
    net = fitting.small_mlp(8, 3)
    fitting.fit(net, lambda rows: x[rows], y, Recipe(steps=400, decay=0.0), 0, torch.device("cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learned = torch.randperm(60)[12:]
    said = fitting.scores(net, lambda rows: x[rows], learned, torch.device("cpu")).argmax(1)
    assert float((said == y[learned]).float().mean()) < 0.8
    assert not net.training


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(labels=()), "labels: expected at least one number, got none"),
        (dict(labels=(5,)), "labels: expected an integer in 10"),
        (dict(seeds=1), "seeds: expected an integer in 2"),
        (dict(transitions=3), "transitions: expected an integer in 4"),
        (dict(budgets=(9,)), "budgets: expected an integer in 0..4, got 9"),
    ],
)
def test_one_sentence_says_what_is_wrong(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    small_data(tmp_path / "data")
    LatentActionModel(small_config(), "reference").save_pretrained(tmp_path / "lam")
    with pytest.raises(FlexLAMError, match=f"^{sentence}"):
        probe.probe(tmp_path / "lam", tmp_path / "data", output=None, progress=False, **change)  # type: ignore[arg-type]


def test_frames_of_another_size_are_refused(world: EpisodeStore) -> None:
    with pytest.raises(DataError, match=r"expected frames \[64, 64, 3\]"):
        probe.probe_lam(LatentActionModel(dataclasses.replace(CFG, frame=64), "reference"), world)


def test_a_share_of_errors_is_of_all_pairs_together_and_no_pair_outweighs_them() -> None:
    without, with_codes = torch.tensor([100.0] * 19 + [0.0]), torch.tensor([0.0] * 19 + [100.0])
    share = picture_probe._share(without, with_codes)
    assert share.mean == pytest.approx(1 - 100 / 1900)
    assert 0 < share.ci95 < 0.3


def test_frames_that_say_nothing_are_no_measure() -> None:
    def same(value: float) -> Score:
        return Score(value, 0.0, (value, value))

    count = LabelCount(16, False, same(0.38), same(0.4), same(0.38), {4: same(0.4)}, same(0.4), {})
    assert count.carried() is None
    assert "the frames themselves say no more" in probe._known(count)
    assert count._replace(frames=same(0.48)).carried() == pytest.approx(0.2)


def test_a_single_row_is_read_as_a_batch_of_one(world: EpisodeStore) -> None:
    assert action_probe._both(np.array([5])).tolist() == [[5, 6]]
    frames = world.take(action_probe._both(np.arange(3)[torch.tensor([1]).numpy()]))
    assert frames.shape == (1, 2, 16, 16, 3)
