from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapt.batch import IGNORE
from megapt.config import FimConfig, MaskedLmConfig
from megapt.data.composite import CompositeDataset, Objective
from megapt.data.dataset import TokenDataset
from megapt.data.indexed import IndexedWriter
from megapt.data.objectives import FillInTheMiddle, MaskedLm
from megapt.data.packing import Pieces
from megapt.data.tokenizers import load, train_bpe, train_sentencepiece
from megapt.data.vocabulary import Vocabulary
from megapt.errors import UserError

PRE, MID, SUF, END, MASK = 1000, 1001, 1002, 1003, 1004
NAMES = {"<pre>": PRE, "<mid>": MID, "<suf>": SUF, "<end>": END, "<mask>": MASK}
VOCABULARY = Vocabulary("test", 1005, {**{f"t{i}": i for i in range(1000)}, **NAMES}, frozenset(NAMES.values()))


def fim(rate: float = 1.0, spm_rate: float = 0.5, seed: int = 1) -> FillInTheMiddle:
    config = FimConfig(rate=rate, spm_rate=spm_rate, prefix="<pre>", middle="<mid>", suffix="<suf>")
    return FillInTheMiddle(config, VOCABULARY, seed)


def documents(lengths: list[list[int]], ended: bool = True) -> tuple[np.ndarray[Any, Any], Pieces]:
    """Rows of documents 0, 1, 2, ...; their last token is END."""
    row = np.repeat(np.arange(len(lengths)), [len(r) for r in lengths])
    length = np.array([n for r in lengths for n in r])
    rows = np.array([[t for n in r for t in [*range(n - 1), END if ended else n - 1]] for r in lengths], np.int32)
    return rows, Pieces.of(row, np.zeros_like(length), length, np.full(len(row), ended))


# Fill in the middle


def test_documents_are_cut_and_their_middle_comes_last() -> None:
    rows, pieces = documents([[20, 12]] * 300)
    found = fim(spm_rate=0.0)(np.arange(300), rows, pieces)
    assert found.shape == rows.shape and found.dtype == rows.dtype
    cuts = set()
    for row in found.tolist():
        for document, length in ((row[:20], 20), (row[20:], 12)):
            assert document[-1] == END
            body = document[:-1]
            suf, mid = body.index(SUF), body.index(MID)
            assert body[0] == PRE
            prefix, suffix, middle = body[1:suf], body[suf + 1:mid], body[mid + 1:]
            assert prefix + middle + suffix == list(range(length - 4))  # three gave way to the sentinels
            cuts.add((length, len(prefix), len(middle)))
    assert {p for n, p, _ in cuts if n == 12} == set(range(9)) and (12, 0, 8) in cuts


def test_suffix_first() -> None:
    rows, pieces = documents([[20]] * 50)
    for row in fim(spm_rate=1.0)(np.arange(50), rows, pieces).tolist():
        mid = row.index(MID)
        suffix, text = row[2:mid], row[mid + 1:-1]
        assert row[:2] == [PRE, SUF] and row[-1] == END and text + suffix == list(range(16))


def test_rates_seeds_and_samples() -> None:
    rows, pieces = documents([[30]] * 2000)
    ids = np.arange(2000)
    found = fim(rate=0.3, spm_rate=0.25)(ids, rows, pieces)
    changed = (found[:, 0] == PRE)
    assert ((found == rows).all(axis=1) == ~changed).all()
    assert changed.mean() == pytest.approx(0.3, abs=0.04)
    assert (found[changed, 1] == SUF).mean() == pytest.approx(0.25 + 0.75 / 27, abs=0.05)
    # The same for a sample wherever it stands in a batch, another for another seed or number.
    some = np.array([7, 1999, 3])
    again = fim(rate=0.3, spm_rate=0.25)(some, rows[:3], documents([[30]] * 3)[1])
    assert (again == found[some]).all()
    assert (fim(rate=0.3, spm_rate=0.25, seed=2)(ids, rows, pieces) != found).any()
    assert (fim(rate=0.0)(ids, rows, pieces) == rows).all()


def test_short_documents_and_parts_of_documents() -> None:
    rows, pieces = documents([[4, 5, 1, 2, 8]])
    found = fim(spm_rate=0.0)(np.zeros(1, np.int64), rows, pieces)[0]
    assert found[:4].tolist() == rows[0, :4].tolist() and found[9:12].tolist() == rows[0, 9:12].tolist()
    assert found[4] == PRE and found[8] == END and found[12] == PRE
    rows, pieces = documents([[9]], ended=False)  # cut by the sample's end: no last token to keep
    found = fim(spm_rate=0.0)(np.zeros(1, np.int64), rows, pieces)[0].tolist()
    assert sorted(t for t in found if t < 1000) == list(range(6))
    rows, pieces = documents([[3]])
    assert (fim()(np.zeros(1, np.int64), rows, pieces) == rows).all()


