"""What other libraries do to a Qwen3 before or after it is accelerated: its tokens stay the original's."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from qwen_cases import note_ways, prompt_of, qwen
from torch import nn
from torch.nn.utils import parametrize, prune, remove_weight_norm, spectral_norm, weight_norm

from flexlam_fast import qwen_obstacles
from flexlam_fast.accelerate import accelerate

GREEDY: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
SQUARE = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


class Adapter(nn.Module):
    """A linear layer with something added."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * 1.5


class Reversed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(0)


def mlp(hf: Any) -> Any:
    return hf.model.layers[1].mlp


def attention(hf: Any) -> Any:
    return hf.model.layers[1].self_attn


def dispatched(hf: Any) -> None:
    part = mlp(hf)
    part._old_forward = part.forward
    new = functools.partial(lambda module, *args: module._old_forward(*args), part)
    part.forward = functools.update_wrapper(new, part._old_forward)


def gathered_elsewhere(hf: Any) -> None:
    mlp(hf).up_proj.weight.data = torch.empty(0)  # as sharding leaves it between two calls


def no_parameter(hf: Any) -> None:
    norm = hf.model.norm
    weight = norm.weight.detach() * 2
    del norm.weight
    norm.weight = weight


def own_config(hf: Any) -> None:
    attention(hf).config = copy.deepcopy(hf.config)
    attention(hf).config._attn_implementation = "eager"


def layers(order: list[int]) -> Callable[[Any], None]:
    return lambda hf: setattr(hf.model, "layers", nn.ModuleList(hf.model.layers[i] for i in order))


#: What is done, and how the reason starts that the original answers, or None where the package still does.
CHANGES: dict[str, tuple[Callable[[Any], object], str | None]] = {
    "compile()": (lambda m: m.model.norm.compile(backend="eager"), "model.norm: it was compiled by compile()"),
    "compiled forward": (
        lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")),
        "its forward was replaced on the object",
    ),
    "compiled part": (
        lambda m: setattr(m.model.layers[1], "mlp", torch.compile(mlp(m), backend="eager")),
        "model.layers.1.mlp: OptimizedModule is no part of a plain Qwen3",
    ),
    "parametrize": (
        lambda m: parametrize.register_parametrization(m.lm_head, "weight", Reversed()),
        "lm_head: ParametrizedLinear is no part of a plain Qwen3",
    ),
    "weight_norm": (lambda m: weight_norm(mlp(m).up_proj), "model.layers.1.mlp.up_proj: its hooks would not fire"),
    "weight_norm, removed": (lambda m: remove_weight_norm(weight_norm(mlp(m).up_proj)), None),
    "spectral_norm": (lambda m: spectral_norm(mlp(m).up_proj), "model.layers.1.mlp.up_proj: its hooks would not"),
    "prune": (lambda m: prune.l1_unstructured(mlp(m).up_proj, "weight", 0.5), "model.layers.1.mlp.up_proj: its hooks"),
    "prune, removed": (
        lambda m: prune.remove(prune.l1_unstructured(mlp(m).up_proj, "weight", 0.5), "weight"),
        None,
    ),
    "adapter": (
        lambda m: setattr(attention(m), "q_proj", Adapter(attention(m).q_proj)),
        "model.layers.1.self_attn.q_proj: Adapter is no part of a plain Qwen3",
    ),
    "subclass": (
        lambda m: setattr(m, "__class__", type("ShardedQwen3", (type(m),), {})),
        "ShardedQwen3 is ",
    ),
    "dispatched": (dispatched, "model.layers.1.mlp: its forward was replaced on the object"),
    "own forward": (lambda m: setattr(mlp(m), "forward", MethodType(type(mlp(m)).forward, mlp(m))), None),
    "hidden part": (
        lambda m: vars(mlp(m)).update(act_fn=nn.functional.gelu),
        "model.layers.1.mlp: its act_fn was replaced on the object",
    ),
    "sharded": (gathered_elsewhere, "model.layers.1.mlp.up_proj: expected weights [96, 64], got [0]"),
    "no parameter": (no_parameter, "model.norm: its weight is no parameter"),
    "no head": (lambda m: setattr(m, "lm_head", None), "it is not built like a Qwen3: 'NoneType' object"),
    "another head": (lambda m: setattr(m, "lm_head", nn.Identity()), "lm_head: Identity is no part of a plain Qwen3"),
    "another model": (lambda m: setattr(m, "model", nn.Sequential(m.model)), "model: Sequential is no part of a"),
    "a layer twice": (layers([1, 1, 2]), "model.layers.0.self_attn: its layer_idx is 1, not 0"),
    "not causal": (lambda m: setattr(attention(m), "is_causal", False), "model.layers.1.self_attn: its is_causal is F"),
    "groups": (lambda m: setattr(attention(m), "num_key_value_groups", 1), "model.layers.1.self_attn: its num_"),
    "own configuration": (own_config, "model.layers.1.self_attn: its configuration has attention 'eager', not 'sdpa'"),
    "layer types": (
        lambda m: setattr(m.config, "layer_types", ["sliding_attention"] * 3),
        "its configuration has layers of other types than 'full_attention'",
    ),
    "attention": (lambda m: setattr(m.config, "_attn_implementation", "eager"), None),
    "tied later": (lambda m: setattr(m.lm_head, "weight", m.model.embed_tokens.weight), None),
    "one weight twice": (lambda m: setattr(attention(m).k_proj, "weight", attention(m).v_proj.weight), None),
    "transposed weight": (lambda m: setattr(attention(m).q_proj, "weight", nn.Parameter(SQUARE.t())), None),
    "training": (lambda m: m.train().requires_grad_(False), None),
    "half of it half": (lambda m: mlp(m).half(), "model.layers.1.mlp.gate_proj: its weights are torch.float16 on cpu"),
    "meta": (lambda m: m.to("meta"), "it is on the meta device"),
}  # fmt: skip


