"""A tokenizer's files in the form that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapt.config import ModelConfig
from megapt.data import tokenizers as own
from megapt.errors import UserError
from megapt.files import write_whole

if TYPE_CHECKING:
    import tokenizers

GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# Files that say more about a tokenizer and what is generated with it, taken along where they stand beside it.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", GENERATION)
# The tokenizer itself, best first.
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")

# Texts on which a rebuilt tokenizer must agree with the original.
_PROBES = (
    "Hello world, this is a test.",
    " leading, trailing  and   repeated    spaces ",
    "line one\nline two\r\n\n\ttabbed",
    "123456789 3.14159 1e-05 0x7f",
    "naïve café — “quotes” … ŒŸ ﬁ ① ½ Å",
    "日本語のテキスト 한국어 русский العربية ελληνικά",
    "emoji 😀👩‍👩‍👧 and \u200b zero width",
    "def f(x):\n    return {'a': [x ** 2], \"b\": x != 0}\n",
    "▁ a piece's own sign",
    "",
)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file in a folder of Hugging Face's layout, None if there is none."""
    found = (folder / name for name in _TOKENIZERS)
    return next((path for path in found if path.is_file() and _complete(path)), None)


def _complete(path: Path) -> bool:
    return path.name != own.VOCABULARY or (path.parent / own.MERGES).is_file()


def copy_tokenizer(source: Path, folder: Path) -> Path | None:
    """Copy what a folder of Hugging Face's layout holds of a tokenizer; returns the copy of the file to name."""
    for name in (*_TOKENIZERS, own.MERGES, *_BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return find_tokenizer(folder)


def write_tokenizer(path: str, folder: Path, model: ModelConfig) -> int | None:
    """Write the tokenizer at `path` into `folder`; returns the id that ends a document, None if it has none.

    A SentencePiece model is rebuilt as a tokenizer.json and compared on sample texts; UserError if the two do
    not agree, or if the tokenizer has more tokens than the model.
    """
    tokenizer = own.load(path)
    if tokenizer.vocabulary > model.vocabulary:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocabulary} tokens, more than model.vocabulary = "
            f"{model.vocabulary}: it is not this model's"
        )
    if tokenizer.kind == "huggingface":
        assert isinstance(tokenizer, own.HuggingFaceTokenizer)
        source = Path(tokenizer.path)
        if source.name == "vocab.json":  # GPT-2's two files
            tokenizer.save(folder / "tokenizer.json")
        else:
            shutil.copyfile(source, folder / "tokenizer.json")
        for name in _BESIDE:
            if (source.parent / name).is_file():
                shutil.copyfile(source.parent / name, folder / name)
        backend = _library().from_file(str(folder / "tokenizer.json"))
    else:
        backend = (
            _of_bytes(tokenizer) if tokenizer.kind == "bytes" else _of_sentencepiece(Path(tokenizer.path))
        )
        _compare(tokenizer, backend)
        write_whole(folder / "tokenizer.json", backend.to_str().encode())
        if tokenizer.kind == "sentencepiece":
            shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    if not (folder / "tokenizer_config.json").exists():
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.max_sequence,
            "clean_up_tokenization_spaces": False,
        }
        if tokenizer.eod is not None:
            config["eos_token"] = backend.id_to_token(tokenizer.eod)
        write_whole(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return tokenizer.eod


def _library() -> type[tokenizers.Tokenizer]:
    from tokenizers import Tokenizer

    return Tokenizer


def _compare(original: own.Tokenizer, rebuilt: tokenizers.Tokenizer) -> None:
    for text in _PROBES:
        expected, found = original.encode(text), rebuilt.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise UserError(
                f"tokenizer {original.path} cannot be written for transformers: it encodes {text!r} as "
                f"{expected}, the rebuilt one as {found}; export without the tokenizer"
            )


def _of_bytes(tokenizer: own.Tokenizer) -> tokenizers.Tokenizer:
    """Byte-level BPE without merges, each byte's id being its value."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    # GPT-2's printable stand-ins: a byte's own character where it is visible, else the next one from 256 on.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    vocabulary = {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    backend = _library()(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(own.EOD, special=True, normalized=False)])
    assert backend.token_to_id(own.EOD) == tokenizer.eod
    return backend


def _of_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """The same pieces, scores and normalisation in the tokenizers library's terms.

    transformers' own LlamaTokenizer reads any .model as BPE with Llama's normalisation, and so encodes other
    models wrongly without a word.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema
    from tokenizers import AddedToken, decoders, models, normalizers

    proto = schema.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        model: Any = models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        usable = {p.piece: p.score for p in proto.pieces if p.type in (p.NORMAL, p.UNUSED)}
        model = models.BPE(
            vocab={piece: at for at, (piece, _) in enumerate(pieces)},
            merges=_merges(usable),
            unk_token=pieces[trainer.unk_id][0],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise UserError(f"{path} is a SentencePiece model of words or characters; legal: unigram, bpe")
    backend = _library()(model)
    steps: list[Any] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = [p.piece for p in proto.pieces if p.type == p.CONTROL]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return backend


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All splits of pieces into two, best score first: SentencePiece merges by the score of the result."""
    found = [
        (score, piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda merge: -merge[0])]
