"""Tokenizers: round trips, and every error of loading one."""

import dataclasses
import hashlib
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dcscale.data import ByteTokenizer, DataError, HuggingFaceTokenizer, load_tokenizer, read_manifest, tokenizer_files
from dcscale.data.prepare.build import build_shards
from dcscale.data.shards.manifest import write_manifest
from dcscale.data.storage import LocalStorage
from dcscale.testing.runs import write_token_shards

TEXT = "def f(x):\n    return 'äöü € 🙂'\n"


def make_tokenizer(path, special=("<|endoftext|>",)):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "return x and return y"] * 3, trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def tokenizer_json(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer.json")


def test_bytes_round_trip():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.spec, tokenizer.vocab_size, tokenizer.eos_id) == ("byte", 257, 256)
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode([*tokenizer.encode(TEXT), 256]) == TEXT
    assert [tokens.tolist() for tokens in tokenizer.encode_documents(["ä", ""])] == [[0xC3, 0xA4, 256], [256]]


def test_offsets_of_tokens(tokenizer_json):
    assert load_tokenizer("byte").encode_with_offsets("aö") == ([97, 0xC3, 0xB6], [(0, 1), (1, 2), (1, 2)])
    tokenizer = load_tokenizer(tokenizer_json)
    ids, offsets = tokenizer.encode_with_offsets(TEXT)
    assert ids == tokenizer.encode(TEXT)
    assert any(end > begin + 1 for begin, end in offsets)
    for token, (begin, end) in zip(ids, offsets):
        text = tokenizer.decode([token])
        assert text == TEXT[begin:end] or "\ufffd" in text  # part of a character


def test_invalid_bytes_decode_to_replacement_characters():
    assert load_tokenizer("byte").decode([104, 0xC3, 300, 105]) == "h\ufffd\ufffdi"


@pytest.mark.parametrize("kind", ["byte", "tokenizer_json", "llama_tokenizer"])
def test_a_continuation_is_decoded_with_its_prompt(kind, request):
    tokenizer = load_tokenizer("byte" if kind == "byte" else request.getfixturevalue(kind))
    text = "Ann has a kind of 🙂, 50 € or\ufffd of it"
    ids = tokenizer.encode(text)
    assert tokenizer.decode_continuation([], ids) == text
    for cut in range(1, len(ids) + 1):
        prompt, new = ids[:cut], ids[cut:]
        continuation = tokenizer.decode_continuation(prompt, [*new, tokenizer.eos_id])
        assert text.endswith(continuation)
        # What the prompt shows of a character that it only begins is part of the continuation.
        shown = text.removesuffix(continuation)
        assert tokenizer.decode(prompt).rstrip("\ufffd") == shown.rstrip("\ufffd")
    begun = tokenizer.encode("🙂")[:-1]
    assert tokenizer.decode_continuation(ids, begun).strip("\ufffd ") == ""


def test_the_space_before_a_continuation_is_kept(llama_tokenizer):
    tokenizer = load_tokenizer(llama_tokenizer)
    prompt = tokenizer.encode("Ann has a kind of")
    new = tokenizer.encode("Ann has a kind of the river")[len(prompt) :]
    assert (tokenizer.decode(new), tokenizer.decode_continuation(prompt, new)) == ("the river", " the river")


def test_hugging_face_round_trip(tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json)
    library = Tokenizer.from_file(str(tokenizer_json))
    assert tokenizer.encode(TEXT) == library.encode(TEXT).ids
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eos_id]) == TEXT
    assert tokenizer.eos_id == library.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert tokenizer.spec == str(tokenizer_json)
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer_json.read_bytes()).hexdigest()
    documents = tokenizer.encode_documents([TEXT, "x"])
    assert [tokens.tolist() for tokens in documents] == [[*tokenizer.encode(t), tokenizer.eos_id] for t in (TEXT, "x")]


