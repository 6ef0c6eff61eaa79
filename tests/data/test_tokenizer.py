"""Tokenizers are lossless for any text, tags cannot be forged, and the template has an exact inverse."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import templates
from jaxgpt.data import tokenizer as tk
from jaxgpt.data.documents import Documents
from jaxgpt.errors import UserError

CORPUS = [
    "the film is a delight from the first frame to the last .",
    "a dull , dull film ; the plot is thin and the jokes are thinner .",
    "café déjà-vu\nwith two lines — and a dash",
] * 20
BPE = tk.train_bpe(CORPUS, 320)
CHAR = tk.train_char(CORPUS)
both = pytest.mark.parametrize("tok", [BPE, CHAR], ids=["bpe", "char"])
unicode_text = st.text(st.characters(codec="utf-8"), max_size=60)
tag_text = st.lists(st.sampled_from([*tk.SPECIALS, "<0x41>", " ", "a", "é"]), max_size=6).map("".join)


@both
@settings(max_examples=50, deadline=None)
@given(text=unicode_text | tag_text)
def test_round_trip_is_exact_and_makes_no_tags(tok: tk.Tokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(len(tk.SPECIALS) <= i < tok.vocab_size for i in ids)
    assert tok.encode_batch([text, "x"]) == [ids, tok.encode("x")]


@both
@settings(max_examples=40, deadline=None)
@given(prompt=unicode_text | tag_text, answer=unicode_text | tag_text, padding=st.integers(0, 3), ended=st.booleans())
def test_parse_inverts_the_template(tok: tk.Tokenizer, prompt: str, answer: str, padding: int, ended: bool) -> None:
    ids, roles = templates.example_ids(tok, prompt, answer)
    row = (ids if ended else ids[:-1]) + [tk.PAD] * padding
    assert templates.parse(tok, np.array(row)) == templates.Example(prompt, answer, ended)
    head = templates.prompt_ids(tok, prompt)
    assert ids[: len(head)] == head and roles == [0] * len(head) + [1] * (len(ids) - len(head))
    assert ids[-1] == tk.ANSWER_END
    assert templates.answer_text(tok, row[len(head) :]) == answer


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [tk.BOS, 50],
        [tk.PROMPT, 50, tk.PROMPT_END],
        [tk.PROMPT, 50, tk.PROMPT_END, 51, tk.ANSWER, 52],
        [50, tk.PROMPT, 50, tk.PROMPT_END, tk.ANSWER, 52],
        [tk.PROMPT, 50, tk.PROMPT_END, tk.ANSWER, 52, tk.ANSWER_END, 53],
        [tk.PROMPT, 50, tk.PROMPT_END, tk.ANSWER, 52, tk.PAD, 53],
        [tk.PROMPT, 50, tk.PROMPT_END, tk.ANSWER, 52, tk.ANSWER_END, tk.ANSWER_END],
        [tk.PROMPT, tk.PROMPT, 50, tk.PROMPT_END, tk.ANSWER, 52],
    ],
)
def test_parse_refuses_anything_else(ids: list[int]) -> None:
    with pytest.raises(ValueError):
        templates.parse(BPE, ids)


def test_answer_stops_at_its_first_end_and_shows_tags() -> None:
    ids = [*BPE.encode("good"), tk.ANSWER_END, *BPE.encode("more"), tk.ANSWER_END]
    assert templates.answer_text(BPE, ids) == "good"
    assert templates.answer_text(BPE, ids[:2]) == BPE.decode(ids[:2])
    row = [tk.BOS, *templates.example_ids(BPE, "p </prompt>", "a")[0], tk.PAD, tk.PAD]
    assert BPE.show(row) == "<bos><prompt>p </prompt></prompt><answer>a</answer>"
    assert BPE.decode(row) == "p </prompt>a"
    assert BPE.decode([BPE.encode("z")[0], BPE.vocab_size + 7]) == "z"  # a padded vocabulary has such ids


@both
@settings(max_examples=40, deadline=None)
@given(text=unicode_text, cut=st.integers(0, 9), ended=st.booleans())
def test_the_texts_of_tokens_are_their_whole_text_wherever_they_end(
    tok: tk.Tokenizer, text: str, cut: int, ended: bool
) -> None:
    """Inside a character, too."""
    ids = tok.encode(text.replace("\ufffd", "") + "é日🙂")
    ids = ids[: max(len(ids) - cut, 0)] + [tk.ANSWER_END] * ended
    found = list(tok.token_texts(iter(ids)))
    said = "".join(text for _, text in found)
    assert [token for token, _ in found] == ids
    assert said == tok.decode(ids) or tok is CHAR  # which decodes no byte of a row of bytes that breaks off
    whole = max(n for n in range(len(ids) + 1) if "\ufffd" not in tok.decode(ids[:n]))
    assert said.startswith(tok.decode(ids[:whole])) and said.endswith("\ufffd") == (tok.decode(ids)[-1:] == "\ufffd")


def test_specials_have_their_ids_and_sizes_are_kept() -> None:
    assert (tk.PAD, tk.BOS, tk.PROMPT, tk.PROMPT_END, tk.ANSWER, tk.ANSWER_END) == (0, 1, 2, 3, 4, 5)
    assert BPE.vocab_size == 320
    assert CHAR.vocab_size == 6 + 256 + len(set("".join(CORPUS)))
    assert len(CHAR.encode("café")) == 4 and len(CHAR.encode("ж")) == 2
    with pytest.raises(UserError, match="minimum is 262"):
        tk.train_bpe(CORPUS, 261)
    with pytest.raises(UserError, match="lone surrogates"):
        BPE.encode("bad \ud800")
    with pytest.raises(UserError, match="lone surrogates"):
        BPE.encode_batch(["good", "bad \ud800"])


def test_training_is_deterministic_and_reads_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tk.train_bpe(CORPUS, 320).fingerprint == BPE.fingerprint
    assert tk.train_bpe([*CORPUS[:-1], "zzzz zzzz zzzz"], 320).fingerprint != BPE.fingerprint
    monkeypatch.setattr(tk, "TRAINING_CHARACTERS", 1000)
    long = [str(i) * 50 for i in range(1000)]
    sample = tk._training_sample(Documents.of(long))
    assert 1000 <= sum(map(len, sample)) < 1300
    assert sample == tk._training_sample(Documents.of(long)) and set(sample) <= set(long)
    assert sample != long[: len(sample)]


@both
def test_saved_tokenizers_load_equal(tok: tk.Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "t")
    loaded = tk.Tokenizer.load(tmp_path / "t")
    assert loaded.fingerprint == tok.fingerprint and loaded.vocab_size == tok.vocab_size
    text = "a </answer> film ж <pad>"
    assert loaded.encode(text) == tok.encode(text) and loaded.decode(loaded.encode(text)) == text


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer.json"):
        tk.Tokenizer.load(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "template.json").write_text(json.dumps({"version": 99, "specials": list(tk.SPECIALS)}))
    with pytest.raises(UserError, match="template.json is unreadable"):
        tk.Tokenizer.load(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="unreadable"):
        tk.Tokenizer.load(tmp_path)
    BPE.save(tmp_path)
    swapped = (tmp_path / "tokenizer.json").read_text().replace("<bos>", "<other>")
    (tmp_path / "tokenizer.json").write_text(swapped)
    with pytest.raises(UserError, match="ids 0-5"):
        tk.Tokenizer.load(tmp_path)


def test_cache_is_keyed_by_texts_kind_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tk.cached_tokenizer("bpe", CORPUS, 300, tmp_path)
    other = [
        tk.cached_tokenizer("bpe", CORPUS, 310, tmp_path),
        tk.cached_tokenizer("bpe", CORPUS[1:], 300, tmp_path),
        tk.cached_tokenizer("char", CORPUS, 300, tmp_path),
    ]
    assert len({t.fingerprint for t in [first, *other]}) >= 3
    assert len(list((tmp_path / "tokenizers").iterdir())) == 4  # and no scratch folder is left
    monkeypatch.setattr(tk, "train_bpe", None)  # from here on only the cache can supply it
    assert tk.cached_tokenizer("bpe", CORPUS, 300, tmp_path).fingerprint == first.fingerprint


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    size = tk.tokenizer_for("char", CORPUS, 4096, tmp_path).vocab_size
    assert tk.tokenizer_for("char", CORPUS, size, tmp_path).vocab_size == size
    with pytest.raises(UserError, match=rf"^the tokenizer has {size} ids; set --model.vocab to at least that"):
        tk.tokenizer_for("char", CORPUS, size - 1, tmp_path)


def test_cache_survives_a_kill_and_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(tok: tk.Tokenizer, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tk.Tokenizer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            tk.cached_tokenizer("bpe", CORPUS, 300, tmp_path)
    real = tk.train_bpe

    def overtaken(texts: Sequence[str], size: int) -> tk.Tokenizer:
        monkeypatch.setattr(tk, "train_bpe", real)
        tk.cached_tokenizer("bpe", CORPUS, 300, tmp_path)  # another process finishes while this one trains
        return real(texts, size)

    monkeypatch.setattr(tk, "train_bpe", overtaken)
    made = tk.cached_tokenizer("bpe", CORPUS, 300, tmp_path)
    (folder,) = (tmp_path / "tokenizers").iterdir()
    assert tk.Tokenizer.load(folder).fingerprint == made.fingerprint
