"""Arrays of JSON are read element by element, whatever is read at a time, and what is malformed is named."""

import io
import json
import random
from pathlib import Path

import pytest

from dcscale.data import DataError
from dcscale.data.prepare.json_files import array_elements

PATH = Path("a.json")


def elements(content, read_chars=1 << 20, **options):
    data = content if isinstance(content, bytes) else content.encode()
    return list(array_elements(PATH, io.BytesIO(data), read_chars=read_chars, **options))


def test_the_elements_do_not_depend_on_what_is_read_at_a_time():
    generator = random.Random(0)
    values = [{"text": 'ä[]{}"\\, \n' * generator.randrange(9), "n": [i, {"x": None}]} for i in range(50)]
    values += [1, -2.5e3, True, None, "]", [], {}, [[["deep"]]]]
    for indent in (None, 1):
        content = json.dumps(values, ensure_ascii=False, indent=indent)
        for read_chars in (1, 7, 100, 1 << 20):
            found = elements(f" \n{content}\n\n", read_chars)
            assert [json.loads(element) for element in found] == values
    assert elements("[]") == elements("\ufeff [ ] \n", 1) == []


def test_bytes_that_are_not_utf8_stay_in_their_element():
    assert elements(b'["\xff\xfe", "ok"]', 2) == [b'"\xff\xfe"', b'"ok"']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"text": "a"}',
            r"a\.json: element 1 of its array is not complete JSON: the file ends; correct the file, or",
        ),
        ("[1, 2", r"element 2 of its array is not complete JSON: the file ends"),
        ("[1, 2,]", r"element 3 of its array is not complete JSON: Expecting value"),
        ("[1, {'x': 2}]", r"element 2 of its array is not complete JSON: Expecting property name"),
        ("[1 2]", r"element 1 of its array is followed by '2'; correct the file"),
        ("[1] [2]", r"has more after the end of its array; write it as JSON lines, or as one array"),
        ("[" * 100_000, r"element 1 of its array is nested too deeply; correct the file"),
    ],
)
@pytest.mark.parametrize("read_chars", [3, 1 << 20])
def test_malformed_arrays_are_named(content, message, read_chars):
    with pytest.raises(DataError, match=message):
        elements(content, read_chars)


def test_an_element_that_does_not_end_is_refused_before_the_file_is_in_memory():
    file = io.BytesIO(b'["' + b"x" * 100_000)
    with pytest.raises(DataError, match=r"element 1 of its array must end within 1,000 characters; .*JSON lines"):
        list(array_elements(PATH, file, read_chars=100, longest_chars=1000))
