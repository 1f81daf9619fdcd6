"""Exported tokenizers load in transformers and encode as the original does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapt.config import ModelConfig
from megapt.convert.tokenizer import write_tokenizer
from megapt.data import tokenizers
from megapt.errors import UserError

MODEL = ModelConfig(layers=1, hidden=8, heads=2, ffn=8, vocabulary=400, max_sequence=128)
LINES = [
    f"The {n} quick brown foxes jumped over {n * 37} lazy dogs, naïvely; again and again!" for n in range(200)
]
TEXTS = ["The quick fox", " two  spaces ", "new\nline\ttab", "unseen: Ünïcödé 漢字 😀", "12 + 34 = 46"]


def check(source: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    original = tokenizers.load(source)
    eos = write_tokenizer(source, folder, MODEL)
    assert eos == original.eod
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = original.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == original.decode(ids) == text
    assert theirs.eos_token_id == eos and theirs.model_max_length == 128
    assert theirs.encode(theirs.eos_token, add_special_tokens=False) == [eos]


def test_byte_level_bpe(tmp_path: Path) -> None:
    source = tmp_path / "source" / "tokenizer.json"
    tokenizers.train_bpe(LINES, 300, source)
    (tmp_path / "out").mkdir()
    check(str(source), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == source.read_bytes()
    # What stands beside the tokenizer goes along.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "model_max_length": 77,
    }
    source.with_name("tokenizer_config.json").write_text(json.dumps(config))
    write_tokenizer(str(source.parent), tmp_path / "out", MODEL)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == config


def test_bytes(tmp_path: Path) -> None:
    check("bytes", tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source.model"
    tokenizers.train_sentencepiece(LINES, 300, source, kind=kind)  # type: ignore[arg-type]
    check(str(source), tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == source.read_bytes()


def test_sentencepiece_with_normalisation_and_a_dummy_prefix(tmp_path: Path) -> None:
    """Llama's settings, and the library's own defaults."""
    import sentencepiece

    own = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    for kind in ("bpe", "unigram"):
        source = tmp_path / f"{kind}.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_prefix=str(source.with_suffix("")), vocab_size=350,
            model_type=kind, byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
            **(own if kind == "bpe" else {}),
        )  # fmt: skip
        (tmp_path / kind).mkdir()
        assert write_tokenizer(str(source), tmp_path / kind, MODEL) == 2


def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    source = tmp_path / "words.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(source.with_suffix("")), vocab_size=50,
        model_type="word", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="of words or characters; legal: unigram, bpe"):
        write_tokenizer(str(source), tmp_path, MODEL)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small = MODEL.model_copy(update={"vocabulary": 256})
    with pytest.raises(UserError, match="bytes has 257 tokens, more than model.vocabulary = 256"):
        write_tokenizer("bytes", tmp_path, small)
