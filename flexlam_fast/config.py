"""What a FlexLAM is made of, as frozen dataclasses (design section 4; paper Tables 5-8).

Every size of every part stands here once; modules receive their own part of the configuration and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from flexlam_fast.errors import ConfigError, InputError, StorageError
from flexlam_fast.fields import as_config_errors, build, check_fields, each_once, integer, real
from flexlam_fast.values import check_choice, check_integers, check_number, shown

PREFIX_MODES = ("uniform", "full")


#: No model that a machine holds has a size above the one, or more layers than the other.
MAX_SIZE, MAX_DEPTH = 1_000_000, 1000


def _size(default: int, low: int = 1, high: int = MAX_SIZE) -> Any:
    return integer(default, low, high)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


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
    slots: int = _size(64)
    prefix: str | tuple[float, ...] = "uniform"
    spread: float = real(0.0, 0, 1e6)

    def __post_init__(self) -> None:
        check_fields(self)
        with as_config_errors():
            object.__setattr__(self, "levels", check_integers("levels", self.levels, 2, 2**31 - 1))
        _require(len(self.levels) <= 8, f"levels: expected 1 to 8 integers of at least 2, got {shown(self.levels)}")
        _require(math.prod(self.levels) < 2**31, f"levels: expected a codebook below 2^31, got {shown(self.levels)}")
        if isinstance(self.prefix, str):
            _require(self.prefix in PREFIX_MODES, f"prefix: expected one of {PREFIX_MODES}, got {shown(self.prefix)}")
        else:
            object.__setattr__(self, "prefix", self._weights(self.prefix))

    def _weights(self, given: object) -> tuple[float, ...]:
        weights = tuple(given) if isinstance(given, Sequence) else ()
        with as_config_errors():
            numbers = tuple(float(check_number("prefix", weight, 0, 1e30)) for weight in weights)
        fits = len(numbers) == self.slots + 1 and sum(numbers) > 0
        _require(fits, f"prefix: expected {self.slots + 1} non-negative weights, not all 0, got {shown(given)}")
        return numbers

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

    depth: int = _size(8, high=MAX_DEPTH)
    width: int = _size(192)
    heads: int = _size(3)
    mlp_ratio: int = _size(4)
    patch: int = _size(8)
    tubelet: int = _size(2)

    def __post_init__(self) -> None:
        check_fields(self)
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

    ``rope`` rotates queries and keys by the position of their patch (RoPE), so that "look so far to the left" is one
    pattern for all patches. ``latents_in_adaln`` adds the flattened latents to the flow time that shifts, scales and
    gates every layer, so that what was done can choose the pattern. Both are ours and off in the paper's sizes.
    """

    depth: int = _size(12, high=MAX_DEPTH)
    heads: int = _size(3)
    head_dim: int = _size(64)
    ffn: int = _size(776)
    patch: int = _size(4)
    steps: int = _size(28)
    predict: str = "velocity"
    tau_mean: float = real(0.0, -100, 100)
    rope: bool = False
    latents_in_adaln: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        kinds = ("velocity", "frame")
        _require(self.predict in kinds, f"decoder: expected predict in {kinds}, got {shown(self.predict)}")
        for name in ("rope", "latents_in_adaln"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"decoder.{name}: expected true or false, got {shown(value)}")
        fits = not self.rope or self.head_dim % 4 == 0
        _require(fits, f"decoder: expected a head_dim of whole 4s with rope, got {self.head_dim}")

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

    hidden: int = _size(256)
    intermediate: int = _size(1024)
    layers: int = _size(12, high=MAX_DEPTH)
    heads: int = _size(4)
    kv_heads: int = _size(4)
    head_dim: int = _size(64)
    rope_theta: float = real(1e4, 0, 1e12, open_low=True)
    rms_eps: float = real(1e-6, 0, 1, open_low=True)
    patch: int = _size(8)
    window: int = _size(34, low=2)
    stride: int = _size(8)
    places: bool = False
    decisions: str = "last"
    temperature: float = real(0.0, 0, 1e6)

    def __post_init__(self) -> None:
        check_fields(self)
        modes = ("last", "all")
        _require(self.decisions in modes, f"sequence: expected decisions in {modes}, got {shown(self.decisions)}")
        _require(isinstance(self.places, bool), f"sequence.places: expected true or false, got {shown(self.places)}")
        fits = self.heads % self.kv_heads == 0
        _require(fits, f"sequence: heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        _require(self.head_dim % 2 == 0, f"sequence: expected an even head_dim, got {self.head_dim}")


@dataclass(frozen=True)
class TranslatorConfig:
    """Hourglass MLP from latents and previous action to an action (paper Table 7).

    ``discrete`` lists the number of choices of each discrete action dimension, ``continuous`` counts the
    continuous ones; ``names`` optionally names the choices of the first discrete dimension.
    """

    depth: int = _size(5, high=MAX_DEPTH)
    hidden: int = _size(96)
    wide: int = _size(512)
    discrete: tuple[int, ...] = (15,)
    continuous: int = _size(0, low=0)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.discrete != ():
            with as_config_errors():
                choices = check_integers("translator.discrete", self.discrete, 2, MAX_SIZE)
            object.__setattr__(self, "discrete", choices)
        _require(bool(self.discrete) or self.continuous > 0, "translator: expected at least one action dimension")
        names = tuple(self.names) if isinstance(self.names, list | tuple) else (None,)
        texts = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        _require(texts, f"translator: expected names that are texts, each once, got {shown(self.names)}")
        object.__setattr__(self, "names", names)
        named = not names or (bool(self.discrete) and len(names) == self.discrete[0])
        _require(named, f"translator: expected one name per choice, got {len(names)} names")

    @property
    def action_dim(self) -> int:
        """Size of an encoded action: one-hot per discrete dimension, one number per continuous one."""
        return sum(self.discrete) + self.continuous


@dataclass(frozen=True)
class FlexLAMConfig:
    """The whole model. ``FlexLAMConfig.preset("dmlab")`` has the paper's sizes, ``"tiny"`` ours for two CPU cores."""

    frame: int = _size(64)
    channels: int = _size(3)
    bottleneck: BottleneckConfig = BottleneckConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    sequence: SequenceConfig = SequenceConfig()
    translator: TranslatorConfig = TranslatorConfig()

    def __post_init__(self) -> None:
        check_fields(self)
        for name, kind in get_type_hints(type(self)).items():
            part = getattr(self, name)
            if dataclasses.is_dataclass(kind):
                _require(
                    type(part) is kind, f"config.{name}: expected {getattr(kind, '__name__', kind)}, got {shown(part)}"
                )
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
        """Return the configuration as JSON text, and write it to ``path`` when given.

        Raises:
            StorageError: if it cannot be written there.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise StorageError(f"{path}: expected to write it, got: {error.strerror or error}") from error
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
            data = json.loads(text, object_pairs_hook=each_once)
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(f"config: expected JSON or a file of it, got {error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config: expected JSON, got {error}") from error
        return build(cls, data, "config")


def check_config(cfg: object) -> None:
    """Check that a model is built from a configuration.

    Raises:
        InputError: ``cfg`` is something else.
    """
    if not isinstance(cfg, FlexLAMConfig):
        raise InputError(f"cfg: expected a FlexLAMConfig, got {shown(cfg)}")