def test_tokens_that_the_tokenizer_lacks() -> None:
    config = FimConfig(prefix="<pre>", middle="<middle>", suffix="<suf>")
    with pytest.raises(UserError, match=r"data.fim.middle: the tokenizer test has no token '<middle>'.*<pre>"):
        FillInTheMiddle(config, VOCABULARY, 1)
    with pytest.raises(UserError, match="three different tokens"):
        FillInTheMiddle(FimConfig(prefix="<pre>", middle="<pre>", suffix="<suf>"), VOCABULARY, 1)


# Masked language model


def masked(seed: int = 1, **values: Any) -> MaskedLm:
    return MaskedLm(MaskedLmConfig(mask="<mask>", **values), VOCABULARY, seed)


def test_eighty_ten_ten() -> None:
    rows = np.random.default_rng(0).integers(0, 1000, (200, 512)).astype(np.int32)
    rows[:, ::50] = END
    before = rows.copy()
    inputs, labels = masked()(np.arange(200), rows, np.full(200, 512))
    assert (rows == before).all()
    chosen = labels != IGNORE
    assert (chosen.sum(axis=1) == round(0.15 * 512)).all()
    assert (labels[chosen] == rows[chosen]).all() and (inputs[~chosen] == rows[~chosen]).all()
    assert not chosen[:, ::50].any()
    hidden = inputs[chosen] == MASK
    kept = inputs[chosen] == rows[chosen]
    drawn = inputs[chosen][~hidden & ~kept]
    assert hidden.mean() == pytest.approx(0.8, abs=0.01) and kept.mean() == pytest.approx(0.1, abs=0.01)
    assert drawn.max() < 1000 and len(np.unique(drawn)) > 500
    assert chosen.any(axis=0)[np.arange(512) % 50 != 0].all()  # every place is chosen in some sample


def test_masks_depend_on_seed_and_sample_alone() -> None:
    rows = np.random.default_rng(0).integers(0, 1000, (4, 64)).astype(np.int32)
    length = np.full(4, 64)
    inputs, labels = masked()(np.array([5, 6, 7, 8]), rows, length)
    again = masked()(np.array([8, 5]), rows[[3, 0]], length[:2])
    assert (again[0] == inputs[[3, 0]]).all() and (again[1] == labels[[3, 0]]).all()
    same = masked()(np.array([9, 10, 9, 10]), rows[[0, 0, 0, 0]], length)[1] != IGNORE
    assert (same[0] == same[2]).all() and (same[0] != same[1]).any()  # another epoch masks other tokens
    assert (masked(seed=2)(np.array([5, 6, 7, 8]), rows, length)[1] != labels).any()


@pytest.mark.parametrize("whole_word", [False, True])
def test_the_number_of_labels_follows_from_lengths_alone(whole_word: bool) -> None:
    objective = masked(rate=0.5, whole_word=whole_word)
    rows = np.random.default_rng(0).integers(0, 1000, (6, 32)).astype(np.int32)
    rows[1] = END  # nothing to mask at all
    rows[2, 4:] = END  # too little
    length = np.array([32, 32, 32, 7, 1, 20])
    inputs, labels = objective(np.arange(6), rows, length)
    chosen = labels != IGNORE
    assert chosen.sum(axis=1).tolist() == objective.labels(length).tolist() == [16, 16, 16, 4, 1, 10]
    assert (inputs[1] == END).all()  # predicted, but left as they are
    assert chosen[2, :4].all() and (inputs[2, 4:] == END).all()
    for row, count in enumerate(length.tolist()):
        assert not chosen[row, count:].any()


