"""Byte-level BPE by tiktoken's engine, for tokenizers of the tokenizers library that it encodes identically.

The two differ in how a piece of text (a "word" of the pre-tokenizer) becomes tokens. tokenizers looks up pairs in a
list of merges; tiktoken merges any two neighbours whose bytes together are a token, lowest id first, and takes a whole
piece that is a token as that token. The results are the same if

1. tokens that are made by merging have ids in the order of the merges, and
2. every token, spelt in bytes and merged by the list, comes out as itself.

For suppose that tiktoken, at the step of token c, finds neighbours l and r with l + r = c which are not on the list.
Neither of their outer edges was ever merged across, so the merges inside their bytes were those that happen to these
bytes standing alone, which by 2. give c at its own step, from a pair of the list. So l and r are that pair. Where the
library takes whole pieces first itself ("ignore_merges"), a token that does not fulfil 2. is allowed if all pairs that
make it up are on the list, in one place. Both conditions are checked for every token; texts for which they say nothing
(those that contain an added token that is no control token, and giant runs of white space, on which tiktoken's
regular expressions overflow) are left to tokenizers. What can be checked on samples only, the regular expressions, is
taken from a short list of known ones, and compared on samples too.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

_REST = r"\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _REST
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           + _REST)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# The same without needless backtracking, as tiktoken's own vocabularies have it.
_FAST_REST = r"\s++$|\s+(?!\S)|\s"
_FAST_LLAMA3 = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
                r"\s++$|\s*[\r\n]|\s+(?!\S)|\s")
_PATTERNS = {
    _GPT2: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|" + _FAST_REST,
    _LLAMA3: _FAST_LLAMA3,
    _QWEN2: _FAST_LLAMA3.replace(r"\p{N}{1,3}+", r"\p{N}"),
}

_LONG = 200_000  # characters; shorter texts cannot hold a run of white space that overflows
_GIANT_RUN = re.compile(r"\s{50000}")
_ADDED = 64  # added tokens that can be looked for without losing what is gained

_SAMPLES = (
    "Hello world, it's John's: I'll say we'VE WON'T they'd 'S 'ſ 're'",
    " leading and trailing  \n", "a  b   c\n\n\nd \n e\t\tf\r\n\r\ng \u00a0\u3000h\u2028i\x85j", "\n", "   ", "x \n",
    "1 12 123 1234 12345 1.5e-10 ½ ² Ⅷ ٣٤٥ 0x7f", "naïve café — “quotes” … ﬁ Å e\u0301 ŉ",
    "日本語のテキスト。全角　空白 한국어 русский हिन्दी",
    "emoji 😀👩‍👩‍👧 \u200b\u200d\ufeff \U0001f1e9\U0001f1ea",
    "def f(x):\n    return {'a': [x ** 2], \"b\": x != 0}  # !?\n\t\tend();;\n",
    "<|endoftext|><s></s> _under_score CamelCase", "\x00\x01\x7f \ufffd \U0010ffff \ue000", "",
)


class FastBPE:
    """A tiktoken encoding with the ids of a tokenizers.Tokenizer; made by `build`."""

    def __init__(self, encoding: tiktoken.Encoding, normalizer: Any, added: list[str]) -> None:
        self._encode, self._normalizer, self._added = encoding.encode_ordinary, normalizer, added

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text, or None where only tokenizers knows them."""
        if len(text) > _LONG and _GIANT_RUN.search(text):
            return None
        if any(token in text for token in self._added):
            return None
        if self._normalizer is not None and not text.isascii():
            text = self._normalizer.normalize_str(text)
            if any(token in text for token in self._added):
                return None
        return self._encode(text)


def build(model: tokenizers.Tokenizer) -> FastBPE | None:
    """The same tokenizer by tiktoken, or None where it is not certain to give the same ids."""
    import tiktoken

    spec = json.loads(model.to_str())
    pattern = _pattern(spec["pre_tokenizer"])
    if pattern is None or spec["normalizer"] not in (None, {"type": "NFC"}):
        return None
    ranks = _ranks(spec)
    added = [token["content"] for token in spec["added_tokens"] if not token["special"]]
    if ranks is None or len(added) > _ADDED:
        return None
    encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    fast = FastBPE(encoding, model.normalizer if spec["normalizer"] else None, added)
    for sample in _SAMPLES:
        ids = fast.encode(sample)
        if ids is not None and ids != model.encode(sample, add_special_tokens=False).ids:
            return None
    return fast


def _pattern(steps: Any) -> str | None:
    """tiktoken's regular expression for a pre-tokenizer that is known."""
    if steps is None:
        return None
    parts = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    if len(parts) == 1:
        return _PATTERNS[_GPT2] if parts[0]["use_regex"] else None
    split = parts[0]
    known = (len(parts) == 2 and split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
             and not parts[1]["use_regex"])
    return _PATTERNS.get(split["pattern"].get("Regex", "")) if known else None


def _ranks(spec: dict[str, Any]) -> dict[bytes, int] | None:
    """Ids by bytes, if the two conditions above hold."""
    bpe = spec["model"]
    if (bpe["type"] != "BPE" or bpe["dropout"] or bpe["continuing_subword_prefix"] or bpe["end_of_word_suffix"]
            or bpe["byte_fallback"]):
        return None
    letters, vocabulary = _letters(), bpe["vocab"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in bpe["merges"])
    merges = [(left, right) for left, right in pairs]
    ids = [vocabulary[left + right] for left, right in merges]
    if not letters.keys() <= vocabulary.keys() or any(a > b for a, b in zip(ids, ids[1:], strict=False)):
        return None
    if bpe["ignore_merges"]:
        added = {token["content"] for token in spec["added_tokens"]}
        tokens = [token for token in vocabulary if len(token) > 1 and token not in added]
    else:
        tokens = list(dict.fromkeys(left + right for left, right in merges))
    if not _come_out(tokens, vocabulary, merges, bool(bpe["ignore_merges"])):
        return None
    try:
        return {bytes(letters[c] for c in token): vocabulary[token] for token in [*letters, *tokens]}
    except KeyError:  # a token that is not spelt in bytes
        return None


def _come_out(tokens: list[str], vocabulary: dict[str, int], merges: list[tuple[str, str]], whole_first: bool) -> bool:
    """Condition 2 for every token."""
    from tokenizers import models

    listed = set(merges)
    bare = models.BPE(vocabulary, merges, ignore_merges=False)
    for token in tokens:
        if len(bare.tokenize(token)) != 1:
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            unlisted = [(a, b) for a, b in pairs if a in vocabulary and b in vocabulary and (a, b) not in listed]
            if not whole_first or unlisted:
                return False
    return True


def _letters() -> dict[str, int]:
    """GPT-2's printable character of every byte: most stand for themselves, the others for 256 and up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
