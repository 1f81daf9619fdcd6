from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megapt.data.documents import read_texts
from megapt.data.tokenizers import EOD, load, train_bpe, train_sentencepiece
from megapt.errors import UserError

WORDS = ("cat dog mat house river stone winter walking sleeping running between together number morning "
         "evening window garden little silver under over never always because").split()
TEXTS = [f"the {WORDS[i % 23]} {WORDS[i * 7 % 23]} sat,\n\t{WORDS[i * 5 % 22]} {i % 7} {WORDS[i * 3 % 20]}.\n"
         for i in range(90)]
HARD = ["", " ", "the cat", " leading and  double ", "tabs\t\tand\n\n\nlines\r\n", "naïve 漢字 🙂 ﬁ ½ \u00a0",
        f"a {EOD} b", "</s><s>", "0123456789", "\ufffd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_bpe(TEXTS, 320, folder / "tokenizer.json")
    train_sentencepiece(TEXTS, 312, folder / "unigram.model")
    train_sentencepiece(TEXTS, 312, folder / "bpe.model", kind="bpe")
    return folder


KINDS = {"tokenizer.json": ("huggingface", 0), "unigram.model": ("sentencepiece", 1),
         "bpe.model": ("sentencepiece", 1)}


@pytest.mark.parametrize("leaf", [*KINDS, "bytes"])
def test_round_trip(folder: Path, leaf: str) -> None:
    tokenizer = load("bytes" if leaf == "bytes" else folder / leaf)
    assert (tokenizer.kind, tokenizer.eod) == KINDS.get(leaf, ("bytes", 256))
    assert tokenizer.path == ("bytes" if leaf == "bytes" else str(folder / leaf))
    rows = tokenizer.encode_batch(HARD)
    for text, row in zip(HARD, rows, strict=True):
        assert tokenizer.encode(text) == row
        assert tokenizer.decode(row) == text
        assert tokenizer.eod not in row  # not even where the text spells it
        assert all(0 <= i < tokenizer.vocabulary for i in row)
    assert tokenizer.decode([tokenizer.eod, *tokenizer.encode("x"), tokenizer.eod]) == "x"
    assert tokenizer.decode([*tokenizer.encode("x"), 100_000]) == "x"  # ids of a padded vocabulary


def test_training_pays(folder: Path) -> None:
    for leaf in KINDS:
        text = "".join(TEXTS)
        tokenizer = load(folder / leaf)
        assert len(tokenizer.encode(text)) < 0.7 * len(text)
        assert tokenizer.vocabulary in (320, 312)
    assert load("bytes").vocabulary == 257
    assert load("bytes").encode("é") == [0xC3, 0xA9]


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    train_bpe(iter(TEXTS), 320, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    for kind in ("unigram", "bpe"):
        train_sentencepiece(iter(TEXTS), 312, tmp_path / "again.model", kind=kind)  # type: ignore[arg-type]
        assert (tmp_path / "again.model").read_bytes() == (folder / f"{kind}.model").read_bytes()


def test_long_lines_are_not_dropped(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece(["zebra " * 5000], 270, tmp_path / "t.model", kind="bpe")
    assert len(tokenizer.encode("zebra zebra")) <= 6


def test_stored_truncation_and_padding_are_switched_off(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.enable_truncation(3)
    model.enable_padding(length=50)
    model.save(str(tmp_path / "t.json"))
    plain, cut = load(folder / "tokenizer.json"), load(tmp_path / "t.json")
    texts = ["a", "the cat sat on the mat"]
    assert cut.encode_batch(texts) == plain.encode_batch(texts)


def test_end_of_document_token(folder: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.add_special_tokens([AddedToken("<stop>", special=True), AddedToken("</s>", special=True)])
    model.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).eod == 0
    assert load(tmp_path / "tokenizer.json", eod="<stop>").eod == model.token_to_id("<stop>")
    for value in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        assert load(tmp_path).eod == model.token_to_id("<stop>")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON object"):
        load(tmp_path)
    for leaf in KINDS:
        with pytest.raises(UserError, match='no (token|piece) "<none>"'):
            load(folder / leaf, eod="<none>")
    assert load(folder / "bpe.model", eod=EOD).eod == 1


@pytest.mark.parametrize("leaf", ["t.json", "t.model"])
def test_special_tokens_have_ids_that_text_never_yields(tmp_path: Path, leaf: str) -> None:
    train = train_bpe if leaf == "t.json" else train_sentencepiece
    tokenizer = train(TEXTS, 320, tmp_path / leaf, special=["<mask>", "<fim>"])
    assert tokenizer.eod is not None
    ids = {tokenizer.eod + 1, tokenizer.eod + 2}
    assert not ids & set(tokenizer.encode("a <mask> and a <fim> in a text"))
    for wrong in (["<mask>", "<mask>"], [""], [EOD]):
        with pytest.raises(UserError, match="must be different"):
            train(TEXTS, 320, tmp_path / f"wrong-{leaf}", special=wrong)


def test_vocabulary_with_holes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a")).save(str(tmp_path / "t.json"))
    tokenizer = load(tmp_path / "t.json")
    assert (tokenizer.vocabulary, tokenizer.eod) == (10, None)


def test_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "bad.model").write_bytes(b"nothing")
    (tmp_path / "bad.txt").write_text("")
    for leaf, message in [("bad.json", "not a tokenizer.json"), ("bad.model", "not a SentencePiece"),
                          ("bad.txt", 'unknown ending ".txt"'), ("none.json", "does not exist"),
                          ("", "neither")]:
        with pytest.raises(UserError, match=message):
            load(tmp_path / leaf)
    with pytest.raises(UserError, match="256 bytes"):
        train_bpe(TEXTS, 256, tmp_path / "t.json")
    with pytest.raises(UserError, match="too high.*<="):
        train_sentencepiece(TEXTS, 9000, tmp_path / "t.model", kind="bpe")
    with pytest.raises(UserError, match="must end in .json"):
        train_bpe(TEXTS, 300, tmp_path / "t.model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "bad.model", "bad.txt"]


@pytest.mark.parametrize(("train", "leaf"), [(train_bpe, "t.json"), (train_sentencepiece, "t.model")])
def test_inputs_without_text_train_nothing(tmp_path: Path, train: Any, leaf: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UserError, match="the 2 input files hold no text"):
        train(read_texts([tmp_path], "text"), 300, tmp_path / leaf)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.txt"]


def test_failed_training_leaves_nothing(tmp_path: Path) -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield "some text"
        raise RuntimeError("midway")

    for train, leaf in ((train_bpe, "t.json"), (train_sentencepiece, "t.model")):
        with pytest.raises(Exception, match="midway"):
            train(texts(), 300, tmp_path / leaf)
    assert not list(tmp_path.iterdir())