def test_whole_words() -> None:
    ids = {**{("\u2581" if i % 3 == 0 else "") + f"t{i}": i for i in range(1000)}, **NAMES}
    vocabulary = Vocabulary("test", 1005, ids, frozenset(NAMES.values()))
    objective = MaskedLm(MaskedLmConfig(mask="<mask>", rate=0.25, whole_word=True), vocabulary, 1)
    rows = np.random.default_rng(0).integers(0, 1000, (300, 64)).astype(np.int32)
    chosen = objective(np.arange(300), rows, np.full(300, 64))[1] != IGNORE
    assert (chosen.sum(axis=1) == 16).all()
    word = np.cumsum(rows % 3 == 0, axis=1)
    cut = 0
    for row in range(300):
        for number in np.unique(word[row]):
            of_word = chosen[row][word[row] == number]
            if of_word.any() and not of_word.all():
                cut += 1
                assert of_word[:of_word.sum()].all()  # its first tokens
    assert 0 < cut <= 300  # one word a sample at most
    single = masked(rate=0.25)(np.arange(300), rows, np.full(300, 64))[1] != IGNORE
    assert (single != chosen).any()


# Vocabularies


TEXTS = ["the quick brown fox jumps over the lazy dog\n\nand runs away from it " * 20, "words and more words " * 30]


def _bpe(folder: Path) -> Vocabulary:
    return Vocabulary.of(train_bpe(TEXTS, 320, folder / "bpe.json"))


def _sentencepiece(folder: Path) -> Vocabulary:
    return Vocabulary.of(train_sentencepiece(TEXTS, 288, folder / "sp.model"))


def _bytes(folder: Path) -> Vocabulary:
    return Vocabulary.of(load("bytes"))


@pytest.mark.parametrize(("make", "name"), [(_bpe, "bpe.json"), (_sentencepiece, "sp.model"), (_bytes, "bytes")])
def test_words_of_real_tokenizers(tmp_path: Path, make: Callable[[Path], Vocabulary], name: str) -> None:
    vocabulary = make(tmp_path)
    tokenizer = load("bytes" if name == "bytes" else tmp_path / name)
    ids = np.array(tokenizer.encode("the quick dog runs"))
    begins = vocabulary.word_starts()[ids]
    texts = ["".join(tokenizer.decode([i]) for i in part.tolist()) for part in np.split(ids, np.flatnonzero(begins))]
    assert [text.strip() for text in texts if text] == ["the", "quick", "dog", "runs"]
    assert tokenizer.eod in vocabulary.special
    with pytest.raises(UserError, match="has no token '<mask>'"):
        vocabulary.id("<mask>", "data.masked_lm.mask")


def test_word_pieces_and_special_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    ids = {"[UNK]": 0, "[MASK]": 1, "play": 2, "##ing": 3, "the": 4, "[SEP]": 5}
    model = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    model.add_special_tokens(["[MASK]", "[SEP]"])
    model.save(str(tmp_path / "bert.json"))
    vocabulary = Vocabulary.of(load(tmp_path / "bert.json"))
    assert vocabulary.word_starts().tolist() == [True, True, True, False, True, True]
    assert vocabulary.special == {1, 5} and vocabulary.id("[MASK]", "key") == 1


# In the data set


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("kind", ["fim", "masked_lm"])
def test_loss_tokens_are_known_without_reading(tmp_path: Path, packing: Any, kind: str) -> None:
    rng = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "c", "u2") as writer:
        for length in rng.integers(1, 50, 200):
            writer.add_document([*rng.integers(0, 1000, length - 1), END])
    source = TokenDataset(tmp_path / "c", "train", "1", 32, 3, packing=packing, cache=tmp_path / "cache")
    objective = Objective(True, fim=fim()) if kind == "fim" else Objective(True, masked=masked())
    data = CompositeDataset({"c": source}, 1005, None, objective)
    plain = CompositeDataset({"c": source}, 1005)
    ids = np.arange(60)
    tokens, labels, before, after = (np.empty((60, 32), np.int64) for _ in range(4))
    data.fill(ids, tokens, labels)
    plain.fill(ids, before, after)
    assert data.loss_tokens(ids) == (labels != IGNORE).sum()
    assert plain.loss_tokens(ids) == (after != IGNORE).sum()
    if kind == "fim":
        assert (tokens == PRE).sum() > 50 and ((labels == IGNORE) == (after == IGNORE)).all()
        follows = (labels[:, :-1] != IGNORE)
        assert (labels[:, :-1] == tokens[:, 1:])[follows].all()
        assert ((tokens == END) == (before == END)).all()  # documents keep their places
    else:
        assert data.loss_tokens(ids) != plain.loss_tokens(ids) and (tokens == MASK).any()
        assert (labels == np.where(labels == IGNORE, IGNORE, before)).all()
    one, other = (np.empty((1, 32), np.int64) for _ in range(2))
    data.fill(ids[17:18], one, other)
    assert (one[0] == tokens[17]).all() and (other[0] == labels[17]).all()
