"""The fast path of byte-level BPE gives tokenizers' own ids, or steps aside."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megapt.data import fast_bpe
from megapt.data.tokenizers import load, train_bpe
from megapt.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
TEXT = "".join(f"The quick {i} brown foxes' jumps, don't they?\n  over {i * 37} lazy dogs...\r\n\tnaïve café 漢字 {i}\n"
               for i in range(300))
FAMILY = {"gpt2": fast_bpe._GPT2, "llama3": fast_bpe._LLAMA3, "qwen2": fast_bpe._QWEN2}


def trained(name: str, ignore_merges: bool = False, normalizer: Any = None,
            added: tuple[AddedToken, ...] = ()) -> Tokenizer:
    model = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if name == "gpt2":
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        model.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(FAMILY[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    model.normalizer = normalizer
    model.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model.add_tokens(list(added))
    model.encode_special_tokens = True
    return model


PAIRS: dict[str, tuple[fast_bpe.FastBPE, Tokenizer]] = {}
for family in FAMILY:
    slow = trained(family, normalizer=normalizers.NFC() if family == "qwen2" else None)
    fast = fast_bpe.build(slow)
    assert fast is not None
    PAIRS[family] = fast, slow


def ids(model: Tokenizer, text: str) -> list[int]:
    return list(model.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", FAMILY)
def test_same_ids(name: str) -> None:
    fast, slow = PAIRS[name]
    assert fast.encode(TEXT) == ids(slow, TEXT)
    chance = random.Random(0)
    pool = [*TEXT[:400], *"\n\r\t  \u00a0\u3000\u2028\x85'sſKtTdmLl12½٣漢é\u0301🙂\u200d\U0001f1e9\x00\x1c\ufeff",
            *"<|end|>"]
    for _ in range(1500):
        text = "".join(chance.choices(pool, k=chance.randrange(40)))
        assert fast.encode(text) == ids(slow, text), text


@settings(max_examples=150)
@given(st.text(max_size=40))
def test_same_ids_of_any_characters(text: str) -> None:
    for fast, slow in PAIRS.values():
        assert fast.encode(text) == ids(slow, text)


def test_giant_runs_of_blanks_step_aside() -> None:
    for fast, slow in PAIRS.values():
        for text in (" " * 199_999, " " * 199_998 + "x", "\n " * 90_000 + "x",
                     "\t" * 150_000 + "\n" + " " * 30_000 + "x"):
            assert fast.encode(text) == ids(slow, text)
        assert fast.encode("x" + " " * 1_200_000 + "x") is None


def test_added_tokens_step_aside() -> None:
    added = (AddedToken("<tool>", special=False), AddedToken("<raw>", special=False, normalized=False, lstrip=True))
    slow = trained("llama3", added=added)
    fast = fast_bpe.build(slow)
    assert fast is not None
    assert fast.encode("a <tool> b") is None and fast.encode("a <raw> b") is None
    assert fast.encode("a <|end|> b") == ids(slow, "a <|end|> b")  # text is text
    assert fast.encode("a <too> b") == ids(slow, "a <too> b")


def test_batches_mix_both_ways(tmp_path: Path) -> None:
    trained("gpt2", added=(AddedToken("<tool>", special=False),)).save(str(tmp_path / "tokenizer.json"))
    plain, quick = load(tmp_path), load(tmp_path)
    quick.accelerate()
    assert (plain.engine, quick.engine) == ("tokenizers", "tiktoken")
    texts = ["one", "a <tool> b", "", "two <tool>", "three <|end|>", TEXT]
    assert quick.encode_batch(texts) == plain.encode_batch(texts)
    flat, lengths = quick.encode_flat(texts, "u2")
    assert flat.tolist() == [i for row in plain.encode_batch(texts) for i in row]
    assert lengths.tolist() == [len(row) for row in plain.encode_batch(texts)]


def test_ignoring_merges() -> None:
    """Whole pieces that merging does not reach are allowed where the library looks them up first, too."""
    slow = trained("llama3", ignore_merges=True)
    assert fast_bpe.build(slow) is not None
    spec = json.loads(slow.to_str())
    vocabulary = spec["model"]["vocab"]
    vocabulary["zzq"] = len(vocabulary)  # no pair of tokens makes it up
    fast = fast_bpe.build(Tokenizer.from_str(json.dumps(spec)))
    assert fast is not None
    assert fast.encode("zzq") == [vocabulary["zzq"]]
    assert fast.encode("zzqq") == ids(Tokenizer.from_str(json.dumps(spec)), "zzqq")


def changed(change: Any) -> Tokenizer:
    spec = json.loads(trained("gpt2").to_str())
    change(spec)
    return Tokenizer.from_str(json.dumps(spec))


def unreachable(spec: dict[str, Any]) -> None:
    """A token made from a pair that never meets: "th" + "e" where "he" is merged first."""
    model = spec["model"]
    for token in ("qj", "zq", "zqj"):
        model["vocab"][token] = max(model["vocab"].values()) + 1
    model["merges"] += [["q", "j"], ["z", "q"], ["zq", "j"]]


@pytest.mark.parametrize("change", [
    unreachable,
    lambda spec: spec["model"]["merges"].reverse(),
    lambda spec: spec["model"].update(dropout=0.1),
    lambda spec: spec["model"]["vocab"].pop("\u0100"),
    lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}),
    lambda spec: spec.update(pre_tokenizer=None),
    lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, spec["pre_tokenizer"]]}),
], ids=["unreachable", "order", "dropout", "byte", "prefix", "normalizer", "words", "nothing", "digits"])
def test_what_is_not_certain_is_left_alone(change: Any) -> None:
    assert fast_bpe.build(changed(change)) is None


def test_other_models_are_left_alone() -> None:
    assert fast_bpe.build(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None


@pytest.mark.skipif(not (SHARED / "gpt2_tokenizer.json").exists(), reason="no shared data")
def test_gpt2_itself() -> None:
    quick, plain = load(SHARED / "gpt2_tokenizer.json"), load(SHARED / "gpt2_tokenizer.json")
    quick.accelerate()
    assert quick.engine == "tiktoken"
    for name in ("wikitext2_valid.txt", "wagahaiwa_nekodearu.txt"):
        texts = (SHARED / name).read_text(encoding="utf-8")[:300_000].split("\n")
        assert quick.encode_batch(texts) == plain.encode_batch(texts)


def test_files_as_gpt2_was_published(tmp_path: Path) -> None:
    train_bpe([TEXT], 400, tmp_path / "t.json")
    spec = json.loads((tmp_path / "t.json").read_text())["model"]
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(spec["vocab"]))
    with pytest.raises(UserError, match="merges.txt beside it"):
        load(tmp_path / "gpt2")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["merges"]]
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    original = load(tmp_path / "t.json")
    for path in (tmp_path / "gpt2", tmp_path / "gpt2" / "vocab.json"):
        tokenizer = load(path)
        before = tokenizer.fingerprint()
        tokenizer.accelerate()
        assert (tokenizer.engine, tokenizer.eod, tokenizer.vocabulary) == ("tiktoken", 0, 400)
        assert tokenizer.encode(TEXT + "<|endoftext|>") == original.encode(TEXT + "<|endoftext|>")
        assert tokenizer.decode([*tokenizer.encode("x y"), 0]) == "x y"
    tokenizer.save(tmp_path / "saved.json")  # type: ignore[attr-defined]
    assert load(tmp_path / "saved.json").encode(TEXT) == original.encode(TEXT)
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.3\n" + "\n".join(pairs) + "\n")
    assert load(tmp_path / "gpt2").fingerprint() != before
    (tmp_path / "gpt2" / "merges.txt").write_text("nonsense here too\n")
    with pytest.raises(UserError, match="vocab.json is not a vocab.json that"):
        load(tmp_path / "gpt2")
