"""Greedy ``generate`` of a ``transformers`` Qwen3 of the ``dmlab`` sizes, before and after ``ff.accelerate``.

Prompt and weights are the same, and in fp32 so is what comes back: 2,432 tokens in, 64 more out, everything included.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from measure import in_turns
from rows import Results, Work

from flexlam_fast.accelerate import accelerate
from flexlam_fast.config import FlexLAMConfig, SequenceConfig

pytest.importorskip("transformers")
from qwen import EAGER, cast, qwen_of

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
PROMPT, NEW = 2432, 64
BATCHES = (1, 8) if ON_GPU else (1,)


@pytest.fixture(scope="module")
def model(results: Results) -> Any:
    """The original, after a check in fp32 that the accelerated one gives its tokens."""
    theirs = qwen_of(FlexLAMConfig.preset("dmlab"), results.device, torch.float32)
    prompt = prompt_of(2, results.device)[:, :300]
    expected = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False)
    ours = copy.deepcopy(theirs)
    assert accelerate(ours).swapped
    assert torch.equal(ours.generate(prompt, max_new_tokens=NEW, do_sample=False), expected)
    return cast(theirs, results.device, DTYPE)


def prompt_of(batch: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)


def least_work(seq: SequenceConfig, codes: int, batch: int, dtype: torch.dtype) -> Work:
    """What generating cannot help but do.

    Each of the 64 passes reads the weights of blocks and head once, and all but the first the keys and values before
    it; every token that enters meets the blocks' weights and those before it, every token that leaves the head.
    """
    widths = (2 * seq.heads + 2 * seq.kv_heads) * seq.head_dim + 3 * seq.intermediate
    blocks, head = seq.layers * seq.hidden * widths, codes * seq.hidden
    entering = PROMPT + NEW - 1
    before = sum(range(PROMPT + 1, entering + 1))  # tokens seen by those that follow the prompt
    cached = 2 * seq.layers * seq.kv_heads * seq.head_dim
    seen = 2 * seq.layers * seq.heads * seq.head_dim * entering * (entering + 1)  # query times key, weight times value
    operations = batch * (2 * entering * blocks + seen + 2 * NEW * head)
    return Work((NEW * (blocks + head) + batch * before * cached) * dtype.itemsize, operations, dtype)


@pytest.mark.parametrize("batch", [pytest.param(b, id=f"generate/qwen3/b{b}/k{NEW}") for b in BATCHES])
def test_generate(
    benchmark: Any, request: pytest.FixtureRequest, results: Results, rounds: int, model: Any, batch: int
) -> None:
    cfg, prompt = FlexLAMConfig.preset("dmlab"), prompt_of(batch, results.device)
    ours = copy.deepcopy(model)
    (part,) = accelerate(ours).swapped

    def generating(qwen: Any) -> Any:
        return lambda: qwen.generate(prompt, max_new_tokens=NEW, do_sample=False).cpu()

    timing = in_turns(benchmark, generating(ours), {EAGER: generating(model)}, results.machine.wall, rounds)
    note = (
        f"{str(DTYPE).removeprefix('torch.')}, {torch.get_num_threads()} threads, backend {part.backend}: {part.reason}"
        f"; {NEW} tokens after a prompt of {PROMPT}, the same call to both; the floor is that of the model alone: "
        "weights read once per token, keys and values once per token after the first, or every product done once"
    )
    work = least_work(cfg.sequence, cfg.bottleneck.codebook_size, batch, DTYPE)
    results.add(benchmark, request.node.callspec.id, timing, work, note, memory_bound=False)
