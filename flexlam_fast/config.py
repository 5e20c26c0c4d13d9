"""What a FlexLAM is made of, as frozen dataclasses (design section 4; paper Tables 5-8).

Every size of every part stands here once; modules receive their own part of the configuration and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from flexlam_fast.checks import check_choice, describe
from flexlam_fast.errors import ConfigError, InputError

PREFIX_MODES = ("uniform", "full")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{type(owner).__name__}.{name}: expected a positive integer, got {value!r}",
        )


@dataclass(frozen=True)
class BottleneckConfig:
    """FSQ levels and the number of slots ``K``; ``prefix`` is how training draws the retained length.

    ``prefix="uniform"`` is retained-prefix training with ``k ~ Uniform{0..K}`` (paper section 4.1, A.7),
    ``prefix="full"`` keeps every slot and is the Fixed-K baseline (paper A.3); a tuple of ``K + 1``
    non-negative weights draws ``k`` with those odds.

    ``spread`` weighs a hinge on the standard deviation of every slot output over the batch, which keeps a short
    training from collapsing onto one code before the decoder listens; 0 is the paper's plain objective.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    slots: int = 64
    prefix: str | tuple[float, ...] = "uniform"
    spread: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "slots")
        number = isinstance(self.spread, int | float) and 0 <= self.spread < math.inf
        _require(number, f"spread: expected a non-negative number, got {self.spread!r}")
        ok = 1 <= len(self.levels) <= 8 and all(isinstance(n, int) and n >= 2 for n in self.levels)
        _require(ok, f"levels: expected 1 to 8 integers of at least 2, got {self.levels!r}")
        _require(math.prod(self.levels) < 2**31, f"levels: expected a codebook below 2^31, got {self.levels!r}")
        if isinstance(self.prefix, str):
            _require(self.prefix in PREFIX_MODES, f"prefix: expected one of {PREFIX_MODES}, got {self.prefix!r}")
        else:
            weights = self.prefix
            fits = len(weights) == self.slots + 1 and min(weights) >= 0 and 0 < sum(weights) < math.inf
            _require(fits, f"prefix: expected {self.slots + 1} non-negative weights, got {weights!r}")

    @property
    def dim(self) -> int:
        """FSQ channels ``d``."""
        return len(self.levels)

    @property
    def ladder(self) -> tuple[int, ...]:
        """The budgets ``1, 2, 4, ...`` below ``K``, and ``K`` itself."""
        return (*(2**i for i in range(self.slots.bit_length()) if 2**i < self.slots), self.slots)

    @property
    def codebook_size(self) -> int:
        """Codes per slot ``C``."""
        return math.prod(self.levels)


@dataclass(frozen=True)
class EncoderConfig:
    """Pre-norm ViT over the tubelet patches of a transition and ``K`` slot queries (paper Table 6)."""

    depth: int = 8
    width: int = 192
    heads: int = 3
    mlp_ratio: int = 4
    patch: int = 8
    tubelet: int = 2

    def __post_init__(self) -> None:
        _positive(self, "depth", "width", "heads", "mlp_ratio", "patch", "tubelet")
        _require(self.width % self.heads == 0, f"encoder: width {self.width} is no multiple of heads {self.heads}")
        _require(self.tubelet == 2, f"encoder: expected tubelet 2 (a transition is two frames), got {self.tubelet}")


