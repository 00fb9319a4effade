"""JSONL of in-context tasks: what is read, what is rejected, and which tokens belong to an answer."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dcscale.data import ByteTokenizer, DataError, HuggingFaceTokenizer
from dcscale.evaluation.task_format import Sample, read_samples, strip_marks, tokenize

TEXT = "\n< Ann has a plum. >. Ann has a kind of [ fruit ]\n< Bo likes São Paulo. >. Bo likes [ São Paulo ]\n"
PLAIN = "\n< Ann has a plum. >. Ann has a kind of fruit\n< Bo likes São Paulo. >. Bo likes São Paulo\n"


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def tokenizer_of(path, vocabulary, merges=()):
    """A BPE tokenizer without pre-tokenization, with these characters and merges."""
    tokens = ["<eos>", *vocabulary, *("".join(pair) for pair in merges)]
    library = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    library.save(str(path))
    return HuggingFaceTokenizer(path, "<eos>")


def test_the_marks_are_not_part_of_the_text():
    text, answers = strip_marks(TEXT)
    assert text == PLAIN
    assert [text[slice(*answer)] for answer in answers] == ["fruit", "São Paulo"]


def test_only_one_space_inside_each_bracket_is_a_mark():
    text, answers = strip_marks("a[b] c[  d  ]e")
    assert text == "ab c d e"
    assert [text[slice(*answer)] for answer in answers] == ["b", " d "]


@pytest.mark.parametrize(
    ("marked", "rule"),
    [
        ("plain text", "no answer is marked"),
        ("a [ b", r"'\[' in 'a \[ b' is not part of a pair"),
        ("a b ] c", r"'\]' in 'a b \] c' is not part of a pair"),
        ("a [ b ] c ] d", r"'\]' in ' c \] d' is not part of a pair"),
        ("a [ b [ c ] ]", r"'\[' in 'a \[ b ' is not part of a pair"),
        ("a [ b ] [ ]", r"answer 2, '\[ \]', is empty"),
        ("a []", r"answer 1, '\[\]', is empty"),
        ("\n[ b ] c", "there is no text before the first answer"),
    ],
)
def test_marks_that_are_rejected(marked, rule, tmp_path):
    path = write(tmp_path / "tasks.jsonl", {"task_id": "t", "texts": TEXT}, {"task_id": "t", "texts": marked})
    with pytest.raises(DataError, match=rf"tasks\.jsonl, line 2: .*{rule}"):
        read_samples(path)


def test_a_file(tmp_path):
    path = write(
        tmp_path / "tasks.jsonl", {"task_id": "t", "texts": TEXT, "more": 1}, "\n", {"task_id": "", "texts": TEXT}
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    samples = read_samples(path)
    assert [sample.task for sample in samples] == ["t", ""]
    assert samples[1].location == f"{path}, line 3"
    assert samples[1].text == PLAIN


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{'task_id': 1}\n", " cannot be read: it is not JSON: "),
        ("[" * 100_000 + "\n", " cannot be read: it is nested too deeply"),
        ([1], ": is a list, but must be an object"),
        ({"texts": TEXT}, ": task_id is None, but must be a string"),
        ({"task_id": "t", "texts": [TEXT]}, ": texts is .*, but must be a string"),
        ({"task_id": "t", "texts": TEXT + "\ud83d"}, r": texts is not valid text: .*'\\ud83d'"),
        ({"task_id": "\udc00", "texts": TEXT}, r": task_id is not valid text: .*'\\udc00'"),
    ],
)
def test_lines_that_are_rejected(tmp_path, line, rule):
    with pytest.raises(DataError, match=rf"tasks\.jsonl, line 1{rule}"):
        read_samples(write(tmp_path / "tasks.jsonl", line))


def test_files_that_are_rejected(tmp_path):
    with pytest.raises(DataError, match="has no lines"):
        read_samples(write(tmp_path / "empty", "\n"))
    with pytest.raises(DataError, match="cannot be read as UTF-8 text: .*No such file"):
        read_samples(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text: "):
        read_samples(tmp_path / "latin")


def test_text_that_cannot_be_tokenized():
    with pytest.raises(DataError, match=r"tasks, line 3: .*'\\ud83d'.* surrogates not allowed"):
        tokenize(Sample("tasks, line 3", "t", "a \ud83d b", [(2, 5)]), ByteTokenizer())


def test_bytes_of_an_answer():
    text, answers = strip_marks(TEXT)
    sample = tokenize(Sample("here", "t", text, answers), ByteTokenizer())
    assert sample.ids == list(PLAIN.encode())
    assert [bytes(sample.ids[i] for i in answer).decode() for answer in sample.answers] == ["fruit", "São Paulo"]
    assert not sample.crosses_mark


def answers_in(marked, tokenizer):
    """Tokens of each answer, and whether a token crosses a mark."""
    sample = tokenize(Sample("here", "t", *strip_marks(marked)), tokenizer)
    names = [[tokenizer.decode([sample.ids[i]]) for i in answer] for answer in sample.answers]
    assert sample.ids == tokenizer.encode(strip_marks(marked)[0])
    return names, sample.crosses_mark


def test_a_token_may_begin_with_the_space_before_the_answer(tmp_path):
    tokenizer = tokenizer_of(tmp_path / "t.json", " abc\n", [(" ", "a"), (" ", "b")])
    assert answers_in("c [ abc ]\nb", tokenizer) == ([[" a", "b", "c"]], False)
    assert answers_in("c[ abc ]\nb[ b ]", tokenizer) == ([["a", "b", "c"], ["b"]], False)
    assert answers_in("c [ c ]", tokenizer) == ([["c"]], False)  # the space is a token of its own
    assert answers_in("c[  a ]", tokenizer) == ([[" a"]], False)


def test_tokens_of_sentencepiece(tmp_path):
    library = Tokenizer(models.BPE({t: i for i, t in enumerate(["<eos>", *"▁abc\n", "▁a"])}, [("▁", "a")]))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Metaspace()
    library.save(str(tmp_path / "t.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "t.json", "<eos>")
    sample = tokenize(Sample("here", "t", *strip_marks("c b [ ab ]\nb")), tokenizer)
    assert [library.id_to_token(sample.ids[i]) for i in sample.answers[0]] == ["▁a", "b"]
    assert not sample.crosses_mark


@pytest.mark.parametrize(
    ("marked", "expected", "crosses"),
    [
        ("Ann has a kind of [ the river ]", [["▁the", "▁river"]], False),
        ("Ann has a [ kind ] of [ fruit ].", [["▁kind"], ["▁fruit."]], True),
        ("the r[ ive ]r is a [ stream ]", [["▁river"], ["▁stream"]], True),
        ("a kind of [ € ]", [["<0xE2>", "<0x82>", "<0xAC>"]], False),
    ],
)
def test_a_text_is_tokenized_as_a_whole(llama_tokenizer, marked, expected, crosses):
    tokenizer = HuggingFaceTokenizer(llama_tokenizer, "</s>")
    sample = tokenize(Sample("here", "t", *strip_marks(marked)), tokenizer)
    assert sample.ids == tokenizer.encode(strip_marks(marked)[0])
    names = Tokenizer.from_file(str(llama_tokenizer)).id_to_token
    assert [[names(sample.ids[i]) for i in answer] for answer in sample.answers] == expected
    assert sample.crosses_mark == crosses


@pytest.mark.parametrize(
    ("merges", "marked", "expected"),
    [
        ([("a", "\n")], "c [ a ]\nb [ a ]", [["a\n"], ["a"]]),  # a token ends after an answer
        ([("c", "a")], "bc[ a ]", [["ca"]]),  # a token begins before it
        ([("c", " "), ("c ", "a")], "bc [ ab ] b", [["c a", "b"]]),  # and before the space
        ([("a", "b")], "c[ a ][ b ]", [["ab"], ["ab"]]),  # a token belongs to two answers
        ([(" ", "a"), (" a", "\n")], "c [ a ]\nb", [[" a\n"]]),
    ],
)
def test_a_token_that_crosses_a_mark_belongs_to_the_answer(tmp_path, merges, marked, expected):
    assert answers_in(marked, tokenizer_of(tmp_path / "t.json", " abc\n", merges)) == (expected, True)


class WithoutZ:
    """A tokenizer of characters that skips every z."""

    def encode_with_offsets(self, text):
        offsets = [(i, i + 1) for i, letter in enumerate(text) if letter != "z"]
        return [ord(text[begin]) for begin, _ in offsets], offsets


@pytest.mark.parametrize(
    ("marked", "what"), [("a [ b ] [ z ]", "2: .* for it"), ("z[ b ]", "1: .* for the text before")]
)
def test_text_without_tokens(marked, what):
    with pytest.raises(DataError, match=f"here: answer {what}"):
        tokenize(Sample("here", "t", *strip_marks(marked)), WithoutZ())
