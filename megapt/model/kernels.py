"""What computes each operation of the model on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from megapt.config import Config


@dataclass(frozen=True)
class Kernels:
    """Of each operation the kind of implementation as in `megapt_kernels.registry`, or `compiled`: a chain of plain
    operations that torch compiles."""

    norm: str = "auto"
    glu: str = "auto"
    rope: str = "auto"
    attention: str = "auto"
    cross_entropy: str = "auto"

    @staticmethod
    def of(config: Config) -> Kernels:
        """As configured. What is named is taken; `compile` chooses for the rest of what it can."""
        chosen, unnamed = config.kernels, "compiled" if config.compile else "auto"

        def fused(kind: str) -> str:
            return unnamed if kind == "auto" else kind

        return Kernels(
            fused(chosen.norm), fused(chosen.glu), fused(chosen.rope), chosen.attention, chosen.cross_entropy
        )


AUTO = Kernels()
