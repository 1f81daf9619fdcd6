"""Published training runs as configurations: shapes, layouts, systems, and the figures that were published.

Shapes of the Megatron models are those of arXiv 2104.04473 (table 1) and 2205.05198 (table 3), of Llama those of its
releases, of OLMo those of `olmo_core.nn.transformer.TransformerConfig`. What sources leave open and had to be assumed
stands with each table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megapt.config import Config, from_tree
from megapt.plan import hardware
from megapt.plan.cost import Software
from megapt.plan.flops import model_flops_per_token
from megapt.plan.hardware import Hardware
from megapt.plan.time import StepTime, step_time

HIDDEN = 0.6
"""Share of tensor parallelism's collectives that Megatron-Core hides by cutting products in pieces; fitted by
`published.fit`."""

MEGATRON_CORE = Software("Megatron-Core 0.8", hidden=HIDDEN, fused=True, accumulates=True)
MEGATRON_2021 = Software(
    "Megatron-LM 2021",
    fused=True,
    flash=False,
    overlaps_gradients=False,
    overlaps_sends=False,
    skips_last=False,
    scatters_sends=True,
    gradient_width=2,
)
MEGATRON_2022 = Software(
    "Megatron-LM 2022", fused=True, accumulates=True, flash=False, overlaps_sends=False, selective="scores"
)
TORCHTITAN = Software("torchtitan", selective="products")
OLMO_CORE = Software("OLMo-core", fused=True)


@dataclass(frozen=True)
class Table:
    """Runs of one source. unit: of the published figures; assumed: what the source does not say."""

    key: str
    title: str
    unit: str
    assumed: str


TABLES = (
    Table(
        "megatron-core",
        "Megatron-Core 0.8 (README, 2024), H100, weak scaling",
        "TFLOP/s per GPU",
        "hidden sizes and layers, which the README prints in a picture only: those that give the stated parameter "
        "counts with a vocabulary of 131,072 and untied ends; the 177B model's stated batch of 1152 for all (462B: "
        "1536, which its pipeline divides); micro-batch 1; two layers per chunk of the interleaved schedule (462B: 1)",
    ),
    Table(
        "megatron-core-strong",
        "Megatron-Core 0.8, 177B at a global batch of 1152, H100, strong scaling",
        "MFU, %",
        "tensor 8, pipeline 6, micro-batch 1 and chunks, as above",
    ),
    Table(
        "sc21",
        "Megatron-LM (arXiv 2104.04473, table 1), A100, full recomputation",
        "hardware TFLOP/s per GPU",
        "micro-batch 4 without a pipeline and 1 with one; chunks of the interleaved schedule",
    ),
    Table(
        "sequence-parallel",
        "Sequence parallelism, selective recomputation (arXiv 2205.05198, table 5), A100",
        "MFU, %",
        "nothing: layouts, batches and interleaving are stated",
    ),
    Table(
        "torchtitan",
        "torchtitan (benchmarks/llama3_h100_202412), Llama 3 8B, H100 of 500 W and 2.4 TB/s",
        "tokens/s per GPU",
        "that the clock under load follows the cube root of the power limit, 500 W for 700 W; this was put in after "
        "the errors without it were seen, 11 to 21 % too fast. Rows in float8 are left out (70B and 405B with them): "
        "products in float8 are not modelled",
    ),
    Table(
        "torchtitan-a100",
        "torchtitan (docs/performance.md, 2024), 64 A100",
        "tokens/s per GPU",
        "nothing compiled; one 200 Gb/s adapter per GPU",
    ),
    Table(
        "olmo-core",
        "OLMo-core (README and src/scripts/train), H100, sequence 4096",
        "tokens/s per GPU",
        "64 GPUs, fully sharded over all of them",
    ),
)


@dataclass(frozen=True)
class Run:
    """A published run: its table and name, what would run it here, and the figure that was published."""

    table: str
    name: str
    config: Config
    data: int
    hardware: Hardware
    software: Software
    published: float

    def predict(self) -> tuple[float, StepTime]:
        """The figure in the table's unit, and the step that it comes from."""
        step = step_time(self.config, self.data, self.hardware, self.software)
        return step.tokens_per_second / step.world / self._tokens_per_unit(), step

    def tflops(self, figure: float) -> float:
        """A figure of the table's unit as TFLOP/s per GPU, of the FLOPs that its source counts."""
        return figure * self._tokens_per_unit() * self._flops_per_token() / 1e12

    def _tokens_per_unit(self) -> float:
        """Tokens per second and GPU that the table's unit stands for."""
        unit = {table.key: table.unit for table in TABLES}[self.table]
        if unit == "tokens/s per GPU":
            return 1.0
        one = self.hardware.peak_flops(self.config.precision) / 100 if unit == "MFU, %" else 1e12
        return one / self._flops_per_token()

    def _flops_per_token(self) -> float:
        if self.table == "sc21":
            batch = self.config.batch
            return _flops_of_2021(self.config) / (batch.global_samples * batch.sequence)
        return model_flops_per_token(self.config.model, self.config.batch.sequence)


