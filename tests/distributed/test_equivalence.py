"""The layout never changes the math: what `megapt prove` runs, in fp64 and in fp32."""

from __future__ import annotations

import pytest

from megapt.prove.cases import Case, Matrix
from megapt.prove.job import Prover
from megapt.prove.layout import Layout
from megapt.prove.small import built_in

# fp64 shows what fp32 would hide; fp32 shows that nothing leans on fp64.
FP32 = (
    "tp=2,pp=2,schedule=zb-h1,recompute=full,zero=native-1;pp=2,schedule=zb-v,zero=deepspeed-1;"
    "dp=2,recompute=selective,zero=native-2,optimizer=muon;tp=2,zero=deepspeed-3"
)


def cases(precision: str) -> list[Case]:
    if precision == "fp64":
        return Matrix(built_in(), 8, precision).quick()
    layouts = Layout.parse_list(FP32)
    return [Case(shape, layout) for shape in built_in() for layout in (layouts[:1] if shape.brief else layouts)]


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.timeout(900)
def test_every_layout_computes_the_same(precision: str) -> None:
    with Prover(precision, print) as prover:
        proof = prover.run(cases(precision))
    failed = [
        f"{outcome.case}: {outcome.verdict}\n{outcome.error or ''}" for outcome in proof.outcomes if not outcome.passed
    ]
    assert not failed, "\n".join(failed)
    assert proof.passed, f"the reference is not what plain PyTorch computes: {proof.plain}"
    assert len(proof.plain) >= 2  # both models against torch.optim.AdamW
    # Bounds that nothing comes near would prove little.
    assert max(outcome.ratio for outcome in proof.outcomes) > 0.02