def test_text_is_never_encoded_to_the_end_of_document_token(tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json)
    text = "a <|endoftext|> b"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_files_own_truncation_padding_and_template_are_not_applied(tokenizer_json):
    library = Tokenizer.from_file(str(tokenizer_json))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tokenizer_json))
    tokenizer = load_tokenizer(tokenizer_json)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_the_end_of_document_token_is_found_or_given(tmp_path):
    two = make_tokenizer(tmp_path / "two.json", special=("<eos>", "</s>", "<stop>"))
    none = make_tokenizer(tmp_path / "none.json", special=("<stop>",))
    assert load_tokenizer(two, "</s>").eos_id == 1
    assert load_tokenizer(none, "<stop>").eos_id == 0
    assert HuggingFaceTokenizer(two, 2).eos_id == 2
    for path, eos, shown in (
        (two, None, "</s>"),
        (none, None, r"found \[\]"),
        (two, "<x>", "'<x>'"),
        (two, 9999, "9999"),
        (two, -1, "-1"),
    ):
        with pytest.raises(DataError, match=rf"end-of-document token is ambiguous or missing.*{shown}.*--eos-token"):
            HuggingFaceTokenizer(path, eos)


def test_a_folder_of_shards_carries_its_tokenizer(tokenizer_json, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    build_shards([tmp_path / "a.txt"], tmp_path / "out", tokenizer=str(tokenizer_json))
    train = tmp_path / "out/train"
    assert read_manifest(train).tokenizer.spec == "tokenizer.json"
    files = tokenizer_files(LocalStorage(train), read_manifest(train))
    assert files == {"tokenizer.json": tokenizer_json.read_bytes()}
    tokenizer = load_tokenizer(train)
    tokenizer_json.unlink()
    assert tokenizer.encode(TEXT) == load_tokenizer(train).encode(TEXT)
    assert load_tokenizer(train).eos_id == read_manifest(train).tokenizer.eos_id

    make_tokenizer(train / "tokenizer.json", special=("<|endoftext|>", "<other>"))
    with pytest.raises(DataError, match=r"tokenizer\.fingerprint is .*, but the tokenizer there now has"):
        load_tokenizer(train)
    (train / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read: No such file.*put the tokenizer .* there"):
        load_tokenizer(train)


def test_a_folder_of_byte_shards(tmp_path):
    manifest = write_token_shards(tmp_path, [[[1, 256]]])
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    assert tokenizer_files(LocalStorage(tmp_path), manifest) == {}
    write_manifest(tmp_path, dataclasses.replace(manifest, tokenizer=dataclasses.replace(manifest.tokenizer, eos_id=0)))
    with pytest.raises(DataError, match=r"tokenizer\.eos_id is 0, but the tokenizer there now has 256"):
        load_tokenizer(tmp_path)


def test_the_byte_tokenizer_takes_no_eos_token():
    with pytest.raises(DataError, match=r"is 'byte', whose documents end with token 256, not '</s>'; leave it out"):
        load_tokenizer("byte", "</s>")


def test_a_folder_with_a_tokenizer_json(tokenizer_json):
    assert load_tokenizer(tokenizer_json.parent).spec == str(tokenizer_json)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(
        DataError, match=r"gpt2: cannot be read: No such file.*give 'byte', or a tokenizer\.json .*hf download"
    ):
        load_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(DataError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_text_that_a_tokenizer_cannot_encode_is_reported(tmp_path):
    library = Tokenizer(models.WordLevel({"known": 0, "</s>": 1}, unk_token="<unk>"))
    library.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert [ids.tolist() for ids in tokenizer.encode_documents(["known"])] == [[0, 1]]
    with pytest.raises(DataError, match=r"words\.json: cannot tokenize a document: .*UNK.*; give another tokenizer"):
        tokenizer.encode_documents(["known", "other"])
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        for text in ("other", "\ud83d"):
            with pytest.raises(
                DataError, match=r"words\.json: cannot tokenize '.*': .*; give another tokenizer or text"
            ):
                encode(text)


def test_without_the_tokenizers_package_bytes_work_and_the_error_has_a_hint(tokenizer_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer("byte").vocab_size == 257
    with pytest.raises(DataError, match=r"needs the tokenizers package.*pip install tokenizers.*'byte'"):
        load_tokenizer(tokenizer_json)