def _flops_of_2021(config: Config) -> float:
    """Equation 3 of arXiv 2104.04473: of a step with every layer's forward computed twice."""
    model, sequence = config.model, config.batch.sequence
    hidden, layers = model.hidden, model.layers
    ends = sequence / (6 * hidden) + model.vocabulary / (16 * layers * hidden)
    return 96.0 * config.batch.global_samples * sequence * layers * hidden**2 * (1 + ends)


def _gpt(layers: int, hidden: int, heads: int, vocabulary: int, sequence: int, tied: bool) -> dict[str, Any]:
    """GPT-3's description (arXiv 2005.14165)."""
    return {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "ffn": 4 * hidden,
        "vocabulary": vocabulary,
        "max_sequence": sequence,
        "norm": "layer_norm",
        "activation": "gelu_tanh",
        "gated": False,
        "position": "learned",
        "bias": "all",
        "tied_embeddings": tied,
    }


def _config(model: dict[str, Any], samples: int, micro: int, sequence: int, **more: Any) -> Config:
    tree = {
        "model": model,
        "batch": {"sequence": sequence, "samples": samples, "micro": micro},
        "data": {"train": "corpus"},
        "train": {"steps": 1},
        **more,
    }
    return from_tree(tree).config


def _layout(tensor: int, pipeline: int, chunks: int, **more: Any) -> dict[str, Any]:
    schedule = "interleaved" if chunks > 1 else "1f1b"
    return {"tensor": tensor, "pipeline": pipeline, "chunks": chunks, "schedule": schedule, **more}


# name, layers, hidden, heads, tensor, pipeline, chunks, global batch, TFLOP/s per GPU
_CORE = (
    ("1.7B", 24, 2048, 16, 1, 1, 1, 1152, 408.8),
    ("7.1B", 30, 4096, 32, 2, 1, 1, 1152, 465.9),
    ("16B", 32, 6144, 48, 4, 1, 1, 1152, 489.1),
    ("32B", 37, 8192, 64, 8, 1, 1, 1152, 459.6),
    ("70B", 84, 8192, 64, 8, 2, 21, 1152, 419.7),
    ("119B", 64, 12288, 96, 8, 4, 8, 1152, 420.5),
    ("177B", 96, 12288, 96, 8, 6, 8, 1152, 432.8),
    ("314B", 96, 16384, 128, 8, 8, 6, 1152, 474.4),
    ("462B", 112, 18432, 144, 8, 16, 7, 1536, 459.9),
)


def _megatron_core(cluster: Hardware) -> list[Run]:
    runs = []
    for name, layers, hidden, heads, tensor, pipeline, chunks, batch, figure in _CORE:
        model = _gpt(layers, hidden, heads, 131072, 4096, tied=False)
        config = _config(model, batch, 1, 4096, parallel=_layout(tensor, pipeline, chunks))
        runs.append(Run("megatron-core", f"{name} {tensor}/{pipeline}", config, 48, cluster, MEGATRON_CORE, figure))
    return runs


def _megatron_core_strong(cluster: Hardware) -> list[Run]:
    config = _config(_gpt(96, 12288, 96, 131072, 4096, tied=False), 1152, 1, 4096, parallel=_layout(8, 6, 8))
    return [
        Run("megatron-core-strong", f"177B, {data * 48} GPUs", config, data, cluster, MEGATRON_CORE, figure)
        for data, figure in ((2, 47.0), (96, 42.0))
    ]


# name, layers, hidden, heads, tensor, pipeline, chunks, micro-batch, global batch, GPUs, TFLOP/s per GPU
_SC21 = (
    ("1.7B", 24, 2304, 24, 1, 1, 1, 4, 512, 32, 137),
    ("3.6B", 30, 3072, 32, 2, 1, 1, 4, 512, 64, 138),
    ("7.5B", 36, 4096, 32, 4, 1, 1, 4, 512, 128, 142),
    ("18B", 40, 6144, 48, 8, 1, 1, 4, 1024, 256, 135),
    ("39B", 48, 8192, 64, 8, 2, 4, 1, 1536, 512, 138),
    ("76B", 60, 10240, 80, 8, 4, 5, 1, 1792, 1024, 140),
    ("145B", 80, 12288, 96, 8, 8, 5, 1, 2304, 1536, 148),
    ("310B", 96, 16384, 128, 8, 16, 3, 1, 2160, 1920, 155),
    ("530B", 105, 20480, 128, 8, 35, 3, 1, 2520, 2520, 163),
    ("1T", 128, 25600, 160, 8, 64, 2, 1, 3072, 3072, 163),
)


def _sc21(cluster: Hardware) -> list[Run]:
    runs = []
    for name, layers, hidden, heads, tensor, pipeline, chunks, micro, batch, gpus, figure in _SC21:
        config = _config(
            _gpt(layers, hidden, heads, 51200, 2048, tied=True),
            batch,
            micro,
            2048,
            precision="fp16",
            parallel=_layout(tensor, pipeline, chunks, sequence=False),
            recompute={"policy": "full"},
            zero={"stage": 0},
        )
        data = gpus // (tensor * pipeline)
        runs.append(Run("sc21", f"{name} {tensor}/{pipeline}", config, data, cluster, MEGATRON_2021, figure))
    return runs


