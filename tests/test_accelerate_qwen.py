"""``ff.accelerate`` of a ``transformers`` Qwen3: greedy ``generate`` gives the tokens it gave, the rest is its own."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList, TemperatureLogitsWarper, TextStreamer

from flexlam_fast.accelerate import accelerate
from flexlam_fast.accelerate_qwen import mirror_of, obstacle
from flexlam_fast.errors import BackendError
from flexlam_fast.sequence import plain
from flexlam_fast.sequence.eager import Eager
from flexlam_fast.sequence.fused import Fused
from flexlam_fast.sequence.plain import PlainPacked

QWEN: dict[str, Any] = dict(
    vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "groups of 1": dict(num_key_value_heads=4),
    "groups of 2": dict(rms_norm_eps=1e-5),
    "groups of 4, tied": dict(num_key_value_heads=1, head_dim=24, tie_word_embeddings=True),
    "theta 1e6": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, hidden_size=40),
    "large vocabulary": dict(vocab_size=20_000, num_hidden_layers=1),
}


def qwen(**changes: Any) -> Any:
    """A random Qwen3 whose greedy tokens are clear choices that vary."""
    torch.manual_seed(0)
    hf = Qwen3ForCausalLM(Qwen3Config(**{**QWEN, **changes})).eval()
    for name, p in hf.named_parameters():
        wide = p.dim() > 1
        gain = 1.0 if "embed" in name else 2.0
        nn.init.normal_(p, mean=0.0 if wide else 1.0, std=gain * p.shape[-1] ** -0.5 if wide else 0.2)
    return hf


def prompt_of(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 1000, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


GREEDY: dict[str, Any] = dict(max_new_tokens=12, do_sample=False)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that generated, in order."""
    seen: list[str] = []
    real = plain.generate

    def noting(runner: Any, *args: Any) -> Tensor:
        seen.append(type(runner).__name__)
        return real(runner, *args)

    monkeypatch.setattr(plain, "generate", noting)
    return seen


def assert_clear(hf: Any, tokens: Tensor, start: int) -> None:
    """What was generated were clear choices, so that rounding cannot part two ways."""
    with torch.no_grad():
        best = hf(tokens[:, :-1]).logits[:, start - 1 :].topk(2).values
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-5 * float(best.abs().max())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_original(kind: str, backend: str, ours: list[str]) -> None:
    theirs = qwen(**KINDS[kind])
    hf = copy.deepcopy(theirs)
    accelerate(hf, backend)
    for batch, tokens in ((1, 1), (3, 63), (1, 64), (3, 65), (1, 130)):
        prompt = prompt_of(batch, tokens)
        expected = theirs.generate(prompt, max_new_tokens=40, do_sample=False)
        got = hf.generate(prompt, max_new_tokens=40, do_sample=False)
        assert got.dtype == torch.int64
        assert torch.equal(got, expected)
        assert_clear(theirs, expected, tokens)
        assert all(len(row[tokens:].unique()) > 12 for row in expected), "not one token repeated"
    assert ours == [{"auto": "PlainPacked", "reference": "Eager"}[backend]] * 5


def test_fused_kernels_in_the_interpreter_give_the_same_tokens(ours: list[str]) -> None:
    pytest.importorskip("triton")
    theirs = qwen(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=50)
    hf = copy.deepcopy(theirs)
    record = accelerate(hf, "triton")
    assert record.swapped[0].backend == "triton"
    prompt = prompt_of(1, 63) % 50
    assert torch.equal(hf.generate(prompt, max_new_tokens=3), theirs.generate(prompt, max_new_tokens=3))
    assert ours == ["Fused"]


ENDS: dict[str, dict[str, Any]] = {
    "one": dict(ends=1),
    "a list": dict(ends=3),
    "padded with its own token": dict(ends=2, pad_token_id=4),
    "padded with 0": dict(ends=2, pad_token_id=0),
}