def outcome(hf: Any, prompt: torch.Tensor) -> Any:
    try:
        return hf.generate(prompt, **GREEDY)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", CHANGES)
def test_its_tokens_are_the_originals(case: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = CHANGES[case]
    theirs, prompt, ways = qwen(), prompt_of(1, 20), note_ways(monkeypatch)
    hf = copy.deepcopy(theirs)
    if when == "after":
        record = accelerate(hf)
        hf.generate(prompt, **GREEDY)
    for model in (theirs, hf):
        torch.manual_seed(0)
        change(model)
    if when == "before":
        record = accelerate(hf)
    ways.clear()
    expected, got = outcome(theirs, prompt), outcome(hf, prompt)
    assert got == expected if isinstance(expected, str) else torch.equal(got, expected)
    assert len(ways) == (reason is None)
    found = [part.reason for part in record.left] or list(record.paused().values())
    assert len(found) == (reason is not None)
    assert reason is None or found[0].startswith(reason)


def test_weights_that_are_given_for_one_call_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self, hf: Any) -> None:
            super().__init__()
            self.hf = hf

        def forward(self, prompt: torch.Tensor) -> torch.Tensor:
            return self.hf.generate(prompt, **GREEDY)

    theirs, prompt = Model(qwen()), prompt_of(1, 20)
    ours = copy.deepcopy(theirs)
    record, ways = accelerate(ours), note_ways(monkeypatch)
    given = {"hf.lm_head.weight": theirs.hf.lm_head.weight.detach().flip(0)}
    expected = torch.func.functional_call(theirs, given, (prompt,))
    assert not torch.equal(expected, theirs(prompt))
    assert torch.equal(torch.func.functional_call(ours, given, (prompt,)), expected)
    assert ways == []
    assert "earlier  hf  Qwen3ForCausalLM: a call went to the original: lm_head: its weights are not plain" in str(
        record
    )


