"""Which checkpoint a path means: runs, stages, their best and last, policies, shipped names, and none of these."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_cases import build, play, small, video
from torch import nn

from flexlam_fast.checkpoint import load_checkpoint, save_checkpoint
from flexlam_fast.errors import CheckpointError, FlexLAMError, InputError, StorageError
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.policy import Policy
from flexlam_fast.run_folder import Found, find_in_run, find_stage
from flexlam_fast.sequence.model import SequenceModel
from flexlam_fast.train.codes import fingerprint
from flexlam_fast.train.export import export, frozen
from flexlam_fast.train.joint import JointModel
from flexlam_fast.translator import Translator


def put(path: Path, model: nn.Module, **notes: object) -> Path:
    """What a stage of training writes."""
    notes = {"stage": path.parent.name, "step": 1, "best": 0.5, **notes}
    moments = {"optimizer": {"w|exp_avg": torch.zeros(2)}} if path.name == "last" else {}
    return save_checkpoint(path, model.state_dict(), small().to_json(), moments, {"trainer.json": json.dumps(notes)})


def lam(seed: int) -> LatentActionModel:
    torch.manual_seed(seed)
    return LatentActionModel(small())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a LAM alone: seed 1 is the best, seed 2 the last."""
    put(tmp_path / "run/lam/best", lam(1))
    put(tmp_path / "run/lam/last", lam(2))
    (tmp_path / "run/lam/metrics.jsonl").write_text("{}\n")
    (tmp_path / "run/codes").mkdir()
    return tmp_path / "run"


def seed_of(found: Found) -> int:
    return next(s for s in range(9) if torch.equal(found.tensors["encoder.queries"], lam(s).encoder.queries))


def test_a_lam_is_found_from_every_folder_above_it(run: Path) -> None:
    for path, seed, said in (
        (run, 1, "/lam/best (of best and last)"),
        (run / "lam", 1, "/lam/best (of best and last)"),
        (run / "lam/best", 1, "/lam/best"),
        (run / "lam/last", 2, "/lam/last"),
    ):
        for name in (path, str(path), f"{path}/"):
            found = find_stage(name, "lam")
            assert seed_of(found) == seed
            assert str(found) == f"a latent action model from {run}{said}"
            assert found.notes["stage"] == "lam"
    shutil.rmtree(run / "lam/best")
    found = find_stage(run, "lam")
    assert (seed_of(found), found.choice) == (2, " (there is only last)")
    (run / "lam/last").rename(run / "lam/.last.previous")  # a kill between the two renames of a save
    assert seed_of(find_stage(run, "lam")) == seed_of(find_stage(run / "lam/last", "lam")) == 2


def test_joint_alignment_goes_before_what_it_started_from_and_stages_before_the_policy(run: Path) -> None:
    policy = build()
    policy.save_pretrained(run / "policy")
    assert seed_of(find_stage(run, "lam")) == 1
    put(run / "joint/last", JointModel(lam(3), Translator(small())))
    assert seed_of(find_stage(run, "lam")) == seed_of(find_stage(run / "joint", "lam")) == 3
    assert find_stage(run, "translator").path == run / "joint/last"
    assert seed_of(find_stage(run / "lam", "lam")) == 1
    shutil.rmtree(run / "lam")
    shutil.rmtree(run / "joint")
    found = find_stage(run, "lam")
    assert torch.equal(found.tensors["encoder.queries"], policy.lam.encoder.queries)
    assert found.choice == " (the finished policy)"
    with pytest.raises(CheckpointError, match="got a run without a checkpoint of stage lam"):
        find_in_run(run, "lam", finished=False)


@pytest.mark.parametrize("how", [str, Path])
def test_a_lam_alone_is_saved_and_loaded(tmp_path: Path, how: Callable[[Path], Any]) -> None:
    policy, frames = build(), video(2, 3)
    policy.lam.save_pretrained(how(tmp_path / "mine"), notes={"README.md": "walks"})
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = LatentActionModel.from_pretrained(how(tmp_path / "mine"))
    assert torch.equal(torch.get_rng_state(), before)
    assert again.cfg == policy.cfg
    assert torch.equal(again.encode(*frames), policy.lam.encode(*frames))
    latents = again.latents(again.encode(*frames), 2)
    decoded = [m.decode(frames[0], latents, generator=torch.Generator().manual_seed(0)) for m in (again, policy.lam)]
    assert torch.equal(*decoded)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert (tmp_path / "mine/README.md").read_text() == "walks"
    names = set(load_checkpoint(tmp_path / "mine").tensors)
    assert names == set(policy.lam.state_dict())
    again.train().requires_grad_(True)  # and may be trained on
    again.loss(
        *(torch.rand(2, 1, 3, 16, 16)), torch.tensor([2]), torch.zeros(1, 3, 16, 16), torch.rand(1)
    ).loss.backward()
    assert again.encoder.queries.grad is not None


