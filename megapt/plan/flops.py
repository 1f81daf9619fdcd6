"""Model FLOPs, from the parameter table and the shapes."""

from __future__ import annotations

from megapt.config import ModelConfig
from megapt.model.table import parameter_table


def model_flops_per_token(model: ModelConfig, sequence: int) -> float:
    """FLOPs of forward and backward per token, as the literature counts them (PaLM, arXiv 2204.02311, appendix B).

    6 per matrix element that multiplies a token (embeddings look up, so they count only as the output projection),
    plus attention scores and values over the whole sequence, 12 x layers x heads x head width x sequence. Recomputed
    work does not count, and causal attention counts as if it were full.
    """
    matrices = sum(spec.numel for spec in parameter_table(model).values() if len(spec.shape) == 2 and not spec.lookup)
    return 6.0 * matrices + 12.0 * model.layers * model.heads * model.head_width * sequence
