"""One small interface over Hugging Face `tokenizer.json`, GPT-2's vocab.json with merges.txt, SentencePiece `.model`
and plain bytes; and training.

Text is always text: a control token written out in it, such as "<|endoftext|>", is encoded like any other
words, so a document cannot end itself. Nothing is added before or after, and nothing is cut. `decode` leaves
control tokens out.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from megapt.errors import UserError
from megapt.files import StrPath, write_whole

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

    from megapt.data.fast_bpe import FastBPE

EOD = "<|endoftext|>"

# Names of the end-of-document token in published tokenizers; the first that a tokenizer has is taken where no
# tokenizer_config.json beside it says which one it is.
KNOWN_EOD = (EOD, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>")

VOCABULARY, MERGES = "vocab.json", "merges.txt"  # of GPT-2

_LINE = 4096  # bytes: SentencePiece's trainer drops longer sentences without a word


class Tokenizer(ABC):
    """`vocabulary`: ids are below it. `eod`: the id that ends a document, or None. `path`: where it was loaded from
    ("bytes" for plain bytes). `kind`: "huggingface", "sentencepiece" or "bytes". `engine`: the library that
    encodes."""

    kind: Literal["huggingface", "sentencepiece", "bytes"]
    engine: str
    path: str
    vocabulary: int
    eod: int | None

    def accelerate(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Prepare for many texts: worth a moment if millions of characters follow. The ids stay the same."""

    def fingerprint(self) -> str:
        """A hash of the tokenizer's files, SHA-256 in hexadecimal; of its name for plain bytes."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in self._files()) or self.path.encode()).hexdigest()

    def _files(self) -> list[Path]:
        return [Path(self.path)]

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of several texts."""

    def encode_flat(self, texts: list[str], dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The ids of several texts end to end [tokens], of type `dtype`, and the number of each [texts]."""
        rows = self.encode_batch(texts)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(itertools.chain.from_iterable(rows), dtype, int(lengths.sum())), lengths

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as ids 0 to 255, and 256 for the end of a document."""

    kind, engine = "bytes", "bytes"

    def __init__(self) -> None:
        self.path, self.vocabulary, self.eod = "bytes", 257, 256

    def _files(self) -> list[Path]:
        return []

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_flat(self, texts: list[str], dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        data = [text.encode() for text in texts]
        return np.frombuffer(b"".join(data), np.uint8).astype(dtype), np.fromiter(map(len, data), np.int64, len(data))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the tokenizers library, or GPT-2's vocab.json (with the merges.txt beside it)."""

    kind, engine = "huggingface", "tokenizers"

    def __init__(self, path: str, model: tokenizers.Tokenizer, eod: str | None) -> None:
        self.path, self._model = path, model
        self._fast: FastBPE | None = None
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        ids = model.get_vocab(with_added_tokens=True).values()
        self.vocabulary = max(ids, default=-1) + 1  # not the count: published vocabularies have holes
        self.eod = None if eod is None else model.token_to_id(eod)

    def accelerate(self) -> None:
        """Encode by tiktoken, several times as fast, where it is certain to give the same ids."""
        from megapt.data import fast_bpe

        self._fast = fast_bpe.build(self._model)
        self.engine = "tokenizers" if self._fast is None else "tiktoken"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._fast is None:
            return self._encode(texts)
        rows = [self._fast.encode(text) for text in texts]
        left = [i for i, row in enumerate(rows) if row is None]
        for i, row in zip(left, self._encode([texts[i] for i in left]), strict=True):
            rows[i] = row
        return rows  # type: ignore[return-value]

    def save(self, path: StrPath) -> None:
        """Write the tokenizer as a tokenizer.json."""
        write_whole(path, self._model.to_str(pretty=True).encode())

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def _files(self) -> list[Path]:
        path = Path(self.path)
        return [path, path.with_name(MERGES)] if path.name == VOCABULARY else [path]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids), skip_special_tokens=True))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    kind, engine = "sentencepiece", "sentencepiece"

    def __init__(self, path: str, model: sentencepiece.SentencePieceProcessor, eod: int | None) -> None:
        self.path, self._model = path, model
        self.vocabulary, self.eod = model.get_piece_size(), eod
        try:  # ids as arrays are faster, and new in the library
            model.encode(["a"], out_type="numpy")
            self._arrays = True
        except (TypeError, ValueError, RuntimeError):
            self._arrays = False

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(texts, out_type=int, num_threads=1)
        return ids

    def encode_flat(self, texts: list[str], dtype: npt.DTypeLike) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        if not texts or not self._arrays:
            return super().encode_flat(texts, dtype)
        rows = self._model.encode(texts, out_type="numpy", num_threads=1)
        return np.concatenate(rows, dtype=dtype, casting="unsafe"), np.fromiter(map(len, rows), np.int64, len(rows))

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i < self.vocabulary]  # a model pads its vocabulary
        return str(self._model.decode(known))


