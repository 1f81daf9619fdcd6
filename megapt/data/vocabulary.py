"""What objectives must know of a tokenizer's vocabulary: ids of named tokens, special ones, and where words begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megapt.data.tokenizers import VOCABULARY as GPT2_VOCABULARY
from megapt.data.tokenizers import Tokenizer
from megapt.errors import UserError

Bools = npt.NDArray[np.bool_]

_WHITE = " \t\n\r\v\f"
# Byte-level BPE writes white space as the characters 256 further on; SentencePiece writes a space as U+2581, and what
# it has no piece for in bytes.
_SPACES = frozenset([*_WHITE, *(chr(256 + ord(c)) for c in _WHITE), "\u2581"])
_SPACE_BYTES = frozenset(f"<0x{ord(c):02X}>" for c in _WHITE)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens as they are written in its own files.

    name: of the tokenizer, for messages; size: ids are below it; ids: by token; special: ids of tokens that are not
    text; continues: whether a token can only go on a word (WordPiece), where the tokenizer marks that.
    """

    name: str
    size: int
    ids: dict[str, int]
    special: frozenset[int]
    continues: Callable[[str], bool] | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of a loaded tokenizer."""
        end = frozenset(() if tokenizer.eod is None else [tokenizer.eod])
        if tokenizer.kind == "bytes":
            ids = {chr(i): i for i in range(256)}
            return cls("bytes", tokenizer.vocabulary, ids, end)
        if tokenizer.kind == "sentencepiece":
            ids, special = _sentencepiece(tokenizer.path)
            return cls(tokenizer.path, tokenizer.vocabulary, ids, special | end)
        if Path(tokenizer.path).name == GPT2_VOCABULARY:
            ids = json.loads(Path(tokenizer.path).read_bytes())
            return cls(tokenizer.path, tokenizer.vocabulary, ids, end)
        from tokenizers import Tokenizer as Model
        from tokenizers.models import WordPiece

        library = Model.from_file(tokenizer.path)
        special = frozenset(i for i, token in library.get_added_tokens_decoder().items() if token.special)
        mark = library.model.continuing_subword_prefix if isinstance(library.model, WordPiece) else None
        continues = None if mark is None else lambda piece: piece.startswith(mark)
        ids = library.get_vocab(with_added_tokens=True)
        return cls(tokenizer.path, tokenizer.vocabulary, ids, special | end, continues)

    def id(self, token: str, key: str) -> int:
        """The id of a token by its exact name. UserError, naming the config's `key`, if there is none."""
        found = self.ids.get(token)
        if found is None:
            special = sorted(token for token, i in self.ids.items() if i in self.special)
            raise UserError(
                f"{key}: the tokenizer {self.name} has no token {token!r}; its special tokens are "
                f"{', '.join(special[:20]) or 'none'}{', ...' if len(special) > 20 else ''}. Name one of its tokens, "
                "or add it to the tokenizer"
            )
        return found

    def word_starts(self) -> Bools:
        """[size]: whether a token begins a word, being white space or beginning with it, or marked so."""
        starts = np.zeros(self.size, bool)
        for piece, i in self.ids.items():
            if self.continues is not None:
                starts[i] = not self.continues(piece)
            else:
                starts[i] = piece[:1] in _SPACES or piece in _SPACE_BYTES
        return starts


def _sentencepiece(path: str) -> tuple[dict[str, int], frozenset[int]]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    size = model.get_piece_size()
    special = frozenset(i for i in range(size) if model.is_control(i) or model.is_unknown(i) or model.is_unused(i))
    return {model.id_to_piece(i): i for i in range(size)}, special
