"""JSONL of in-context tasks: texts in which answers are marked.

The format is that of the synthetic tasks of the DCFormer paper (Xiao et al., arXiv 2405.08553; the file
``data/synthetic_dataset.jsonl`` of Caiyun-AI/DCFormer). A line is a JSON object with

* ``task_id``: text, the task that it belongs to;
* ``texts``: text, usually some lines that state examples and questions. Every ``[ answer ]`` in it is an answer to be
  predicted from everything before it. The brackets and one space inside of each are marks and not part of the text:
  ``a kind of [ fruit ]`` is read as ``a kind of fruit``.

Other keys are not read. A bracket can only be a mark. A text has one answer at least, and words before the first.

Which tokens are an answer: the whole text is tokenised without its marks, and the answer has the tokens in which there
is any character of it. The first of them may begin with the white space before the answer, as tokens of many
tokenizers do, but where one reaches further beyond the answer, or ends behind it, the model could not be asked for the
answer alone. Such a text is cut before that white space and behind each answer, and its pieces are tokenised one by
one.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from dcscale.data import DataError, Tokenizer

_MARKED = re.compile(r"\[ ?([^\[\]]*?) ?\]")


@dataclass(frozen=True)
class Sample:
    """A line of a file."""

    where: str
    """File and line, for messages."""
    task: str
    text: str
    """Without the marks."""
    answers: list[tuple[int, int]]
    """Characters [begin, end) of each answer."""


@dataclass(frozen=True)
class TokenSample:
    """A sample in tokens."""

    task: str
    ids: list[int]
    answers: list[range]
    """Numbers of each answer's tokens."""
    in_pieces: bool
    """Whether the text was cut at its marks."""


def read_samples(path: Path) -> list[Sample]:
    """All lines of a file, but empty ones.

    Raises:
        DataError: it cannot be read, holds no sample, or a line breaks a rule; names file, line and rule.
    """
    samples = []
    try:
        with open(path, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    samples.append(_read_line(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not samples:
        raise DataError(f"{path}: holds no line")
    return samples


def _read_line(line: str, where: str) -> Sample:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: is a {type(content).__name__}, but must be an object with task_id and texts")
    for key in ("task_id", "texts"):
        if not isinstance(content.get(key), str):
            raise DataError(f"{where}: {key} is {content.get(key)!r}, but must be a text")
    try:
        text, answers = unmarked(content["texts"])
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    return Sample(where, content["task_id"], text, answers)


def unmarked(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks, and the characters [begin, end) of each answer in it.

    Raises:
        ValueError: the marks are not as the format has them.
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
        raise ValueError("nothing stands before the first answer, from which it could be predicted")
    return text, answers


def _without_brackets(text: str) -> str:
    if (found := re.search(r"[\[\]]", text)) is not None:
        around = text[max(0, found.start() - 20) : found.start() + 20]
        raise ValueError(f"{found[0]!r} in {around!r} has no partner, but brackets only mark answers, one in each pair")
    return text


def tokenise(sample: Sample, tokenizer: Tokenizer) -> TokenSample:
    """Tokens of a sample.

    Raises:
        DataError: the tokenizer has no tokens for an answer, or none for what stands before it.
    """
    ids, places = tokenizer.encode_with_places(sample.text)
    answers = [_tokens_in(places, *answer) for answer in sample.answers]
    whole = all(_apart(sample.text, places, *both) for both in zip(sample.answers, answers))
    if not whole:
        ids, places = _encode_pieces(sample, tokenizer)
        answers = [_tokens_in(places, *answer) for answer in sample.answers]
    for number, tokens in enumerate(answers, 1):
        if not tokens or tokens.start == 0:
            what = "it" if not tokens else "what stands before it"
            raise DataError(f"{sample.where}: answer {number}: the tokenizer has no token for {what}")
    return TokenSample(sample.task, ids, answers, not whole)


def _tokens_in(places: list[tuple[int, int]], begin: int, end: int) -> range:
    found = [number for number, place in enumerate(places) if place[0] < end and place[1] > begin]
    return range(found[0], found[-1] + 1) if found else range(0)


def _apart(text: str, places: list[tuple[int, int]], answer: tuple[int, int], tokens: range) -> bool:
    """Whether an answer's tokens hold nothing else but white space before it."""
    if not tokens:
        return True
    begin, end = min(places[i][0] for i in tokens), max(places[i][1] for i in tokens)
    return not text[begin : answer[0]].strip() and end <= answer[1]


def _encode_pieces(sample: Sample, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    cuts = [0]
    for begin, end in sample.answers:
        cuts += [max(cuts[-1], len(sample.text[:begin].rstrip())), end]
    cuts.append(len(sample.text))
    ids, places = [], []
    for begin, end in itertools.pairwise(cuts):
        piece_ids, piece_places = tokenizer.encode_with_places(sample.text[begin:end])
        ids += piece_ids
        places += [(begin + first, begin + last) for first, last in piece_places]
    return ids, places