@pytest.mark.parametrize("where", ["arguments", "the model's configuration", "a configuration of the call"])
@pytest.mark.parametrize("case", ENDS)
def test_rows_end_where_the_original_ends_them(case: str, where: str, ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(3, 20)
    assert not bool(((prompt == 0) | (prompt == 4)).any()), "or they would count as padding"
    free = theirs.generate(prompt, **GREEDY)[:, 20:]
    options = dict(ENDS[case])
    ends = [int(free[b, 2 + 3 * b]) for b in range(options.pop("ends"))]  # rows end at different times, or never
    options["eos_token_id"] = ends[0] if case == "one" else ends
    hf = copy.deepcopy(theirs)
    for model in (theirs, hf):
        if where == "the model's configuration":
            model.generation_config.update(**options)
    record = accelerate(hf)
    call: dict[str, Any] = dict(GREEDY)
    if where == "arguments":
        call |= options
    if where == "a configuration of the call":
        call = dict(generation_config=GenerationConfig(**GREEDY, **options))
    expected = theirs.generate(prompt, **call)
    assert torch.equal(hf.generate(prompt, **call), expected)
    assert len(record.swapped) == len(ours) == 1
    assert not torch.equal(expected[:, 20:], free[:, : expected.shape[1] - 20]), "or nothing ended"


def test_it_stops_when_the_last_row_has_ended(ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(3, 20)
    free = theirs.generate(prompt, max_new_tokens=40)[:, 20:]
    ends = [int(free[b, 4 * b + 1]) for b in range(3)]
    hf, asked = copy.deepcopy(theirs), []
    accelerate(hf)
    real = PlainPacked.logits

    def counting(self: Any, x: Tensor, step: Any) -> Tensor:
        asked.append(x.shape[1])
        return real(self, x, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainPacked, "logits", counting)
        got = hf.generate(prompt, max_new_tokens=40, eos_token_id=ends)
    expected = theirs.generate(prompt, max_new_tokens=40, eos_token_id=ends)
    assert torch.equal(got, expected)
    new = expected.shape[1] - 20
    assert new < 12
    assert asked == [20] + [1] * (new - 1)


def test_a_gpu_that_looks_seldom_ends_at_the_same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, prompt = qwen(), prompt_of(2, 20)
    free = theirs.generate(prompt, max_new_tokens=40)[:, 20:]
    ends = [int(free[0, 3]), int(free[1, 5])]
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    real = plain.generate

    def seldom(runner: Any, codes: Tensor, k: int, stop: Any) -> Tensor:
        stop.every = 16
        out = real(runner, codes, k, stop)
        assert out.shape[1] == 16
        return out

    monkeypatch.setattr(plain, "generate", seldom)
    call = dict(max_new_tokens=40, eos_token_id=ends, pad_token_id=7)
    assert torch.equal(hf.generate(prompt, **call), theirs.generate(prompt, **call))


LENGTHS: dict[str, dict[str, Any]] = {
    "max_length": dict(max_length=29),
    "both": dict(max_length=29, max_new_tokens=5),
    "one": dict(max_new_tokens=1),
    "a configuration": dict(generation_config=GenerationConfig(max_length=25)),
    "a configuration and arguments": dict(generation_config=GenerationConfig(max_length=25), max_new_tokens=3),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_are_obeyed(case: str, ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(2, 20)
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    assert torch.equal(hf.generate(prompt, **LENGTHS[case]), theirs.generate(prompt, **LENGTHS[case]))
    assert len(ours) == 1


HARMLESS: dict[str, dict[str, Any]] = {
    "mask of ones": dict(attention_mask=torch.ones(2, 20, dtype=torch.int64)),
    "bool mask": dict(attention_mask=torch.ones(2, 20, dtype=torch.bool)),
    "sampling options without sampling": dict(temperature=0.6, top_k=20, top_p=0.95),
    "options that are off": dict(num_beams=1, output_scores=False, return_dict_in_generate=False, synced_gpus=False),
    "nothing": dict(logits_processor=None, streamer=None, past_key_values=None),
    "repetition penalty of 1": dict(repetition_penalty=1.0, no_repeat_ngram_size=0),
    "pad token that is not there": dict(pad_token_id=4),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_options_that_say_nothing_are_no_obstacle(case: str, ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(2, 20)
    assert not bool((prompt == 4).any())
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    expected = theirs.generate(prompt, **GREEDY, **HARMLESS[case])
    assert torch.equal(hf.generate(prompt, **GREEDY, **HARMLESS[case]), expected)
    assert torch.equal(hf.generate(input_ids=prompt, **GREEDY, **HARMLESS[case]), expected)
    assert len(ours) == 2


class Silent(TextStreamer):
    """Swallows tokens."""

    def __init__(self) -> None:
        pass

    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sampling": lambda: dict(do_sample=True),
    "beams": lambda: dict(num_beams=2),
    "several returned": lambda: dict(num_beams=2, num_return_sequences=2),
    "min_new_tokens": lambda: dict(min_new_tokens=3, eos_token_id=5),
    "min_length": lambda: dict(min_length=30, eos_token_id=5),
    "repetition_penalty": lambda: dict(repetition_penalty=1.3),
    "no_repeat_ngram_size": lambda: dict(no_repeat_ngram_size=2),
    "encoder_repetition_penalty": lambda: dict(encoder_repetition_penalty=1.5),
    "suppress_tokens": lambda: dict(suppress_tokens=[3, 4]),
    "begin_suppress_tokens": lambda: dict(begin_suppress_tokens=[3]),
    "bad_words_ids": lambda: dict(bad_words_ids=[[5]]),
    "sequence_bias": lambda: dict(sequence_bias=[[[5], -3.0]]),
    "forced_eos_token_id": lambda: dict(forced_eos_token_id=7),
    "guidance_scale": lambda: dict(guidance_scale=1.5),
    "renormalize_logits": lambda: dict(renormalize_logits=True),
    "max_time": lambda: dict(max_time=100.0),
    "use_cache": lambda: dict(use_cache=False),
    "cache_implementation": lambda: dict(cache_implementation="static"),
    "dict": lambda: dict(return_dict_in_generate=True),
    "scores": lambda: dict(return_dict_in_generate=True, output_scores=True),
    "logits": lambda: dict(return_dict_in_generate=True, output_logits=True),
    "logits_processor": lambda: dict(logits_processor=LogitsProcessorList([TemperatureLogitsWarper(2.0)])),
    "stopping_criteria": lambda: dict(stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(23)])),
    "prefix_allowed_tokens_fn": lambda: dict(prefix_allowed_tokens_fn=lambda batch, ids: [1, 2, 3]),
    "streamer": lambda: dict(streamer=Silent()),
    "assistant_model": lambda: dict(assistant_model=qwen(num_hidden_layers=1)),
    "prompt_lookup_num_tokens": lambda: dict(prompt_lookup_num_tokens=3),
    "position_ids": lambda: dict(position_ids=torch.arange(3, 23).unsqueeze(0)),
    "left padding": lambda: dict(attention_mask=(torch.arange(20) > 3).long().unsqueeze(0)),
    "padding that is inferred": lambda: dict(pad_token_id=int(prompt_of(1, 20)[0, 0])),
    "inputs_embeds": lambda: dict(inputs_embeds=torch.randn(1, 20, 64)),
    "an unknown option in a configuration": lambda: dict(
        generation_config=GenerationConfig(**GREEDY, brand_new_option=3), max_new_tokens=None, do_sample=None
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_plain_greedy_is_the_originals_to_answer(
    case: str, ours: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = qwen()
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    called: list[object] = []
    real = Qwen3ForCausalLM.generate

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3ForCausalLM, "generate", noting)
    options = {**GREEDY, **OTHERS[case]()}
    prompt = () if case == "inputs_embeds" else (prompt_of(1, 20),)
    if "streamer" in options and options.get("num_beams"):
        options.pop("num_beams")
    torch.manual_seed(1)
    expected = theirs.generate(*prompt, **options)
    torch.manual_seed(1)
    got = hf.generate(*prompt, **options)
    assert [model is hf for model in called if model in (hf, theirs)] == [False, True]
    assert ours == []
    if not isinstance(got, Tensor):
        assert type(got) is type(expected)
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "prompt",
    [
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.full((1, 4), 1000),
        torch.zeros(1, 4),
        [[1, 2]],
        None,
    ],
    ids=["empty", "one dimension", "beyond the vocabulary", "floats", "a list", "nothing"],
)
def test_wrong_prompts_fail_as_they_did(prompt: Any) -> None:
    theirs = qwen()
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs.generate(prompt, **GREEDY)
    with pytest.raises(expected.type) as got:
        hf.generate(prompt, **GREEDY)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("options", [dict(max_length=20), dict(max_new_tokens=0), dict(max_new_tokens=3, nonsense=1)])
def test_wrong_options_fail_as_they_did(options: dict[str, Any]) -> None:
    theirs = qwen()
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    with pytest.raises(ValueError) as expected:  # noqa: PT011
        theirs.generate(prompt_of(1, 20), **options)
    with pytest.raises(ValueError) as got:  # noqa: PT011
        hf.generate(prompt_of(1, 20), **options)
    assert str(got.value) == str(expected.value)


def test_the_default_length_is_the_originals_to_choose(ours: list[str]) -> None:
    theirs = qwen()
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    assert torch.equal(hf.generate(prompt_of(1, 10)), theirs.generate(prompt_of(1, 10)))
    assert ours == []


class Mine(Qwen3ForCausalLM):
    """A user's own model."""


def hooked(hf: Any) -> None:
    hf.model.layers[1].mlp.register_forward_hook(lambda m, args, out: out * 2)


def padded_vocabulary(hf: Any) -> None:
    hf.lm_head = nn.Linear(64, 1008, bias=False)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook": (hooked, "model.layers.1.mlp: its hooks would not fire"),
    "forward": (
        lambda hf: setattr(hf.model.norm, "forward", lambda x: x * 2),
        "model.norm: its forward was replaced on the object",
    ),
    "another head": (padded_vocabulary, "lm_head: expected weights [1000, 64], got [1008, 64]"),
    "bias": (
        lambda hf: setattr(hf.model.layers[0].mlp, "down_proj", nn.Linear(96, 64)),
        "model.layers.0.mlp.down_proj: it has a bias or a max_norm",
    ),
    "another module": (
        lambda hf: setattr(hf.model.layers[0].mlp, "act_fn", nn.GELU()),
        "model.layers.0.mlp.act_fn: GELU is no part of a plain Qwen3 and may compute something else",
    ),
    "epsilon": (
        lambda hf: setattr(hf.model.layers[0].input_layernorm, "variance_epsilon", 0.1),
        "model.layers.0.input_layernorm: its variance_epsilon is 0.1, not 1e-06",
    ),
    "scaling": (
        lambda hf: setattr(hf.model.layers[2].self_attn, "scaling", 0.5),
        "model.layers.2.self_attn: its scaling is 0.5, not 0.25",
    ),
    "window": (
        lambda hf: setattr(hf.model.layers[2].self_attn, "sliding_window", 8),
        "model.layers.2.self_attn: it has a sliding window",
    ),
    "fewer layers": (
        lambda hf: setattr(hf.model, "layers", hf.model.layers[:2]),
        "it has 2 layers, and its configuration says 3",
    ),
    "dropout": (
        lambda hf: setattr(hf.train().model.layers[1].self_attn, "attention_dropout", 0.5),
        "model.layers.1.self_attn: its attention_dropout is 0.5, and it is in training mode",
    ),
    "frequencies": (
        lambda hf: hf.model.rotary_emb.inv_freq.mul_(0.5),
        "model.rotary_emb: its inv_freq are not those of theta 10000",
    ),
    "another dtype": (
        lambda hf: hf.model.layers[0].to(torch.float64),
        "model.layers.0.self_attn.q_proj: its weights are torch.float64 on cpu, those of the head torch.float32 on cpu",
    ),
    "attention": (
        lambda hf: setattr(hf.config, "_attn_implementation_internal", "mine"),
        "its attention is 'mine', which may compute something else",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_computes_something_else_is_left_with_the_reason(case: str) -> None:
    hf = qwen()
    change, sentence = CHANGES[case]
    change(hf)
    record = accelerate(nn.ModuleDict({"lam": hf}))
    assert record.swapped == ()
    assert [(part.path, part.kind, part.backend) for part in record.left] == [("lam", "Qwen3ForCausalLM", None)]
    assert record.left[0].reason.startswith(sentence)
    assert "\n" not in record.left[0].reason
    assert type(hf) is Qwen3ForCausalLM


@pytest.mark.parametrize("case", sorted(set(CHANGES) - {"another dtype", "another head", "attention"}))
def test_what_is_changed_later_is_obeyed(case: str, ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(1, 20)
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    before = hf.generate(prompt, **GREEDY)
    outcomes = []
    for model in (theirs, hf):
        torch.manual_seed(3)
        CHANGES[case][0](model)
        try:
            outcomes.append(model.generate(prompt, **GREEDY))
        except Exception as error:
            outcomes.append(str(error))
    assert len(ours) == 1
    one, other = outcomes
    assert one == other if isinstance(one, str) else torch.equal(one, other)
    assert case in ("window", "fewer layers") or not isinstance(one, str)
    assert isinstance(one, str) or case == "window" or not torch.equal(one, before), "or the change was none"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(attention_bias=True), "got ['biases']"),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "got ['sliding windows']"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), "got ['scaled RoPE']"),
        (dict(hidden_act="gelu"), "got gelu"),
    ],
)
def test_other_qwen3s_are_left_with_the_reason(changes: dict[str, Any], sentence: str) -> None:
    hf = Qwen3ForCausalLM(Qwen3Config(**{**QWEN, **changes}))
    (part,) = accelerate(hf).left
    assert part.reason.startswith("hf_model: expected silu without biases")
    assert part.reason.endswith(sentence)
    assert type(hf) is Qwen3ForCausalLM


def test_a_subclass_and_the_meta_device_are_left() -> None:
    mine = Mine(Qwen3Config(**QWEN))
    assert accelerate(mine).left[0].reason == "Mine is a subclass of Qwen3ForCausalLM and may compute something else"
    with torch.device("meta"):
        empty = Qwen3ForCausalLM(Qwen3Config(**QWEN))
    assert accelerate(empty).left[0].reason.startswith("it is on the meta device")


def test_hidden_states_asked_for_once_do_not_slow_it_for_good(ours: list[str]) -> None:
    hf, prompt = qwen(), prompt_of(1, 20)
    accelerate(hf)
    hf(prompt, output_hidden_states=True)
    hf.generate(prompt, **GREEDY)
    assert len(ours) == 1


def test_the_record_says_what_happened_and_undo_takes_it_back() -> None:
    hf = qwen()
    before = dict(vars(hf))
    names = {key: value.clone() for key, value in hf.state_dict().items()}
    random = torch.get_rng_state()
    record = accelerate(nn.ModuleDict({"lm": hf}), "reference")
    assert torch.equal(torch.get_rng_state(), random)
    assert str(record).splitlines()[:2] == [
        "accelerate: 1 swapped, 0 left",
        "  swapped  lm  Qwen3ForCausalLM: reference",
    ]
    assert type(hf) is not Qwen3ForCausalLM
    assert isinstance(hf, Qwen3ForCausalLM)
    hf.generate(prompt_of(1, 5), **GREEDY)
    assert vars(hf) == before
    assert list(hf.state_dict()) == list(names)
    assert all(torch.equal(value, names[key]) for key, value in hf.state_dict().items())
    assert accelerate(hf, "reference").left[0].reason == "already accelerated, on reference"
    record.undo()
    assert type(hf) is Qwen3ForCausalLM
    assert vars(hf) == before


def test_every_backend_says_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    reasons = {}
    for backend in ("auto", "reference", "triton"):
        hf = qwen()
        (part,) = accelerate(hf, backend).swapped
        reasons[backend] = part.reason
        runner = mirror_of(hf).way(backend)
        assert type(runner) is {"auto": PlainPacked, "reference": Eager, "triton": Fused}[backend]
    assert reasons["auto"] == "the fastest on cpu: packed products in plain PyTorch over pages of 64 tokens"
    assert reasons["triton"] == "asked for by name: fused kernels over pages of 64 tokens"


def test_a_backend_that_cannot_run_is_refused_by_name() -> None:
    pytest.importorskip("triton")
    hf = qwen(head_dim=24)
    with pytest.raises(BackendError, match=r"^backend: expected a head dimension that is a power of two .*, got 24$"):
        accelerate(hf, "triton")
    with pytest.raises(BackendError, match=r"^backend: expected one of .*, got 'nonsense'$"):
        accelerate(hf, "nonsense")
    assert type(hf) is Qwen3ForCausalLM


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_pickled_as_the_original_class(protocol: int) -> None:
    hf, prompt = qwen(num_hidden_layers=1), prompt_of(1, 5)
    accelerate(hf)
    expected = hf.generate(prompt, **GREEDY)
    data = pickle.dumps(hf, protocol)
    assert b"flexlam" not in data
    loaded = pickle.loads(data)
    assert type(loaded) is Qwen3ForCausalLM
    assert torch.equal(loaded.generate(prompt, **GREEDY), expected)


def test_files_are_those_of_the_original(tmp_path: Path) -> None:
    hf, prompt = qwen(tie_word_embeddings=True), prompt_of(1, 5)
    accelerate(hf)
    expected = hf.generate(prompt, **GREEDY)
    hf.save_pretrained(tmp_path)
    assert '"Qwen3ForCausalLM"' in (tmp_path / "config.json").read_text()
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(prompt, **GREEDY), expected)
    file = io.BytesIO()
    torch.save(hf.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))


