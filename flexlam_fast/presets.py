"""The named configurations (design section 4)."""

from __future__ import annotations

from flexlam_fast.config import (
    BottleneckConfig,
    DecoderConfig,
    EncoderConfig,
    FlexLAMConfig,
    SequenceConfig,
    TranslatorConfig,
)
from flexlam_fast.types import VIZDOOM_ACTIONS

#: The paper's sizes for DMLab (Tables 5 to 8), and our choices where it gives none; they are the dataclasses' defaults.
DMLAB = FlexLAMConfig()

#: What two CPU cores can train within an hour, on the four ViZDoom scenarios.
TINY = FlexLAMConfig(
    bottleneck=BottleneckConfig(levels=(5, 5, 5), slots=16, spread=0.1),
    encoder=EncoderConfig(depth=4, width=128, heads=4, mlp_ratio=3, patch=8),
    decoder=DecoderConfig(depth=4, heads=4, head_dim=32, ffn=384, patch=8, steps=8, predict="frame", tau_mean=-1.5),
    sequence=SequenceConfig(
        hidden=192,
        intermediate=416,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=48,
        patch=16,
        window=8,
        stride=4,
        places=True,
        decisions="all",
        temperature=1.0,
    ),
    translator=TranslatorConfig(depth=5, hidden=96, wide=256, discrete=(len(VIZDOOM_ACTIONS),), names=VIZDOOM_ACTIONS),
)

PRESETS = {"dmlab": DMLAB, "tiny": TINY}
