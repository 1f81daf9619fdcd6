"""Shapes of known models, as one device sees them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Preset:
    """Sizes of a model, and how much of it is measured at once.

    heads, kv_heads, ffn and vocabulary are of the whole model and multiples of `tensor`, the devices that share them.
    tokens: rows of activations. sequence: tokens of a document in attention. shard: parameters that this device's
    optimizer updates. experts, top_k: of the operations for mixtures of experts.
    """

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int
    tokens: int
    sequence: int
    shard: int
    tensor: int = 1
    experts: int = 8
    top_k: int = 2

    def sized(self, tokens: int | None = None, sequence: int | None = None, shard: int | None = None) -> Preset:
        """With other amounts; a sequence is no longer than all tokens, and tokens are whole sequences."""
        tokens = tokens or self.tokens
        sequence = min(sequence or self.sequence, tokens)
        return replace(self, tokens=tokens - tokens % sequence, sequence=sequence, shard=shard or self.shard)


# Vocabularies are padded to a multiple of 128 as training pads them. A shard is what ZeRO leaves one of 8 data-parallel
# devices of the 1B and 8B models, one of 16 at tensor 8 of the 70B model, and all of the smallest.
PRESETS = {
    p.name: p
    for p in (
        Preset("cpu", 512, 1408, 8, 2, 64, 8192, tokens=512, sequence=256, shard=1 << 20),
        Preset("gpt2-124m", 768, 3072, 12, 12, 64, 50304, tokens=32768, sequence=1024, shard=124_000_000),
        Preset("llama-1b", 2048, 8192, 32, 8, 64, 128256, tokens=16384, sequence=4096, shard=155_000_000),
        Preset("llama-8b", 4096, 14336, 32, 8, 128, 128256, tokens=16384, sequence=8192, shard=1_000_000_000),
        Preset("llama-70b", 8192, 28672, 64, 8, 128, 128256, 16384, 8192, shard=550_000_000, tensor=8),
    )
}

# Large enough to be more than the overhead of a call, small enough for all of them in minutes on two cores.
CPU_TOKENS, CPU_SHARD = 512, 1 << 20