def test_a_deep_copy_stays_accelerated_and_is_independent(ours: list[str]) -> None:
    hf, prompt = qwen(), prompt_of(1, 20)
    accelerate(hf)
    expected = hf.generate(prompt, **GREEDY)
    twin = copy.deepcopy(hf)
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(-1)
    assert torch.equal(twin.generate(prompt, **GREEDY), expected)
    assert len(ours) == 2


def in_place(hf: Any) -> None:
    with torch.no_grad():
        for i, p in enumerate(hf.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)), alpha=0.3)


def by_optimizer(hf: Any) -> None:
    optimizer = torch.optim.SGD(hf.parameters(), lr=1.0)
    hf(prompt_of(1, 20), labels=prompt_of(1, 20)).loss.backward()
    optimizer.step()


def assigned(hf: Any) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    hf.model.layers[1].self_attn.q_proj.weight = nn.Parameter(weight)


def loaded(hf: Any) -> None:
    other = qwen(num_attention_heads=4)
    in_place(other)
    hf.load_state_dict(other.state_dict(), assign=True)


def doubled(hf: Any) -> None:
    in_place(hf)
    hf.double()


@pytest.mark.parametrize("change", [in_place, by_optimizer, assigned, loaded, doubled])
def test_weights_that_change_are_obeyed(change: Callable[[Any], None], ours: list[str]) -> None:
    theirs, prompt = qwen(), prompt_of(1, 20)
    hf = copy.deepcopy(theirs)
    accelerate(hf)
    before = hf.generate(prompt, **GREEDY)
    for model in (theirs, hf):
        change(model)
    expected = theirs.generate(prompt, **GREEDY)
    assert torch.equal(hf.generate(prompt, **GREEDY), expected)
    assert not torch.equal(expected, before)
    assert len(ours) == 2