# name, layers, hidden, heads, pipeline, chunks, micro-batch, global batch, MFU
_SEQUENCE = (
    ("22B", 48, 6144, 64, 1, 1, 4, 4, 41.5),
    ("175B", 96, 12288, 96, 8, 3, 1, 64, 51.4),
    ("530B", 105, 20480, 128, 35, 3, 1, 280, 56.0),
    ("1T", 128, 25600, 160, 64, 1, 1, 512, 56.3),
)


def _sequence_parallel(cluster: Hardware) -> list[Run]:
    runs = []
    for name, layers, hidden, heads, pipeline, chunks, micro, batch, figure in _SEQUENCE:
        config = _config(
            _gpt(layers, hidden, heads, 51200, 2048, tied=True),
            batch,
            micro,
            2048,
            precision="fp16",
            parallel=_layout(8, pipeline, chunks),
            recompute={"policy": "selective"},
            zero={"stage": 0},
        )
        runs.append(Run("sequence-parallel", f"{name} 8/{pipeline}", config, 1, cluster, MEGATRON_2022, figure))
    return runs


def _llama(layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {"layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn, "vocabulary": vocabulary, **more}


_SHARDED = {"stage": 3, "backend": "deepspeed"}


def _torchtitan(cluster: Hardware) -> list[Run]:
    model = _llama(32, 4096, 32, 14336, 128256, kv_heads=8, max_sequence=8192)
    runs = []
    for gpus, compiled, figure in ((8, False, 5762), (8, True, 6667), (128, False, 5605), (128, True, 6514)):
        config = _config(
            model, 2 * gpus, 2, 8192, compile=compiled, zero=_SHARDED, recompute={"policy": "selective"}
        )
        name = f"8B, {gpus} GPUs{', compiled' if compiled else ''}"
        runs.append(Run("torchtitan", name, config, gpus, cluster, TORCHTITAN, figure))
    return runs


# name, layers, hidden, heads, key/value heads, ffn, vocabulary, sequence, local batch, recomputation, tokens/s per GPU
_TITAN_A100 = (
    ("Llama 3 8B, selective", 32, 4096, 32, 8, 14336, 128256, 8192, 1, "selective", 2973),
    ("Llama 3 70B, full", 80, 8192, 64, 8, 28672, 128256, 8192, 1, "full", 331),
    ("Llama 2 13B", 40, 5120, 40, 40, 13824, 32000, 4096, 2, "none", 2162),
    ("Llama 2 13B, selective", 40, 5120, 40, 40, 13824, 32000, 4096, 2, "selective", 1904),
    ("Llama 2 70B, selective", 80, 8192, 64, 8, 28672, 32000, 4096, 1, "selective", 355),
    ("Llama 2 70B, full", 80, 8192, 64, 8, 28672, 32000, 4096, 2, "full", 353),
)


def _torchtitan_a100(cluster: Hardware) -> list[Run]:
    runs = []
    for name, layers, hidden, heads, kv_heads, ffn, vocabulary, sequence, micro, policy, figure in _TITAN_A100:
        model = _llama(layers, hidden, heads, ffn, vocabulary, kv_heads=kv_heads, max_sequence=sequence)
        config = _config(model, 64 * micro, micro, sequence, zero=_SHARDED, recompute={"policy": policy})
        runs.append(Run("torchtitan-a100", name, config, 64, cluster, TORCHTITAN, figure))
    return runs


# name, model, micro-batch, global batch, tokens/s per GPU: of src/scripts/train/OLMo-1B.py and its neighbours
_OLMO = (
    ("1B", _llama(16, 2048, 16, 8192, 100352), 4, 1024, 55000),
    ("7B", _llama(32, 4096, 32, 11008, 100352), 2, 1024, 10000),
    ("Llama 8B", _llama(32, 4096, 32, 14336, 100352, kv_heads=8), 2, 1024, 9500),
    ("13B", _llama(40, 5120, 40, 13824, 100352), 1, 2048, 4600),
)


def _olmo_core(cluster: Hardware) -> list[Run]:
    runs = []
    for name, model, micro, batch, figure in _OLMO:
        olmo = {} if "kv_heads" in model else {"qk_norm": "whole", "norm_placement": "after"}
        config = _config(
            {**model, **olmo}, batch, micro, 4096, compile=True, zero=_SHARDED
        )
        runs.append(Run("olmo-core", name, config, 64, cluster, OLMO_CORE, figure))
    return runs


def runs() -> list[Run]:
    """All published runs that can be predicted, table by table."""
    h100, a100 = hardware.load("h100"), hardware.load("a100-80")
    slowed = h100.gemm.sustained * (500 / 700) ** (1 / 3)
    meta = h100.what_if(["memory.gib=94", "memory.bandwidth=2400", f"gemm.sustained={slowed}"])
    return [
        *_megatron_core(h100),
        *_megatron_core_strong(h100),
        *_sc21(a100),
        *_sequence_parallel(a100),
        *_torchtitan(meta),
        *_torchtitan_a100(a100),
        *_olmo_core(h100),
    ]
