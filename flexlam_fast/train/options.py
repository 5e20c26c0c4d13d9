"""What the training commands are told on the command line, with the range of every number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexlam_fast.errors import InputError
from flexlam_fast.fields import check_fields, integer, real
from flexlam_fast.train.recipes import MAX_BATCH, MAX_RATE, MAX_STEPS
from flexlam_fast.values import check_choice, check_number, check_path, shown

#: Torch takes seeds of 64 bits with a sign.
MAX_SEED = 2**63 - 1
#: More labels than any data set has.
MAX_LABELS = 1e12
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class RunOptions:
    """What every training command can be told."""

    data: Path
    """Packed episodes, from ``collect`` or ``pack``."""
    output: Path
    """The run directory; a run that stands there is resumed."""
    preset: str = "tiny"
    """Model and recipe: tiny or dmlab."""
    config: Path | None = None
    """A configuration file for the model in place of the preset's."""
    prefix: str | None = None
    """uniform (retained-prefix training) or full (the Fixed-K baseline); left out, the configuration's."""
    seed: int = integer(0, 0, MAX_SEED)
    """Same seed, same weights, bit for bit, on the same machine."""
    steps: int | None = integer(None, 1, MAX_STEPS)
    """Training steps in place of the recipe's."""
    batch: int | None = integer(None, 1, MAX_BATCH)
    """Batch size in place of the recipe's."""
    lr: float | None = real(None, 0, MAX_RATE, open_low=True)
    """Peak learning rate in place of the recipe's, above 0."""
    save_every: int | None = integer(None, 1, MAX_STEPS)
    """Steps between checkpoints in place of the recipe's."""
    validate_every: int | None = integer(None, 1, MAX_STEPS)
    """Steps between validations in place of the recipe's."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    precision: str = "auto"
    """bf16 or fp32; auto is bf16 autocast where the device multiplies it in hardware."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl."""
    backend: str = "auto"
    """Kernels of the steps: triton on a GPU, native (C++) on a CPU, reference (plain PyTorch); auto is the fastest."""
    shard: bool = False
    """Under torchrun: weights, gradients and optimiser in parts (FSDP2), not all of them in each process (DDP)."""

    def check(self) -> None:
        """Check every option by itself, before any work.

        Raises:
            ConfigError: ``lr: expected a number above 0, at most 1000, got nan``.
            InputError: a path that cannot be one, or an unknown precision.
        """
        check_fields(self, "")
        check_path("data", self.data)
        check_path("output", self.output)
        if self.config is not None:
            check_path("config", self.config)
        check_choice("precision", self.precision, PRECISIONS)


def check_label_options(labels: float | None, labels_from: str | None) -> None:
    """Check what the stages that learn actions are told about labels.

    Raises:
        InputError: ``labels: expected a number above 0, at most 1e+12, got nan``.
    """
    if labels is not None:
        check_number("labels", labels, 0, MAX_LABELS, open_low=True)
    if not isinstance(labels_from, str | None):
        raise InputError(f"labels_from: expected the name of a task, got {shown(labels_from)}")