def test_a_model_that_is_cast_or_moved_takes_the_way_that_is_best_there() -> None:
    pytest.importorskip("triton")
    chosen, named = qwen(), qwen()
    accelerate(chosen)
    accelerate(named, "triton")
    before = mirror_of(chosen).way("auto")
    assert mirror_of(chosen).way("auto") is before
    for hf in (chosen, named):
        hf.double()
    assert mirror_of(chosen).way("auto") is not before
    with pytest.raises(BackendError, match=r"^backend: expected float32, .* for 'triton', got 96 in float64$"):
        named.generate(prompt_of(1, 5), **GREEDY)


def test_weights_are_shared_and_held_once() -> None:
    hf = qwen()
    accelerate(hf)
    parameters = [id(p) for p in hf.parameters()]
    hf.generate(prompt_of(1, 5), **GREEDY)
    assert [id(p) for p in hf.parameters()] == parameters
    mirror = mirror_of(hf)
    ours = {id(p) for name, p in mirror.model.named_parameters() if not name.startswith("observe")}
    assert ours == set(parameters)
    held = {t.untyped_storage().data_ptr() for layer in mirror.runner.layers for t in (layer.qkv, layer.gate_up)}
    attention = [getattr(layer.self_attn, f"{name}_proj") for layer in hf.model.layers for name in "qkv"]
    assert {part.weight.untyped_storage().data_ptr() for part in attention} < held
    packed = [layer.qkv for layer in mirror.runner.layers]
    hf.generate(prompt_of(1, 5), **GREEDY)
    assert all(layer.qkv is old for layer, old in zip(mirror.runner.layers, packed, strict=True)), "packed once"