def test_generate_inside_of_torch_compile_is_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, prompt = qwen(num_hidden_layers=1), prompt_of(1, 8)
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    ways = note_ways(monkeypatch)
    monkeypatch.setattr(qwen_obstacles, "is_compiling", lambda: True)  # to compile it takes 20 s
    assert qwen_obstacles.obstacle(hf) == "torch.compile traces the call"
    assert torch.equal(hf.generate(prompt, **GREEDY), theirs.generate(prompt, **GREEDY))
    assert ways == []


def test_a_method_that_somebody_holds_outlives_an_undo() -> None:
    hf, prompt = qwen(num_hidden_layers=1), prompt_of(1, 20)
    expected = hf.generate(prompt, **GREEDY)
    record = accelerate(hf)
    generate = hf.generate
    record.undo()
    assert torch.equal(generate(prompt, **GREEDY), expected)


def test_threads_that_share_a_model_get_their_own_tokens() -> None:
    theirs, hf = qwen(), qwen()
    accelerate(hf)
    prompts = [prompt_of(batch, tokens) for batch, tokens in ((1, 5), (2, 20), (1, 65))]
    expected, wrong = [theirs.generate(prompt, **GREEDY) for prompt in prompts], []

    def call(i: int) -> None:
        for _ in range(5):
            if not torch.equal(hf.generate(prompts[i], **GREEDY), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_record_says_why_a_call_went_to_the_original() -> None:
    hf, prompt = qwen(num_hidden_layers=1), prompt_of(1, 20)
    record = accelerate(hf)
    assert "earlier" not in str(record)
    hf.generate(prompt, do_sample=True, max_new_tokens=1)
    assert "  earlier  the Qwen3ForCausalLM itself  Qwen3ForCausalLM: a call went to the original: do_sample" in str(
        record
    )
    hf.model.layers[0].mlp.forward = lambda x: x
    sentence = "model.layers.0.mlp: its forward was replaced on the object"
    assert record.paused() == {"": sentence}
    assert f"  paused   the Qwen3ForCausalLM itself  Qwen3ForCausalLM: {sentence}" in str(record)


def test_weights_are_packed_when_it_is_accelerated_and_not_in_a_call() -> None:
    hf = qwen(num_hidden_layers=1)
    accelerate(hf)
    part = hf.model.layers[0].self_attn
    held = [getattr(part, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"]
    assert len(set(held)) == 1
    hf.generate(prompt_of(1, 5), **GREEDY)
    assert held == [getattr(part, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"]


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_inference_mode_around_any_step_changes_nothing(
    made: bool, accelerated: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode(made):
        theirs, hf = qwen(num_hidden_layers=2), qwen(num_hidden_layers=2)
    with torch.inference_mode(accelerated):
        record = accelerate(hf)
    ends, ways = theirs.generate(prompt_of(2, 20), **GREEDY)[:, 22].tolist(), note_ways(monkeypatch)
    for mode in (used, not used):
        with torch.inference_mode(mode):
            prompt = prompt_of(2, 20)
            for options in ({}, dict(eos_token_id=ends)):
                got = hf.generate(prompt, **GREEDY, **options)
                expected = theirs.generate(prompt, **GREEDY, **options)
                assert torch.equal(got, expected)
                assert got.is_inference() == expected.is_inference() == mode
    assert (len(ways), record.paused()) == (4, {})
    assert {p.is_inference() for p in hf.parameters()} == {made}, "what was made is left as it was made"
    if not made:
        hf(prompt_of(1, 20), labels=prompt_of(1, 20)).loss.backward()
        assert all(p.grad is not None for p in hf.parameters())


def test_weights_of_which_some_were_made_in_inference_mode_are_left() -> None:
    hf = qwen(num_hidden_layers=1)
    with torch.inference_mode():
        hf.model.layers[0].mlp.up_proj.weight.data = torch.randn(96, 64)
    (part,) = accelerate(hf).left
    assert part.reason.startswith("model.layers.0.mlp.up_proj: its weights or those of the head were made in inference")
