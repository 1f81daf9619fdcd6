"""The keys of config.json: how each is read into fields of ModelConfig, and written from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from megapt.config import ModelConfig

NEEDED = object()  # in place of a default: the key must be there


class Kind(NamedTuple):
    """Values that a key may have, in words, and as a function that gives the value to use (ValueError: not one)."""

    legal: str
    accept: Callable[[Any], Any]


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError
    return float(value)


def _rate(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError
    return float(value)


def _layers(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _numbers(value: Any) -> list[float]:
    if not isinstance(value, list) or not value:
        raise ValueError
    return [_number(item) for item in value]


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError
    return value


def _tree(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


COUNT = Kind("a positive whole number", _count)
LAYERS = Kind("a whole number of layers", _layers)
NUMBER = Kind("a positive number", _number)
RATE = Kind("a number from 0 to below 1", _rate)
FLAG = Kind("true, false", _flag)
NUMBERS = Kind("a list of positive numbers", _numbers)
NAMES = Kind("a list of names", _names)
TREE = Kind("an object", _tree)


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.legal}, null", lambda value: None if value is None else kind.accept(value))


def one_of(*values: Any) -> Kind:
    def accept(value: Any) -> Any:
        for legal in values:
            if value == legal and type(value) is type(legal):
                return value
        raise ValueError

    return Kind(", ".join("null" if v is None else repr(v) for v in values), accept)


class Reading:
    """A config.json (or an object in it) being read: the keys taken, every problem, and what is left out on purpose.

    at: in front of the keys in messages.
    """

    def __init__(self, tree: dict[str, Any], at: str = "") -> None:
        self.tree, self.at = tree, at
        self.taken: set[str] = set()
        self.problems: list[str] = []
        self.notes: list[str] = []

    def take(self, key: str, kind: Kind, default: Any = NEEDED) -> Any:
        """The value of a key, or its default where it is missing. A problem where it is of no legal kind: then None."""
        self.taken.add(key)
        if key not in self.tree:
            if default is NEEDED:
                self.problems.append(f"{self.at}{key} is missing; legal: {kind.legal}")
                return None
            return default
        try:
            return kind.accept(self.tree[key])
        except ValueError:
            self.refuse(key, self.tree[key], kind.legal)
            return None

    def refuse(self, key: str, value: Any, legal: str) -> None:
        self.problems.append(f"{self.at}{key} is {value!r}; legal: {legal}")


class Part(Protocol):
    """What some keys and some fields say to each other. `write` may leave out what the family cannot say: it then does
    not read back as the same model, which refuses it."""

    def read(self, reading: Reading) -> dict[str, Any]: ...

    def write(self, model: ModelConfig) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Key:
    """A key that is a field. default: what transformers takes where the key is missing; of: the attribute of
    ModelConfig that is written, where the field itself may be None."""

    theirs: str
    ours: str
    kind: Kind
    default: Any = NEEDED
    of: str | None = None

    def read(self, reading: Reading) -> dict[str, Any]:
        return {self.ours: reading.take(self.theirs, self.kind, self.default)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.theirs: getattr(model, self.of or self.ours)}


@dataclass(frozen=True)
class Only:
    """A key with one value that can be computed, which is also what a missing one means.

    also: other values that mean the same; written: whether transformers knows the key.
    """

    theirs: str
    value: Any
    also: tuple[Any, ...] = ()
    written: bool = True

    def read(self, reading: Reading) -> dict[str, Any]:
        reading.take(self.theirs, one_of(self.value, *self.also), self.value)
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.value} if self.written else {}


@dataclass(frozen=True)
class Dropout:
    """Rates of dropout, which changes training only; there is none here."""

    names: tuple[str, ...]
    default: float = 0.0

    def read(self, reading: Reading) -> dict[str, Any]:
        for name in self.names:
            rate = reading.take(name, RATE, self.default)
            if rate:
                reading.notes.append(f"{name} is {rate:g}: training goes on without dropout")
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return dict.fromkeys(self.names, 0.0)


# gelu_new and gelu_fast are the tanh approximation with its constant rounded at the tenth digit or not at all.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


@dataclass(frozen=True)
class Activation:
    """tanh: the name that is written for GELU's tanh approximation."""

    theirs: str = "hidden_act"
    default: str = "silu"
    tanh: str = "gelu_pytorch_tanh"

    def read(self, reading: Reading) -> dict[str, Any]:
        return {"activation": _ACTIVATIONS.get(reading.take(self.theirs, one_of(*_ACTIVATIONS), self.default))}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.tanh if model.activation == "gelu_tanh" else model.activation}


# Keys that every family reads alike.
COMMON: tuple[Part, ...] = (
    Key("vocab_size", "vocabulary", COUNT),
    Key("initializer_range", "init_std", NUMBER, 0.02),
    Only("is_encoder_decoder", False, written=False),
    Only("pruned_heads", {}, (None,), written=False),
    Only("cross_attention_hidden_size", None, written=False),
)

# Keys that change nothing of what is computed: how files were written, what generation starts and ends with, what
# other heads than the language model's would do.
SILENT = frozenset(
    "transformers_version _name_or_path name_or_path _commit_hash torch_dtype dtype use_cache use_bfloat16 "
    "torchscript tf_legacy_loss return_dict output_attentions output_hidden_states output_scores "
    "return_dict_in_generate chunk_size_feed_forward tie_encoder_decoder is_decoder gradient_checkpointing "
    "_attn_implementation _attn_implementation_autoset attn_implementation bos_token_id eos_token_id pad_token_id "
    "sep_token_id cls_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens "
    "begin_suppress_tokens bad_words_ids max_length min_length do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values exponential_decay_length_penalty "
    "finetuning_task id2label label2id num_labels tokenizer_class prefix task_specific_params problem_type "
    "classifier_dropout".split()
)