def test_a_lam_in_other_dtypes_and_from_a_policy(tmp_path: Path) -> None:
    policy = build()
    policy.save_pretrained(tmp_path / "policy")
    policy.lam.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert load_checkpoint(tmp_path / "half").tensors["bottleneck.null"].dtype == torch.float16
    narrow = LatentActionModel.from_pretrained(tmp_path / "half", dtype=torch.bfloat16, device="auto")
    assert narrow.encoder.queries.dtype == narrow.decoder.slot.dtype == torch.bfloat16
    assert narrow.bottleneck.null.dtype == torch.float32
    assert narrow.encode(*video(2, 1).to(narrow.encoder.queries.device)).shape == (1, 6)
    from_policy = LatentActionModel.from_pretrained(tmp_path / "policy", backend="reference")
    assert torch.equal(from_policy.encoder.queries, policy.lam.encoder.queries)
    shipped = LatentActionModel.from_pretrained("vizdoom-tiny")
    assert shipped.cfg == Policy.from_pretrained("vizdoom-tiny").cfg


def test_a_finished_run_is_a_policy(run: Path) -> None:
    policy, frames = build(), video(4, 1)
    policy.save_pretrained(run / "policy")
    expected = play(policy, frames, [1, 2, 3, 4])
    found = play(Policy.from_pretrained(run), frames, [1, 2, 3, 4])
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(expected, found, strict=True))


def test_a_run_without_a_policy_says_which_stage_is_missing(run: Path) -> None:
    def says() -> str:
        with pytest.raises(CheckpointError) as caught:
            Policy.from_pretrained(run)
        return str(caught.value)

    def missing(stage: str) -> str:
        command = f"flexlam-fast train {stage} --data DATA --output {run}"
        return f"{run}: expected a policy, got a run without a checkpoint of stage {stage}; {command} makes it"

    assert says() == missing("translator")
    source = fingerprint(frozen(find_stage(run, "lam")))
    put(run / "translator/best", Translator(small()), lam=source)
    assert says() == missing("sequence")
    put(run / "sequence/last", SequenceModel(small()), lam=source)
    assert (
        says()
        == f"{run}: expected a policy, got a run of stages apart; flexlam-fast train policy --output {run} joins them"
    )
    shutil.rmtree(run / "lam")
    assert says() == missing("lam")
    put(run / "joint/best", JointModel(lam(3), Translator(small())))
    assert "stages apart" in says()


def test_export_takes_the_same_checkpoints_and_refuses_those_of_another_lam(run: Path) -> None:
    source = fingerprint(frozen(find_stage(run, "lam")))
    head, model = Translator(small()), SequenceModel(small())
    put(run / "translator/best", head, lam=source)
    put(run / "translator/last", Translator(small()), lam=source)
    put(run / "sequence/last", model, lam=source)
    made = export(run, torch.float32)
    assert torch.equal(made.lam.encoder.queries, lam(1).encoder.queries)
    assert torch.equal(made.translator.stem.weight, head.stem.weight)
    assert torch.equal(made.sequence.head.weight, model.head.weight)
    put(run / "lam/best", lam(4))
    with pytest.raises(CheckpointError, match=r"translator/best: expected stage translator trained with .*/lam/best"):
        export(run)
    put(run / "joint/best", JointModel(lam(3), Translator(small())))
    with pytest.raises(CheckpointError, match=r"sequence/last: expected stage sequence trained with .*/joint/best"):
        export(run)


