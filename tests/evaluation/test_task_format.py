"""The JSONL of in-context tasks: what is read, what is refused, and which tokens are an answer."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dcscale.data import ByteTokenizer, DataError, HuggingFaceTokenizer
from dcscale.evaluation.task_format import Sample, read_samples, tokenise, unmarked

TEXT = "\n< Ann has a plum. >. Ann has a kind of [ fruit ]\n< Bo likes São Paulo. >. Bo likes [ São Paulo ]\n"
PLAIN = "\n< Ann has a plum. >. Ann has a kind of fruit\n< Bo likes São Paulo. >. Bo likes São Paulo\n"


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def tokenizer_of(path, vocabulary, merges=()):
    """A BPE tokenizer that splits at nothing, of these letters and what their merges give."""
    tokens = ["<eos>", *vocabulary, *("".join(pair) for pair in merges)]
    library = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    library.save(str(path))
    return HuggingFaceTokenizer(path, "<eos>")


def test_the_marks_are_no_part_of_the_text():
    text, answers = unmarked(TEXT)
    assert text == PLAIN
    assert [text[slice(*answer)] for answer in answers] == ["fruit", "São Paulo"]


def test_only_one_space_inside_of_each_bracket_is_a_mark():
    text, answers = unmarked("a[b] c[  d  ]e")
    assert text == "ab c d e"
    assert [text[slice(*answer)] for answer in answers] == ["b", " d "]


@pytest.mark.parametrize(
    ("marked", "rule"),
    [
        ("plain text", "no answer is marked"),
        ("a [ b", r"'\[' in 'a \[ b' has no partner"),
        ("a b ] c", r"'\]' in 'a b \] c' has no partner"),
        ("a [ b ] c ] d", r"'\]' in ' c \] d' has no partner"),
        ("a [ b [ c ] ]", r"'\[' in 'a \[ b ' has no partner"),
        ("a [ b ] [ ]", r"answer 2, '\[ \]', is empty"),
        ("a []", r"answer 1, '\[\]', is empty"),
        ("\n[ b ] c", "nothing stands before the first answer"),
    ],
)
def test_marks_that_are_refused(marked, rule, tmp_path):
    path = write(tmp_path / "tasks.jsonl", {"task_id": "t", "texts": TEXT}, {"task_id": "t", "texts": marked})
    with pytest.raises(DataError, match=rf"tasks\.jsonl, line 2: .*{rule}"):
        read_samples(path)


def test_a_file(tmp_path):
    path = write(
        tmp_path / "tasks.jsonl", {"task_id": "t", "texts": TEXT, "more": 1}, "\n", {"task_id": "", "texts": TEXT}
    )
    samples = read_samples(path)
    assert [sample.task for sample in samples] == ["t", ""]
    assert samples[1].where == f"{path}, line 3"
    assert samples[1].text == PLAIN


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{'task_id': 1}\n", "is no JSON: "),
        ("[" * 100_000 + "\n", "is no JSON: "),
        ([1], "is a list, but must be an object"),
        ({"texts": TEXT}, "task_id is None, but must be a text"),
        ({"task_id": "t", "texts": [TEXT]}, "texts is .*, but must be a text"),
    ],
)
def test_lines_that_are_refused(tmp_path, line, rule):
    with pytest.raises(DataError, match=rf"tasks\.jsonl, line 1: {rule}"):
        read_samples(write(tmp_path / "tasks.jsonl", line))


def test_files_that_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no line"):
        read_samples(write(tmp_path / "empty", "\n"))
    with pytest.raises(DataError, match="cannot be read as UTF-8 text: .*No such file"):
        read_samples(tmp_path / "absent")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text: "):
        read_samples(tmp_path / "latin")


def test_bytes_of_an_answer():
    text, answers = unmarked(TEXT)
    sample = tokenise(Sample("here", "t", text, answers), ByteTokenizer())
    assert sample.ids == list(PLAIN.encode())
    assert [bytes(sample.ids[i] for i in answer).decode() for answer in sample.answers] == ["fruit", "São Paulo"]
    assert not sample.in_pieces


def answers_in(marked, tokenizer):
    """Tokens of each answer, and whether the text was cut."""
    sample = tokenise(Sample("here", "t", *unmarked(marked)), tokenizer)
    names = [[tokenizer.decode([sample.ids[i]]) for i in answer] for answer in sample.answers]
    assert "".join(tokenizer.decode([i]) for i in sample.ids) == unmarked(marked)[0]
    return names, sample.in_pieces


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
    sample = tokenise(Sample("here", "t", *unmarked("c b [ ab ]\nb")), tokenizer)
    assert [library.id_to_token(sample.ids[i]) for i in sample.answers[0]] == ["▁a", "b"]
    assert not sample.in_pieces


@pytest.mark.parametrize(
    ("merges", "marked", "expected"),
    [
        ([("a", "\n")], "c [ a ]\nb [ a ]", [["a"], ["a"]]),  # a token ends behind an answer
        ([("c", "a")], "c[ a ]", [["a"]]),  # one begins before it
        ([("c", " "), ("c ", "a")], "bc [ ab ] b", [["a", "b"]]),  # before the space, too
        ([("a", "b")], "c[ a ][ b ]", [["a"], ["b"]]),  # one is of two answers
        ([("a", "\n"), (" ", "a")], "c [ a ]\nb", [[" a"]]),
    ],
)
def test_a_text_is_cut_where_a_token_reaches_across_a_mark(tmp_path, merges, marked, expected):
    assert answers_in(marked, tokenizer_of(tmp_path / "t.json", " abc\n", merges)) == (expected, True)


class WithoutZ:
    """A tokenizer of letters that passes over every z."""

    def encode_with_places(self, text):
        places = [(i, i + 1) for i, letter in enumerate(text) if letter != "z"]
        return [ord(text[begin]) for begin, _ in places], places


@pytest.mark.parametrize(("marked", "what"), [("a [ b ] [ z ]", "2: .* for it"), ("z[ b ]", "1: .* for what stands")])
def test_text_that_the_tokenizer_does_not_know(marked, what):
    with pytest.raises(DataError, match=f"here: answer {what}"):
        tokenise(Sample("here", "t", *unmarked(marked)), WithoutZ())
