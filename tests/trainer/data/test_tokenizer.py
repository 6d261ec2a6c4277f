"""Tokenizers: nothing cut or filled, no special token out of a text, a separator that is one."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from trainer.data import tokenizer

tokenizers: Any = pytest.importorskip("tokenizers")
pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

END = "<|endoftext|>"


def bpe(
    folder: Path, name: str = "tokenizer.json", special: tuple[str, ...] = (END,), **settings: Any
) -> str:
    """A byte-level tokenizer of 300 ids, or a few more, in a file; `settings` change its JSON."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the quick brown fox and the lazy dog and the text of ends"] * 5, trainer)
    tree = json.loads(made.to_str()) | settings
    (folder / name).write_text(json.dumps(tree))
    return str(folder / name)


def unigram(folder: Path) -> str:
    """A tokenizer whose model has its special tokens among its words, as SentencePiece makes them."""
    words = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "abcdefgh <>/s")]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=0))
    made.add_special_tokens(["<unk>", "</s>"])
    made.save(str(folder / "unigram.json"))
    return str(folder / "unigram.json")


def _ids(words: tokenizer.Tokenizer, *texts: str) -> list[list[int]]:
    return [ids.tolist() for ids in words.encode([text.encode() for text in texts], Counter())]


TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "[PAD]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({"truncation": TRUNCATION}, ["data.tokenizer: truncation (3) switched off while preparing"]),
        ({"padding": PADDING}, ['data.tokenizer: padding ({"Fixed": 64}) switched off while preparing']),
        ({}, []),
    ],
    ids=["truncation", "padding", "neither"],
)
def test_truncation_and_padding_are_switched_off(
    tmp_path: Path, settings: dict[str, Any], notes: list[str]
) -> None:
    plain = tokenizer.load(bpe(tmp_path), None)
    words = tokenizer.load(bpe(tmp_path, "other.json", **settings), None)
    text = "the quick brown fox and the lazy dog " * 9
    assert _ids(words, text, "the") == _ids(plain, text, "the") and len(_ids(words, text)[0]) > 64
    assert words.notes == [*notes, f"data.end_token: '{END}' (id 0), a known name"]
    assert words.digest == plain.digest, "what is switched off changes no token"


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    name = bpe(tmp_path)
    tree = json.loads(Path(name).read_text())
    tree["model"]["dropout"] = 0.9
    Path(name).write_text(json.dumps(tree))
    words = tokenizer.load(name, None)
    assert len({str(_ids(words, "the quick brown fox and the lazy dog")) for _ in range(9)}) == 1
    assert words.notes[0] == "data.tokenizer: dropout (0.9) switched off while preparing"


def test_a_special_token_written_in_a_text_stays_text(tmp_path: Path) -> None:
    words = tokenizer.load(bpe(tmp_path, special=(END, "<|im_start|>")), None)
    text = f"the fox{END} and <|im_start|>system the dog"
    (ids,) = _ids(words, text)
    assert not {0, 1} & set(ids)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(ids) == text


def test_a_special_token_that_is_a_word_of_the_model_stays_text_too(tmp_path: Path) -> None:
    words = tokenizer.load(unigram(tmp_path), None)
    counts: Counter[str] = Counter()
    plain, spelled = words.encode([b"abc", b"abc</s>abc</s>"], counts)
    assert words.separator == 1 and counts == {"special": 1}
    assert 1 not in spelled and len(spelled) == 2 * (len(plain) + len("</s>"))
    # An unknown word is not a special token, though the file calls it one.
    assert 0 in _ids(words, "abXc")[0]


def test_an_end_token_that_cannot_be_kept_apart_is_refused(tmp_path: Path) -> None:
    words = tokenizer.load(bpe(tmp_path, special=()), "!")
    assert _ids(words, "the fox") and words.separator not in _ids(words, "the fox")[0]
    with pytest.raises(
        UserError, match="turns plain text into its special token '!'; choose another data.end_token"
    ):
        _ids(words, "the fox!")


def test_the_separator_is_what_is_declared(tmp_path: Path) -> None:
    name = bpe(tmp_path, special=(END, "<|im_end|>", "</s>"))
    assert tokenizer.load(name, None).separator == 0
    assert tokenizer.load(name, "</s>").separator == 2
    for declared in ("<|im_end|>", {"content": "<|im_end|>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
        words = tokenizer.load(name, None)
        assert words.separator == 1
        assert words.notes == ["data.end_token: '<|im_end|>' (id 1), as tokenizer_config.json declares"]
    for broken in ("{", "[]", '{"eos_token": null}', '{"eos_token": "<gone>"}'):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        assert tokenizer.load(name, None).separator == 0
    digests = {tokenizer.load(name, end).digest for end in (END, "<|im_end|>", "</s>")}
    assert len(digests) == 3, "another separator makes other tokens"


def test_text_that_is_not_utf_8_is_mended_and_counted(tmp_path: Path) -> None:
    words, counts = tokenizer.load(bpe(tmp_path), None), Counter[str]()
    found = words.encode(["caf\xe9".encode("latin-1"), b"fine"], counts)
    assert counts == {"replaced": 1}
    assert (
        tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(found[0].tolist())
        == "caf\ufffd"
    )


def test_a_tokenizer_travels_to_another_process(tmp_path: Path) -> None:
    words = tokenizer.load(bpe(tmp_path, truncation=TRUNCATION), None)
    Path(tmp_path / "tokenizer.json").unlink()
    copy = pickle.loads(pickle.dumps(words))
    text = f"the quick {END} brown fox and the lazy dog"
    assert _ids(copy, text) == _ids(words, text) and copy.separator == words.separator


# ---- mistakes ----


def _refused(name: str, end: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        tokenizer.load(name, end)
    assert "\n" not in str(caught.value)


def test_no_token_between_documents(tmp_path: Path) -> None:
    _refused(
        bpe(tmp_path, special=("<pad>",)),
        None,
        "no known token between documents; set data.end_token to the text",
    )


def test_an_end_token_that_is_none(tmp_path: Path) -> None:
    name = bpe(tmp_path)
    _refused(
        name,
        "<|endoftexts|>",
        r"data.end_token='<\|endoftexts\|>' is not a token .*did you mean '<\|endoftext\|>'",
    )


def test_an_end_token_for_bytes() -> None:
    _refused("bytes", "</s>", "data.end_token='</s>' goes with a tokenizer.json; .*leave data.end_token out")


def test_a_folder_with_a_tokenizer(tmp_path: Path) -> None:
    bpe(tmp_path)
    _refused(str(tmp_path), None, "is a folder; type .*/tokenizer.json")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": 5}', '{"model": {"type": "BPE"}}', "\xff"]
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    _refused(str(tmp_path / "tokenizer.json"), None, "is not a tokenizer.json: .*; type the path of one")