def test_training_works_after_inference_mode() -> None:
    hf = qwen()
    accelerate(hf)
    with torch.inference_mode():
        hf.generate(prompt_of(1, 5), **GREEDY)
    hf(prompt_of(1, 20), labels=prompt_of(1, 20)).loss.backward()
    assert all(p.grad is not None for p in hf.parameters())


def test_autocast_is_the_originals(ours: list[str]) -> None:
    hf = qwen()
    theirs = copy.deepcopy(hf)
    accelerate(hf)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hf.generate(prompt_of(1, 20), **GREEDY), theirs.generate(prompt_of(1, 20), **GREEDY))
    assert ours == []


def test_half_precision_runs_unless_its_frequencies_were_rounded(ours: list[str]) -> None:
    hf = qwen().to(torch.bfloat16)
    (part,) = accelerate(hf).left
    assert "its inv_freq are not those of theta 10000: .to() rounds them like weights" in part.reason
    fresh = Qwen3ForCausalLM(Qwen3Config(**QWEN)).model.rotary_emb.inv_freq
    hf.model.rotary_emb.inv_freq = fresh
    theirs = copy.deepcopy(hf)
    accelerate(hf)
    got, expected = (model.generate(prompt_of(3, 20), **GREEDY)[:, 20:] for model in (hf, theirs))
    assert ours == ["PlainPacked"]
    assert float((got[:, 0] == expected[:, 0]).float().mean()) > 0.6, "bf16 parts close choices"


def test_what_was_made_for_a_model_goes_with_it() -> None:
    home = sys.modules["flexlam_fast.accelerate_qwen"]
    hf = qwen()
    accelerate(hf)
    hf.generate(prompt_of(1, 5), **GREEDY)
    before = len(home._mirrors)
    del hf
    assert len(home._mirrors) < before


def test_the_other_package_is_looked_up_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accelerate_qwen", "greedy"):
        text = Path(sys.modules[f"flexlam_fast.{name}"].__file__ or "").read_text()
        assert "import transformers" not in text
        assert "from transformers" not in text
    hf = qwen()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    assert accelerate(nn.Sequential(hf)).left == ()
    assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]


def test_a_plain_qwen3_has_no_obstacle() -> None:
    assert all(obstacle(qwen(**changes)) is None for changes in KINDS.values())