def wrong(folder: Path) -> dict[str, tuple[Path | str, str]]:
    """What is no latent action model, by a name for the test: the path, and a part of the sentence."""
    cfg, (foreign, empty, begun, weights) = small(), (folder / n for n in ("other", "empty", "begun/lam", "hf"))
    put(folder / "sequence/best", SequenceModel(cfg))
    put(folder / "translator/last", Translator(cfg))
    save_checkpoint(folder / "nothing", {"w": torch.zeros(1)}, cfg.to_json())
    save_checkpoint(folder / "text", {}, "no config")
    other = dataclasses.replace(cfg, frame=32)
    save_checkpoint(folder / "sizes", lam(0).state_dict(), other.to_json())
    save_checkpoint(
        folder / "nan", {**lam(0).state_dict(), "bottleneck.null": torch.full((4,), torch.nan)}, cfg.to_json()
    )
    save_checkpoint(folder / "notes", lam(0).state_dict(), cfg.to_json(), extra_text={"trainer.json": "[]"})
    put(folder / "bit/lam/best", lam(0))
    put(folder / "bit/lam/last", lam(0))
    damaged = folder / "bit/lam/best/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\7")
    put(folder / "gone/best", lam(0))
    (folder / "gone/best/manifest.json").unlink()
    for path in (foreign, empty, begun, weights):
        path.mkdir(parents=True)
    (foreign / "holiday.mp4").write_bytes(b"film")
    (begun / "metrics.jsonl").write_text("")
    (weights / "config.json").write_text("{}")
    command = f"flexlam-fast train lam --data DATA --output {folder}"
    return {
        "sequence stage": (folder / "sequence", "sequence/best: expected a latent action model, got a sequence model"),
        "sequence": (folder / "sequence/best", "sequence/best: expected a latent action model, got a sequence model"),
        "translator": (folder / "translator", "translator/last: expected a latent action model, got a translator"),
        "run": (folder, f"expected a latent action model, got a run without a checkpoint of stage lam; {command}"),
        "stage not there": (folder / "lam", f"got a run without a checkpoint of stage lam; {command} makes it"),
        "stage just begun": (begun, f"got a run without a checkpoint of stage lam; {command}/begun makes it"),
        "foreign tensors": (folder / "nothing", "expected a latent action model, got another model's weights"),
        "foreign config": (folder / "text", "text: expected a latent action model, got another model's weights"),
        "another config": (
            folder / "sizes",
            "model.safetensors: encoder.position: expected [64,32] float32, got [16,32]",
        ),
        "nan": (folder / "nan", "bottleneck.null: expected finite floating numbers, got others"),
        "notes": (folder / "notes", "trainer.json: expected what a training was given, got other text"),
        "damaged": (folder / "bit", "bit/lam/best/model.safetensors: expected sha256"),
        "no manifest": (folder / "gone", "gone/best/manifest.json: expected the manifest"),
        "foreign": (foreign, "other: expected the folder of a checkpoint, a stage or a run, got other files"),
        "empty": (empty, "empty: expected the folder of a checkpoint, a stage or a run, got an empty folder"),
        "weights": (weights, "hf: expected the folder of a checkpoint, a stage or a run, got other files"),
        "file": (foreign / "holiday.mp4", "holiday.mp4: expected a checkpoint directory, got a file"),
        "nowhere": (folder / "nowhere", "nowhere: expected a directory or one of ['vizdoom-tiny'], got neither"),
        "long": ("x" * 5000, "expected to read a checkpoint, got: File name too long"),
        "nul": ("a\0b", "expected"),
    }


def test_what_is_no_lam_gets_one_sentence_that_names_it(tmp_path: Path) -> None:
    for name, (path, sentence) in wrong(tmp_path).items():
        with pytest.raises(CheckpointError) as caught:
            LatentActionModel.from_pretrained(path)
        assert sentence in str(caught.value), name
        assert "\n" not in str(caught.value)
        assert str(path)[:100] in str(caught.value) or name in ("stage not there", "stage just begun")


def test_a_policy_is_not_found_where_a_lam_is(run: Path) -> None:
    for path in (run / "lam", run / "lam/last"):
        with pytest.raises(CheckpointError, match="expected a policy, got a latent action model"):
            Policy.from_pretrained(path)


@pytest.mark.parametrize("kind", [Policy, LatentActionModel])
@pytest.mark.parametrize(
    ("name", "options", "error", "sentence"),
    [
        (None, {}, InputError, "checkpoint: expected a path or a name, got NoneType None"),
        (5, {}, InputError, "checkpoint: expected a path or a name, got int 5"),
        (b"vizdoom-tiny", {}, InputError, "checkpoint: expected a path or a name, got bytes"),
        ("vizdoom-tiny", {"device": "warp"}, InputError, "device: expected one that this machine has, got 'warp'"),
        (
            "vizdoom-tiny",
            {"dtype": torch.int8},
            InputError,
            "dtype: expected float32, bfloat16, float16, got torch.int8",
        ),
        ("vizdoom-tiny", {"dtype": "float32"}, InputError, "dtype: expected float32, bfloat16, float16, got 'float32'"),
        ("vizdoom-tiny", {"backend": "fast"}, FlexLAMError, "backend: expected one of"),
    ],
)
def test_options_that_cannot_be_get_one_sentence(
    kind: Any, name: Any, options: dict[str, Any], error: type[FlexLAMError], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        kind.from_pretrained(name, **options)
    assert str(caught.value).startswith(sentence)


def test_a_lam_is_not_saved_where_it_would_replace_something_else(run: Path) -> None:
    with pytest.raises(StorageError, match="expected a checkpoint to replace, got other files"):
        lam(0).save_pretrained(run)
    with pytest.raises(InputError, match="dtype: expected float32, bfloat16, float16, got torch.int8"):
        lam(0).save_pretrained(run / "lam/best", dtype=torch.int8)
    assert seed_of(find_stage(run, "lam")) == 1
