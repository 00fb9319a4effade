"""JSONL files of in-context tasks: texts with marked answers.

The format is that of the synthetic tasks of the DCFormer paper (Xiao et al., arXiv 2405.08553; the file
``data/synthetic_dataset.jsonl`` of Caiyun-AI/DCFormer). Each line is a JSON object with

* ``task_id``: string, the task that the line belongs to;
* ``texts``: string, usually several lines with examples and questions. Every ``[ answer ]`` in it is an answer to be
  predicted from everything before it. The brackets and one space inside each of them are marks, not part of the text:
  ``a kind of [ fruit ]`` is read as ``a kind of fruit``.

Other keys are ignored. Brackets can only be marks. A text has at least one answer, and text before the first answer.

The text is tokenized as a whole, without its marks, as in training: a piece tokenized alone can get other tokens
(SentencePiece begins each text with a space). The tokens of an answer are all that contain any of its characters. The
first one may begin with the white space before the answer, as in many tokenizers. If an answer begins or ends inside a
token, the model must predict the complete token; such texts are counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dcscale.data import DataError, Tokenizer
from dcscale.files import parse_json

_MARKED = re.compile(r"\[ ?([^\[\]]*?) ?\]")


@dataclass(frozen=True)
class Sample:
    """One line of a file."""

    location: str
    """File and line, for error messages."""
    task: str
    text: str
    """Without the marks."""
    answers: list[tuple[int, int]]
    """Character range [begin, end) of each answer."""


@dataclass(frozen=True)
class TokenizedSample:
    """A sample as token ids."""

    task: str
    ids: list[int]
    answers: list[range]
    """Positions in ``ids`` of each answer's tokens."""
    crosses_mark: bool
    """Whether a token contains characters of an answer and others, apart from white space before the answer."""


def read_samples(path: Path) -> list[Sample]:
    """Reads all lines of a file, except empty ones.

    Raises:
        DataError: the file cannot be read, has no sample, or a line breaks a rule; names file, line and rule.
    """
    samples = []
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    samples.append(_read_line(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not samples:
        raise DataError(f"{path}: has no lines")
    return samples


def _read_line(line: str, location: str) -> Sample:
    content = parse_json(line, location, DataError)
    if not isinstance(content, dict):
        raise DataError(f"{location}: is a {type(content).__name__}, but must be an object with task_id and texts")
    for key in ("task_id", "texts"):
        if not isinstance(content.get(key), str):
            raise DataError(f"{location}: {key} is {content.get(key)!r}, but must be a string")
        try:
            content[key].encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape
            raise DataError(f"{location}: {key} is not valid text: {error}") from error
    try:
        text, answers = strip_marks(content["texts"])
    except ValueError as error:
        raise DataError(f"{location}: {error}") from error
    return Sample(location, content["task_id"], text, answers)


def strip_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Returns a text without its marks, and the character range [begin, end) of each answer in it.

    Raises:
        ValueError: the marks break a rule of the format.
    """
    text, answers, end = "", [], 0
    for match in _MARKED.finditer(marked):
        text += _without_brackets(marked[end : match.start()])
        answer, end = match[1], match.end()
        if not answer.strip():
            raise ValueError(f"answer {len(answers) + 1}, {match[0]!r}, is empty: write it as [ answer ]")
        answers.append((len(text), len(text) + len(answer)))
        text += answer
    text += _without_brackets(marked[end:])
    if not answers:
        raise ValueError("no answer is marked in texts: write each as [ answer ]")
    if not text[: answers[0][0]].strip():
        raise ValueError("there is no text before the first answer to predict it from")
    return text, answers


def _without_brackets(text: str) -> str:
    if (found := re.search(r"[\[\]]", text)) is not None:
        around = text[max(0, found.start() - 20) : found.start() + 20]
        raise ValueError(
            f"{found[0]!r} in {around!r} is not part of a pair, but brackets only mark answers: [ answer ]"
        )
    return text


def tokenize(sample: Sample, tokenizer: Tokenizer) -> TokenizedSample:
    """Tokenizes a sample and finds the tokens of its answers.

    Raises:
        DataError: the text cannot be tokenized; or there are no tokens for an answer, or for the text before it.
    """
    try:
        ids, offsets = tokenizer.encode_with_offsets(sample.text)
    except ValueError as error:
        raise DataError(f"{sample.location}: {error}") from error
    answers = [_tokens_in(offsets, *answer) for answer in sample.answers]
    for number, tokens in enumerate(answers, 1):
        if not tokens or tokens.start == 0:
            missing = "it" if not tokens else "the text before it"
            raise DataError(f"{sample.location}: answer {number}: the tokenizer has no token for {missing}")
    crosses_mark = any(_cross(sample.text, offsets, *pair) for pair in zip(sample.answers, answers))
    return TokenizedSample(sample.task, ids, answers, crosses_mark)


def _tokens_in(offsets: list[tuple[int, int]], begin: int, end: int) -> range:
    """Positions of the tokens that contain any of the characters [begin, end)."""
    found = [position for position, (first, last) in enumerate(offsets) if first < end and last > begin]
    return range(found[0], found[-1] + 1) if found else range(0)


def _cross(text: str, offsets: list[tuple[int, int]], answer: tuple[int, int], tokens: range) -> bool:
    """Whether an answer's tokens contain more than the answer and white space before it."""
    begin, end = min(offsets[i][0] for i in tokens), max(offsets[i][1] for i in tokens)
    return bool(text[begin : answer[0]].strip()) or end > answer[1]
