"""Configurations: the presets' sizes, JSON there and back, and one sentence for what no model can be built from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlam_fast.config import (
    BottleneckConfig,
    DecoderConfig,
    EncoderConfig,
    FlexLAMConfig,
    SequenceConfig,
    TranslatorConfig,
)
from flexlam_fast.errors import ConfigError, FlexLAMError, StorageError


def test_dmlab_has_the_sizes_of_the_design() -> None:
    cfg = FlexLAMConfig.preset("dmlab")
    assert (cfg.frame, cfg.channels) == (64, 3)
    assert (cfg.bottleneck.levels, cfg.bottleneck.slots) == ((8, 5, 5, 5), 64)
    assert (cfg.bottleneck.codebook_size, cfg.bottleneck.dim, cfg.bottleneck.prefix) == (1000, 4, "uniform")
    assert cfg.encoder == EncoderConfig(depth=8, width=192, heads=3, mlp_ratio=4, patch=8, tubelet=2)
    assert cfg.decoder == DecoderConfig(depth=12, heads=3, head_dim=64, ffn=776, patch=4, steps=28)
    assert cfg.decoder.width == 192
    expected = SequenceConfig(
        hidden=256,
        intermediate=1024,
        layers=12,
        heads=4,
        kv_heads=4,
        head_dim=64,
        rope_theta=1e4,
        patch=8,
        window=34,
        stride=8,
    )
    assert cfg.sequence == expected
    assert (cfg.translator.depth, cfg.translator.hidden, cfg.translator.wide) == (5, 96, 512)
    assert (cfg.tokens_per_frame, cfg.page) == (64, 64)


def test_real_levels_have_the_papers_codebook() -> None:
    cfg = BottleneckConfig(levels=(7, 5, 5, 5, 5), slots=80)
    assert (cfg.codebook_size, cfg.dim) == (4375, 5)


def test_tiny_is_a_valid_small_model_with_named_actions() -> None:
    cfg = FlexLAMConfig.preset("tiny")
    assert cfg.bottleneck.slots == 16
    assert cfg.page == 16
    assert len(cfg.translator.names) == cfg.translator.discrete[0] == cfg.translator.action_dim


@pytest.mark.parametrize(("slots", "page"), [(64, 64), (16, 16), (80, 16), (24, 8), (7, 1), (1, 1)])
def test_a_page_is_the_greatest_common_divisor(slots: int, page: int) -> None:
    assert dataclasses.replace(FlexLAMConfig(), bottleneck=BottleneckConfig(slots=slots)).page == page


@pytest.mark.parametrize(
    ("slots", "ladder"),
    [(16, (1, 2, 4, 8, 16)), (64, (1, 2, 4, 8, 16, 32, 64)), (6, (1, 2, 4, 6)), (1, (1,)), (2, (1, 2))],
)
def test_the_ladder_doubles_up_to_the_slots(slots: int, ladder: tuple[int, ...]) -> None:
    assert BottleneckConfig(slots=slots).ladder == ladder


def test_configurations_are_frozen_and_compare_by_value() -> None:
    cfg = FlexLAMConfig.preset("tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.frame = 32  # type: ignore[misc]
    assert cfg == FlexLAMConfig.preset("tiny")
    assert cfg != FlexLAMConfig.preset("dmlab")
    assert len({cfg, FlexLAMConfig.preset("tiny")}) == 1


ODD = dataclasses.replace(
    FlexLAMConfig.preset("tiny"),
    bottleneck=BottleneckConfig(levels=(4, 3), slots=3, prefix=(0.0, 1.0, 0.5, 2.0)),
    translator=TranslatorConfig(discrete=(), continuous=7),
)


@pytest.mark.parametrize(
    "cfg", [FlexLAMConfig.preset("dmlab"), FlexLAMConfig.preset("tiny"), ODD], ids=["dmlab", "tiny", "odd"]
)
def test_json_gives_back_the_same_configuration(cfg: FlexLAMConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    text = cfg.to_json(file)
    assert file.read_text() == text
    for source in (text, file, str(file)):
        again = FlexLAMConfig.from_json(source)
        assert again == cfg
        assert hash(again) == hash(cfg), "lists became tuples"


WRONG_PARTS: list[tuple[type, dict[str, Any], str]] = [
    (BottleneckConfig, dict(levels=(8, 1)), "levels: expected"),
    (BottleneckConfig, dict(levels=()), "levels: expected"),
    (BottleneckConfig, dict(levels=(3,) * 9), "levels: expected"),
    (BottleneckConfig, dict(levels=(2**16, 2**15)), "levels: expected a codebook below"),
    (BottleneckConfig, dict(slots=0), r"BottleneckConfig.slots: expected an integer in 1\.\.1000000, got 0"),
    (BottleneckConfig, dict(slots=True), "BottleneckConfig.slots: expected"),
    (BottleneckConfig, dict(prefix="half"), "prefix: expected one of .* got 'half'"),
    (BottleneckConfig, dict(slots=2, prefix=(1.0, 1.0)), "prefix: expected 3 non-negative weights"),
    (BottleneckConfig, dict(slots=1, prefix=(-1.0, 2.0)), r"prefix: expected a number in 0\.\.1e\+30, got -1.0"),
    (BottleneckConfig, dict(slots=1, prefix=(0.0, 0.0)), "prefix: expected 2 non-negative weights"),
    (BottleneckConfig, dict(slots=1, prefix=(0.0, float("nan"))), r"prefix: expected a number in 0\.\.1e\+30, got nan"),
    (BottleneckConfig, dict(slots=1, prefix=7), "prefix: expected 2 non-negative weights, not all 0, got 7"),
    (BottleneckConfig, dict(slots=1, prefix=(0.0, "1")), r"prefix: expected a number in 0\.\.1e\+30, got '1'"),
    (BottleneckConfig, dict(levels=8), r"levels: expected integers in 2\.\.2147483647, got 8"),
    (BottleneckConfig, dict(levels=(8, True)), r"levels: expected an integer in 2\.\.2147483647, got True"),
    (BottleneckConfig, dict(slots=10**30), "BottleneckConfig.slots: expected an integer in"),
    (BottleneckConfig, dict(spread=-0.1), r"BottleneckConfig.spread: expected a number in 0\.\.1e\+06, got -0.1"),
    (BottleneckConfig, dict(spread="wide"), r"BottleneckConfig.spread: expected a number in 0\.\.1e\+06, got 'wide'"),
    (DecoderConfig, dict(tau_mean=float("nan")), r"DecoderConfig.tau_mean: expected a number in -100\.\.100, got nan"),
    (EncoderConfig, dict(width=100, heads=3), "encoder: width 100 is no multiple of heads 3"),
    (EncoderConfig, dict(tubelet=4), "encoder: expected tubelet 2"),
    (EncoderConfig, dict(depth=1.5), r"EncoderConfig.depth: expected an integer in 1\.\.1000, got 1.5"),
    (DecoderConfig, dict(steps=0), "DecoderConfig.steps: expected an integer in"),
    (DecoderConfig, dict(predict="noise"), "decoder: expected predict in"),
    (SequenceConfig, dict(heads=4, kv_heads=3), "sequence: heads 4 is no multiple of kv_heads 3"),
    (SequenceConfig, dict(head_dim=7), "sequence: expected an even head_dim, got 7"),
    (SequenceConfig, dict(window=1), r"SequenceConfig.window: expected an integer in 2\.\.1000000, got 1"),
    (SequenceConfig, dict(stride=0), "SequenceConfig.stride: expected an integer in"),
    (SequenceConfig, dict(decisions="some"), "sequence: expected decisions in"),
    (
        SequenceConfig,
        dict(rope_theta=0.0),
        "SequenceConfig.rope_theta: expected a number above 0, at most .*, got 0.0",
    ),
    (SequenceConfig, dict(rms_eps="1e-6"), "SequenceConfig.rms_eps: expected a number above 0, at most 1, got '1e-6'"),
    (SequenceConfig, dict(temperature=-1.0), r"SequenceConfig.temperature: expected a number in 0\.\.1e\+06, got -1.0"),
    (
        SequenceConfig,
        dict(temperature=float("nan")),
        "SequenceConfig.temperature: expected a number in .*, got nan",
    ),
    (SequenceConfig, dict(places=1), "sequence.places: expected true or false, got 1"),
    (TranslatorConfig, dict(discrete=(1,)), r"translator.discrete: expected an integer in 2\.\.1000000, got 1"),
    (TranslatorConfig, dict(discrete=(2,), names=("a", "a")), "translator: expected names that are texts, each once"),
    (TranslatorConfig, dict(discrete=(2,), names="ab"), "translator: expected names that are texts, each once"),
    (TranslatorConfig, dict(discrete=(), continuous=0), "translator: expected at least one action dimension"),
    (
        TranslatorConfig,
        dict(continuous=-1),
        "TranslatorConfig.continuous: expected an integer in .*, got -1",
    ),
    (
        TranslatorConfig,
        dict(continuous=1.5),
        "TranslatorConfig.continuous: expected an integer in .*, got 1.5",
    ),
    (TranslatorConfig, dict(discrete=(3,), names=("a", "b")), "translator: expected one name per choice, got 2 names"),
    (FlexLAMConfig, dict(frame=60), "encoder: frame size 60 is no multiple of patch 8"),
    (FlexLAMConfig, dict(channels=-3), "FlexLAMConfig.channels: expected an integer in"),
    (FlexLAMConfig, dict(encoder=None), "config.encoder: expected .*EncoderConfig.*, got None"),
]


@pytest.mark.parametrize(("kind", "fields", "sentence"), WRONG_PARTS, ids=[s for _, _, s in WRONG_PARTS])
def test_impossible_values_are_refused_in_one_sentence(kind: type, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}") as caught:
        kind(**fields)
    assert "\n" not in str(caught.value)


WRONG_TEXTS = [
    ("{", "config: expected JSON"),
    ('{"frame": 64', "config: expected JSON"),
    ('{"colour": 3}', "config: expected fields .* got \\['colour'\\]"),
    ('{"bottleneck": {"levles": [8]}}', "config.bottleneck: expected fields .* got \\['levles'\\]"),
    ('{"bottleneck": 8}', "config.bottleneck: expected an object, got 8"),
    ('{"bottleneck": {"levels": 8}}', "levels: expected integers in"),
    ('{"bottleneck": {"levels": [8.5, 5]}}', "levels: expected"),
    ('{"bottleneck": {"prefix": {"0": 1}}}', "config.bottleneck: |prefix: "),
    ('{"frame": "64"}', r"FlexLAMConfig.frame: expected an integer in 1\.\.1000000, got '64'"),
    ('{"translator": {"discrete": 5}}', "translator.discrete: expected integers in"),
    ('{"frame": 64, "frame": 32}', r"config: expected every field once, got \['frame', 'frame'\]"),
    ('{"decoder": {"tau_mean": NaN}}', "DecoderConfig.tau_mean: expected a number in"),
    ('{"decoder": {"tau_mean": 1e999}}', "DecoderConfig.tau_mean: expected a number in"),
    ('{"frame": 1000000000000000000000000000000}', "FlexLAMConfig.frame: expected an integer in"),
    ('{"sequence": null}', "config.sequence: expected an object, got None"),
    ("no-such-file.json", "config: expected JSON or a file of it"),
    ("[1, 2]", "config: expected"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG_TEXTS, ids=[t for t, _ in WRONG_TEXTS])
def test_foreign_json_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^({sentence})"):
        FlexLAMConfig.from_json(text)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="^config: expected JSON"):
        FlexLAMConfig.from_json(file)
    with pytest.raises(ConfigError, match="^config: expected JSON or a file of it"):
        FlexLAMConfig.from_json(tmp_path)


def test_numbers_of_numpys_become_pythons_and_lists_tuples(tmp_path: Path) -> None:
    cfg = BottleneckConfig(levels=[np.int32(8), 5], slots=np.int64(4), spread=np.float32(0.5))  # type: ignore[arg-type]
    assert cfg == BottleneckConfig(levels=(8, 5), slots=4, spread=0.5)
    assert hash(cfg) == hash(BottleneckConfig(levels=(8, 5), slots=4, spread=0.5))
    whole = dataclasses.replace(FlexLAMConfig(), bottleneck=cfg)
    assert FlexLAMConfig.from_json(whole.to_json()) == whole
    with pytest.raises(StorageError, match="expected to write it, got: "):
        whole.to_json(tmp_path)


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"^preset: expected one of dmlab, tiny.*, got 'huge'$"):
        FlexLAMConfig.preset("huge")
    with pytest.raises(ConfigError, match=r"^preset: expected one of .*, got \['tiny'\]$"):
        FlexLAMConfig.preset(["tiny"])  # type: ignore[arg-type]


JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(-2, 9), max_size=3)
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_value_gives_a_configuration_or_one_sentence(data: st.DataObject) -> None:
    tree = json.loads(FlexLAMConfig.preset("tiny").to_json())
    part = data.draw(st.sampled_from(sorted(tree)))
    where = tree if not isinstance(tree[part], dict) or data.draw(st.booleans()) else tree[part]
    field = part if where is tree else data.draw(st.sampled_from(sorted(where)))
    where[field] = data.draw(JUNK)
    try:
        cfg = FlexLAMConfig.from_json(json.dumps(tree))
    except FlexLAMError:
        return
    assert FlexLAMConfig.from_json(cfg.to_json()) == cfg
    assert cfg.page >= 1