def load(path: StrPath, eod: str | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, a SentencePiece `.model`, GPT-2's `vocab.json` with the merges.txt beside
    it, a folder that holds one of these (looked for in this order), or the word "bytes".

    `eod` names the end-of-document token. Without it, a tokenizer.json's is the `eos_token` of the
    tokenizer_config.json beside it, or else the first of KNOWN_EOD that it has; a SentencePiece model knows
    its own. UserError if the file is missing or damaged, or lacks the token named.
    """
    name = os.fspath(path)
    if name == "bytes":
        if eod is not None:
            raise UserError(f'the bytes tokenizer has its own end-of-document token and cannot take "{eod}"')
        return ByteTokenizer()
    file = Path(name)
    if file.is_dir():
        found = [file / leaf for leaf in ("tokenizer.json", "tokenizer.model", VOCABULARY) if (file / leaf).is_file()]
        if name == "" or not found:
            raise UserError(f"{name or repr(name)} holds neither a tokenizer.json nor a tokenizer.model nor a "
                            "vocab.json (with merges.txt)")
        file = found[0]
    if not file.is_file():
        raise UserError(f'tokenizer {file} does not exist; give a tokenizer.json, a SentencePiece .model '
                        'or "bytes"')
    if file.name == VOCABULARY and not file.with_name(MERGES).is_file():
        raise UserError(f"{file} needs the {MERGES} beside it")
    if file.suffix == ".json":
        return _load_huggingface(file, eod)
    if file.suffix == ".model":
        return _load_sentencepiece(file, eod)
    raise UserError(f'tokenizer {file} has an unknown ending "{file.suffix}"; .json, .model or the word '
                    '"bytes" is needed')


def train_bpe(texts: Iterable[str], vocabulary: int, output: StrPath, eod: str = EOD,
              special: Sequence[str] = (), progress: bool = False) -> Tokenizer:
    """Train byte-level BPE (Radford et al. 2019, "Language models are unsupervised multitask learners") and
    write it to `output`, a .json file; the same texts give the same file.

    Id 0 is `eod`, the `special` tokens follow (a mask, say: text never yields them), then the 256 bytes. A text too
    small for all merges gives a smaller `vocabulary` than asked for. UserError if `vocabulary` has no room for these.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    _check_output(output, ".json")
    control = _control(eod, special)
    if vocabulary < 256 + len(control):
        raise UserError(f"a byte-level vocabulary of {vocabulary} is too small; 256 bytes and {', '.join(control)} "
                        f"take {256 + len(control)}")
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=control, show_progress=progress,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(iter(texts), trainer=trainer)
    write_whole(output, model.to_str(pretty=True).encode())
    return load(output, eod)


def train_sentencepiece(texts: Iterable[str], vocabulary: int, output: StrPath,
                        kind: Literal["unigram", "bpe"] = "unigram", eod: str = EOD, special: Sequence[str] = (),
                        character_coverage: float = 0.9995, progress: bool = False) -> Tokenizer:
    """Train a SentencePiece model (Kudo & Richardson 2018) that gives back every text exactly, and write it
    to `output`, a .model file; the same texts give the same file.

    Spaces and letters are left as they are, and digits stand alone. The vocabulary holds the most frequent
    characters that make up `character_coverage` of the texts; the others are spelt in bytes. Id 0 is the
    unknown token, 1 is `eod`, then come the `special` tokens and the bytes. UserError if the texts do not yield
    `vocabulary` pieces, or need more for their characters alone.
    """
    import sentencepiece

    _check_output(output, ".model")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts), model_writer=model, model_type=kind, vocab_size=vocabulary,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, max_sentence_length=_LINE,
            bos_id=-1, pad_id=-1, unk_id=0, eos_id=1, eos_piece=eod, num_threads=16,
            control_symbols=_control(eod, special)[1:],
            character_coverage=character_coverage, minloglevel=0 if progress else 2)
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise UserError(f"SentencePiece cannot train a {kind} vocabulary of {vocabulary} from these texts: "
                        f"{reason}") from error
    write_whole(output, model.getvalue())
    return load(output)


def _control(eod: str, special: Sequence[str]) -> list[str]:
    control = [eod, *special]
    if len(set(control)) < len(control) or not all(control):
        raise UserError(f"special tokens must be different and not empty, and {eod} is there already: {control[1:]}")
    return control


def _load_huggingface(file: Path, eod: str | None) -> Tokenizer:
    from tokenizers import Tokenizer as Model

    try:
        model = _load_gpt2(file) if file.name == VOCABULARY else Model.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file} is not a {file.name if file.name == VOCABULARY else 'tokenizer.json'} that the "
                        f"tokenizers library reads: {error}") from error
    if eod is not None and model.token_to_id(eod) is None:
        raise UserError(f'tokenizer {file} has no token "{eod}" to end a document with')
    candidates = [eod] if eod is not None else [*_configured_eod(file), *KNOWN_EOD]
    present = [token for token in candidates if model.token_to_id(token) is not None]
    return HuggingFaceTokenizer(str(file), model, present[0] if present else None)


def _load_gpt2(file: Path) -> tokenizers.Tokenizer:
    """The files GPT-2 was published in: ids by token, and merges by rank."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers

    model = Model(models.BPE.from_file(str(file), str(file.with_name(MERGES))))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([token for token in KNOWN_EOD if model.token_to_id(token) is not None])
    return model


def _configured_eod(file: Path) -> list[str]:
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return []
    try:
        token = json.loads(config.read_bytes()).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} is not a JSON object: {error}") from error
    if isinstance(token, dict):
        token = token.get("content")
    return [token] if isinstance(token, str) else []


def _load_sentencepiece(file: Path, eod: str | None) -> Tokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError as error:
        raise UserError(f"{file} is not a SentencePiece model: {error}") from error
    if eod is None:
        own = model.eos_id()
        return SentencePieceTokenizer(str(file), model, own if own >= 0 else None)
    piece = model.piece_to_id(eod)
    if model.id_to_piece(piece) != eod:
        raise UserError(f'tokenizer {file} has no piece "{eod}" to end a document with')
    return SentencePieceTokenizer(str(file), model, piece)


def _check_output(output: StrPath, ending: str) -> None:
    if Path(output).suffix != ending:
        raise UserError(f"the tokenizer's file must end in {ending}, not {Path(output).name}")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, and long ones in pieces: the trainer takes a sentence at a time and drops those above _LINE
    bytes."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LINE // 4):  # at most 4 bytes to a character
                yield line[start:start + _LINE // 4]