@dataclass(frozen=True)
class DecoderConfig:
    """DiT with adaLN-zero on the flow time (paper Table 6); ``steps`` Euler steps when sampling.

    ``predict`` is what the last layer's output means. ``"velocity"`` is the flow's velocity itself. ``"frame"`` is the
    change from ``o_t`` to the clean next frame, from which the same velocity follows; it suits large patches, whose
    noise has more dimensions than a narrow model can carry. The loss is on the velocity either way. Flow times are
    logit-normal with mean ``tau_mean`` and deviation 1 in training; a negative mean asks more often about the noisy
    end of the path, where only the latents know the next frame.
    """

    depth: int = 12
    heads: int = 3
    head_dim: int = 64
    ffn: int = 776
    patch: int = 4
    steps: int = 28
    predict: str = "velocity"
    tau_mean: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "depth", "heads", "head_dim", "ffn", "patch", "steps")
        kinds = ("velocity", "frame")
        _require(self.predict in kinds, f"decoder: expected predict in {kinds}, got {self.predict!r}")
        number = isinstance(self.tau_mean, int | float) and abs(self.tau_mean) < math.inf
        _require(number, f"decoder.tau_mean: expected a finite number, got {self.tau_mean!r}")

    @property
    def width(self) -> int:
        """Model width ``W``."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class SequenceConfig:
    """Qwen3-style causal transformer over codes and observation patches (paper Table 8).

    ``window`` frames of context, of which every ``stride``-th keeps its observation block (paper B.1). ``places`` adds
    learned slot and patch embeddings to the input, which a small model needs to learn quickly. ``decisions`` says what
    a training window asks for: ``"last"`` is one decision at its newest frame (paper B.1), ``"all"`` is one at every
    frame, each seeing exactly what it would see when acting. ``temperature`` is that of the codes when acting: 0 takes
    the likeliest, 1 draws from what the model learned, which keeps a weak imitator out of loops.
    """

    hidden: int = 256
    intermediate: int = 1024
    layers: int = 12
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 1e4
    rms_eps: float = 1e-6
    patch: int = 8
    window: int = 34
    stride: int = 8
    places: bool = False
    decisions: str = "last"
    temperature: float = 0.0

    def __post_init__(self) -> None:
        modes = ("last", "all")
        _require(self.decisions in modes, f"sequence: expected decisions in {modes}, got {self.decisions!r}")
        _positive(self, "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "patch")
        _positive(self, "window", "stride")
        for name in ("rope_theta", "rms_eps"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            _require(number, f"sequence.{name}: expected a positive number, got {value!r}")
        _require(isinstance(self.places, bool), f"sequence.places: expected true or false, got {self.places!r}")
        warm = isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf
        _require(warm, f"sequence: expected temperature >= 0, got {self.temperature!r}")
        _require(self.window >= 2, f"sequence: expected a window of at least 2 frames, got {self.window}")
        fits = self.heads % self.kv_heads == 0
        _require(fits, f"sequence: heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        _require(self.head_dim % 2 == 0, f"sequence: expected an even head_dim, got {self.head_dim}")


@dataclass(frozen=True)
class TranslatorConfig:
    """Hourglass MLP from latents and previous action to an action (paper Table 7).

    ``discrete`` lists the number of choices of each discrete action dimension, ``continuous`` counts the
    continuous ones; ``names`` optionally names the choices of the first discrete dimension.
    """

    depth: int = 5
    hidden: int = 96
    wide: int = 512
    discrete: tuple[int, ...] = (15,)
    continuous: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _positive(self, "depth", "hidden", "wide")
        whole = isinstance(self.continuous, int) and self.continuous >= 0
        fits = whole and all(isinstance(n, int) and n >= 2 for n in self.discrete)
        _require(fits, f"translator: expected choices >= 2 and continuous >= 0, got {self.discrete}, {self.continuous}")
        _require(bool(self.discrete) or self.continuous > 0, "translator: expected at least one action dimension")
        named = not self.names or (bool(self.discrete) and len(self.names) == self.discrete[0])
        _require(named, f"translator: expected one name per choice, got {len(self.names)} names")

    @property
    def action_dim(self) -> int:
        """Size of an encoded action: one-hot per discrete dimension, one number per continuous one."""
        return sum(self.discrete) + self.continuous


@dataclass(frozen=True)
class FlexLAMConfig:
    """The whole model. ``FlexLAMConfig.preset("dmlab")`` has the paper's sizes, ``"tiny"`` ours for two CPU cores."""

    frame: int = 64
    channels: int = 3
    bottleneck: BottleneckConfig = BottleneckConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    sequence: SequenceConfig = SequenceConfig()
    translator: TranslatorConfig = TranslatorConfig()

    def __post_init__(self) -> None:
        _positive(self, "frame", "channels")
        for name in ("encoder", "decoder", "sequence"):
            patch = getattr(self, name).patch
            _require(self.frame % patch == 0, f"{name}: frame size {self.frame} is no multiple of patch {patch}")

    @property
    def tokens_per_frame(self) -> int:
        """Length of an observation block."""
        return (self.frame // self.sequence.patch) ** 2

    @property
    def page(self) -> int:
        """Tokens in a page, ``P = gcd(K, tokens per frame)`` (design section 3)."""
        return math.gcd(self.bottleneck.slots, self.tokens_per_frame)

    @classmethod
    def preset(cls, name: str) -> FlexLAMConfig:
        """Return the named preset.

        Raises:
            ConfigError: if there is no such preset; the message lists those there are.
        """
        from flexlam_fast.presets import PRESETS

        return PRESETS[check_choice("preset", name, sorted(PRESETS), ConfigError)]

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the configuration as JSON text, and write it to ``path`` when given."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> FlexLAMConfig:
        """Build a configuration from JSON text or from the file that holds it.

        Raises:
            ConfigError: if the file cannot be read, or the text is not JSON, or it names a field that does not exist or
                a value that no model has.
        """
        text = str(source)
        try:
            if isinstance(source, Path) or not text.lstrip().startswith("{"):
                text = Path(text).read_text(encoding="utf-8")
            data = json.loads(text)
        except OSError as error:
            raise ConfigError(f"config: expected JSON or a file of it, got {error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config: expected JSON, got {error}") from error
        return _build(cls, data, "config")


def _build(kind: type, data: Any, where: str) -> Any:
    _require(isinstance(data, dict), f"{where}: expected an object, got {data!r}")
    hints = get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    _require(not unknown, f"{where}: expected fields {sorted(hints)}, got {unknown}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, f"{where}.{name}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except (TypeError, ArithmeticError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_config(cfg: object) -> None:
    """Check that a model is built from a configuration.

    Raises:
        InputError: ``cfg`` is something else.
    """
    if not isinstance(cfg, FlexLAMConfig):
        raise InputError(f"cfg: expected a FlexLAMConfig, got {describe(cfg)}")
