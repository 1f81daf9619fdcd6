"""Layout strings, and what is refused."""

from __future__ import annotations

import pytest

from megapt.config import load
from megapt.errors import UserError
from megapt.prove.job import require_ranks
from megapt.prove.layout import Layout, tightened
from megapt.prove.small import SEQUENCE, built_in, shape_of

LLAMA, GPT2 = built_in()[:2]


@pytest.mark.parametrize(
    "text",
    ["tp=1", "tp=2,pp=2,schedule=zb-v,recompute=full", "dp=4,zero=deepspeed-2", "tp=4,sequence=off", "pp=2,stages=1/3"],
)
def test_a_string_names_a_layout(text: str) -> None:
    layout = Layout.parse(text)
    assert str(layout) == text
    assert Layout.parse(str(layout)) == layout


def test_several_are_parted_by_semicolons() -> None:
    assert Layout.parse_list("tp=2; dp=2,micro=1;") == [Layout(tp=2), Layout(dp=2, micro=1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=2,zreo=deepspeed-1", "unknown key `zreo`; did you mean `zero`"),
        ("tp=two", "tp is a whole number"),
        ("tp=0", "tp is a whole number"),
        ("tp", "`tp` needs a value"),
        ("tp=2,tp=4", "given twice"),
        ("sequence=no", "sequence is on or off"),
        ("tp=3", "must divide model.heads"),
        ("pp=2,zero=deepspeed-2", "would reduce gradients at every"),
        ("zero=fast", "not a backend and a stage"),
        ("zero=quick-1", "zero.backend"),
        ("schedule=zb-w,pp=2", "parallel.schedule"),
        ("stages=uneven", "cannot be uneven; 2 to 3 stages can"),
        ("pp=2,stages=one/three", "the layers of each stage as in 1/3"),
        ("pp=2,schedule=interleaved,micro=8", "nearest"),
    ],
)
def test_refusals_say_what_would_do(text: str, message: str) -> None:
    with pytest.raises(UserError, match=".*") as error:
        Layout.parse(text).config(LLAMA)
    assert message in str(error.value)


def test_more_ranks_than_the_machine_bears() -> None:
    with pytest.raises(UserError, match="has 65536 ranks, each a process of about .* bears"):
        require_ranks([Layout(tp=256, dp=256)])


def test_a_budget_lies_between_all_and_nothing() -> None:
    from megapt.plan.memory import stage_memory

    layout = Layout(recompute="budget", pp=2)
    config = tightened(layout.config(LLAMA), layout.dp)
    kinds = {kind for stage in stage_memory(config, 1, cpu=True) for chunk in stage.policies for kind in chunk}
    assert kinds - {"none"} and kinds != {"full"}


def test_the_small_model_keeps_the_shape() -> None:
    config = load("configs/llama-70b.yaml").config
    small = Layout().config(shape_of("llama-70b", config)).model
    large = config.model
    assert small.heads // small.num_kv_heads == large.heads // large.num_kv_heads
    kept = ("norm", "norm_eps", "activation", "gated", "position", "rope_theta", "bias", "tied_embeddings")
    assert all(getattr(small, key) == getattr(large, key) for key in kept)
    assert small.vocabulary % 2 == 1 and small.hidden <= 64


def test_what_a_small_model_must_scale_is_scaled() -> None:
    base = load("configs/llama-8b.yaml").config
    scaling = {"kind": "llama3", "factor": 8.0, "original_sequence": 8192}
    tree = base.model_dump()
    tree["model"] |= {"rope_scaling": scaling, "logit_softcap": 30.0}
    tree["train"] |= {"z_loss": 1e-4}
    small = Layout().config(shape_of("x", type(base).model_validate(tree)))
    assert small.model.rope_scaling is not None and small.model.rope_scaling.original_sequence == SEQUENCE
    assert small.model.rope_scaling.factor == 8.0
    assert small.model.logit_softcap == 2.0 and small.train.z_loss == 1e-2
