"""Text from a checkpoint, in any layout: one process, or the ranks of a pipeline that pass the tokens around."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapt import checkpoint as checkpoints
from megapt.config import Config, from_tree
from megapt.data.tokenizers import load as load_tokenizer
from megapt.distributed import join, leave
from megapt.engine import Engine
from megapt.errors import UserError
from megapt.parameters import derive_key, philox
from megapt.zero.base import Fragment


def generate(
    checkpoint: str | Path,
    prompts: Sequence[str],
    tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    parallel: dict[str, Any] | None = None,
) -> list[str]:
    """Continue each prompt by up to `tokens` tokens and return prompt and continuation, on every rank.

    Started as several ranks (torchrun), `parallel` says how they share the model, e.g. {"tensor": 2, "pipeline": 2};
    the checkpoint's own layout does not matter. Draws depend on (seed, prompt number, position) alone, so that the
    text is the same in any layout up to rounding. Raises UserError for a checkpoint or tokenizer that is not there.
    """
    environment, device = join()
    config = inference_config(checkpoint, environment.world, parallel)
    if config.objective == "masked_lm":
        raise UserError(
            f"{checkpoint} was trained to fill in masked tokens (objective = masked_lm), not to go on with a text"
        )
    named = tokenizer or config.data.tokenizer
    if named is None:
        raise UserError(f"the config of {checkpoint} names no tokenizer; name one with --tokenizer")
    text = load_tokenizer(named)
    engine = load_engine(checkpoint, config, environment.world, device)
    results = []
    for number, prompt in enumerate(prompts):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {number + 1} is not valid UTF-8: {prompt!r}") from None
        ids = text.encode(prompt) or [text.eod or 0]
        if max(ids) >= config.model.vocabulary:
            raise UserError(
                f"the tokenizer {named} gives token {max(ids)} for the prompt {prompt!r}, but the model in {checkpoint}"
                f" knows {config.model.vocabulary} tokens; name the tokenizer that it was trained with"
            )
        made = continue_tokens(engine, ids, tokens, temperature, top_k, derive_key(seed, f"prompt {number}"), text.eod)
        results.append(text.decode(made))
    leave()
    return results


def inference_config(checkpoint: str | Path, world: int = 1, parallel: dict[str, Any] | None = None) -> Config:
    """The model, data and sequence of a checkpoint's config, in fp32 (fp64 if trained so) and in the layout asked for.

    How it was trained (ZeRO, optimizer, batch, schedule) does not limit where it can be read, and is left out.
    """
    trained = checkpoints.read_index(checkpoint).meta["config"]
    tree = {
        "objective": trained["objective"],
        "precision": "fp64" if trained["precision"] == "fp64" else "fp32",
        "model": trained["model"],
        "parallel": parallel or {},
        "data": trained["data"],
        "batch": {"sequence": trained["batch"]["sequence"], "samples": world},
        "train": {"steps": 1},  # a config must have a length; nothing is trained
    }
    return from_tree(tree).config


def load_engine(checkpoint: str | Path, config: Config, world: int, device: torch.device) -> Engine:
    """The model of a checkpoint, without an optimizer. Collective."""
    engine = Engine(config, world, device, optimize=False)
    fragments = [Fragment(p, 0, p.numel(), {"weight": p.data.view(-1)}) for p in engine.parameters]
    checkpoints.load(checkpoint, fragments, engine.mesh, config.model, weights_only=True)
    return engine


def continue_tokens(
    engine: Engine,
    ids: Sequence[int],
    count: int,
    temperature: float,
    top_k: int,
    key: tuple[int, int],
    end: int | None = None,
) -> list[int]:
    """`ids` and up to `count` more, drawn from the `top_k` likeliest at each position (the likeliest at temperature
    0); stops at `end` and at the longest sequence the model knows. The whole text is read anew for every token."""
    device, window = engine.mesh.device, engine.config.model.max_sequence
    made = list(ids)[-window:]
    dropped = len(ids) - len(made)
    unit = engine.mesh.tp.size
    for _ in range(count):
        if len(made) >= window:
            break
        # Sequence parallelism wants whole shares of tokens; what follows the last position cannot influence it.
        padding = -len(made) % unit
        row = torch.tensor([made + [0] * padding], dtype=torch.long, device=device)
        logits = engine.pipeline.logits(row)
        choice = torch.zeros((), dtype=torch.long, device=device)
        if logits is not None:
            choice = _draw(logits[0, len(made) - 1].double(), temperature, top_k, key, len(made) + dropped)
        if engine.mesh.pp.size > 1:
            dist.broadcast(choice, engine.mesh.pp.global_rank(engine.pipeline.last_rank), group=engine.mesh.pp.group)
        made.append(int(choice))
        if made[-1] == end:
            break
    return list(ids)[:dropped] + made


def _draw(logits: Tensor, temperature: float, top_k: int, key: tuple[int, int], position: int) -> Tensor:
    """One token id from logits [vocabulary], by a number that depends on the key and the position alone."""
    if temperature == 0:
        return logits.argmax()
    values, ids = logits.topk(min(top_k, logits.numel()))
    cumulative = (values / temperature).softmax(0).cumsum(0)
    word = philox(torch.tensor([position]), key)[0]
    uniform = ((word.double() + 0.5) * 2.0**-32).to(logits.device)
    return ids[torch.searchsorted(cumulative, uniform * cumulative[-1]).clamp_max(len(ids) - 1)][0]


def parse_parallel(options: Sequence[str]) -> dict[str, Any]:
    """`tensor=2 pipeline=2` as the parallel section of a config."""
    section: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in ("tensor", "pipeline") or not (value.isascii() and value.isdigit()):
            raise UserError(f"{option!r}: give the layout as tensor=N and pipeline=N")
        section[name] = int(value)
    return section
