"""The layout never changes the math: what `megapt prove` runs, in fp64 and in fp32."""

from __future__ import annotations

import pytest

from megapt.prove.cases import Case, Matrix
from megapt.prove.job import Prover, has_compiler
from megapt.prove.layout import Layout
from megapt.prove.small import built_in

# fp64 shows what fp32 would hide; fp32 shows that nothing leans on fp64.
FP32 = (
    "tp=2,pp=2,schedule=zb-h1,recompute=full,zero=native-1;pp=2,schedule=zb-v,zero=deepspeed-1;"
    "dp=2,recompute=selective,zero=native-2,optimizer=muon;tp=2,zero=deepspeed-3"
)
# Our CUDA sources, under the emulator.
CUDA = "tp=2,recompute=selective,kernels=cuda;pp=2,schedule=zb-h1,kernels=cuda;dp=2,zero=native-2,kernels=cuda"


def cases(precision: str) -> list[Case]:
    if precision == "fp64":
        return Matrix(built_in(), 8, precision).quick()
    layouts, cuda = Layout.parse_list(FP32), Layout.parse_list(CUDA) if has_compiler() else []
    return [
        Case(shape, layout)
        for shape in built_in()
        for layout in ([*layouts[:1], *cuda[:1]] if shape.brief else [*layouts, *cuda])
    ]


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
