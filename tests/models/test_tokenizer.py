"""The tokenizer and the chat template of a checkpoint."""

from __future__ import annotations

import codecs
import json
import random
import sys
from pathlib import Path

import pytest
import tokenizers

from flashmla_jax.models import load_tokenizer

BOS, EOS, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"
# In the manner of DeepSeek-V3's: a system prompt, then turns.
TEMPLATE = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = ns.system + message['content'] %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|User|>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token }}
    {%- elif message['role'] != 'system' %}
        {{- raise_exception('no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": "be brief "},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "hm</think>two"},
    {"role": "user", "content": "three"},
]
TEXT = f"{BOS}be brief {USER}one two{ASSISTANT}two{EOS}{USER}three"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A byte-level tokenizer with DeepSeek's special tokens, whose ids follow the 256 bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, USER, ASSISTANT])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, **changes) -> None:
    config = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": BOS, "lstrip": False},
        "eos_token": EOS,
        "pad_token": None,
        "model_max_length": 16384,
        "chat_template": TEMPLATE,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))


def test_text_there_and_back(folder):
    tokenizer = load_tokenizer(folder)
    text = "naïve — 日本 <b>"
    ids = tokenizer.encode(text)
    assert ids[0] == 256
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == BOS + text
    assert tokenizer.vocab_size == 260


def test_the_first_token_is_added_once(folder):
    """Whether `tokenizer.json` adds it too, or the text has it."""
    assert load_tokenizer(folder).encode(BOS + "a")[:2] != [256, 256]
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 256)]
    )
    inner.save(str(folder / "tokenizer.json"))
    ids = load_tokenizer(folder).encode("a")
    assert ids[0] == 256
    assert len(ids) == 2


def test_the_first_token_is_not_added_unasked(folder):
    write_config(folder, add_bos_token=False)
    assert len(load_tokenizer(folder).encode("a")) == 1
    (folder / "tokenizer_config.json").unlink()
    assert len(load_tokenizer(folder).encode("a")) == 1


def test_chat(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.has_chat_template
    assert tokenizer.chat_text(MESSAGES) == TEXT + ASSISTANT
    assert tokenizer.chat_text(MESSAGES, add_generation_prompt=False) == TEXT
    tools = [{"name": "größe", "html": "<b>"}]
    assert tokenizer.chat_text(MESSAGES, add_generation_prompt=False, tools=tools) == (
        TEXT + '[{"name": "größe", "html": "<b>"}]'
    )
    ids = tokenizer.apply_chat_template(MESSAGES)
    assert [i for i in ids if i >= 256] == [256, 258, 259, 257, 258, 259]
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT + ASSISTANT


def test_a_template_in_a_file_of_its_own(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(folder).chat_text(MESSAGES) == "be brief "


def test_named_templates(folder):
    templates = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ messages | length }}"},
    ]
    write_config(folder, chat_template=templates)
    assert load_tokenizer(folder).chat_text(MESSAGES) == "4"


def test_no_template(folder):
    write_config(folder, chat_template=None)
    tokenizer = load_tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match=r"has no chat template: neither chat_template\.jinja nor"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("messages", ["hello", [{"content": "hello"}], ["hello"]])
def test_messages_that_are_none(folder, messages):
    with pytest.raises(ValueError, match=r"messages must be mappings with a role each, .*hello"):
        load_tokenizer(folder).apply_chat_template(messages)


def test_messages_that_the_template_refuses(folder):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match="does not take the messages: no role critic"):
        tokenizer.apply_chat_template([{"role": "critic", "content": ""}])
    with pytest.raises(ValueError, match="does not take the messages"):
        tokenizer.apply_chat_template([{"role": "user", "content": None}])
    write_config(folder, chat_template="{% if %}")
    with pytest.raises(ValueError, match="does not take the messages"):
        load_tokenizer(folder).apply_chat_template(MESSAGES)


def test_a_template_cannot_reach_out(folder):
    write_config(folder, chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="unsafe"):
        load_tokenizer(folder).chat_text(MESSAGES)


def test_files_that_are_missing_or_damaged(folder):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json$"):
        load_tokenizer(folder)
    (folder / "tiktoken.model").touch()
    with pytest.raises(FileNotFoundError, match=r"it has tiktoken\.model, which is not read here"):
        load_tokenizer(folder)


def test_packages_that_are_missing(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"needs the jinja2 package: pip install"):
        tokenizer.apply_chat_template(MESSAGES)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs the tokenizers package: pip install"):
        load_tokenizer(folder)


# --- Text that comes in pieces -------------------------------------------------------------------


def test_stream_gives_whole_characters(folder):
    """When Python's own decoder of UTF-8 gives them."""
    tokenizer = load_tokenizer(folder)
    text = "a \u00e9 \u20ac\U0001d11e\n" + "".join(map(chr, range(0x7F0, 0x810)))
    stream, utf8 = tokenizer.stream(), codecs.getincrementaldecoder("utf-8")()
    for token, byte in zip(tokenizer.encode(text)[1:], text.encode(), strict=True):
        assert stream.step(token) == utf8.decode(bytes([byte]))
    assert stream.finish() == ""


@pytest.mark.parametrize("seed", range(5))
def test_stream_gives_all_that_decoding_gives(folder, seed):
    """Of any tokens, which need not be text: special ones, and halves of characters."""
    tokenizer = load_tokenizer(folder)
    ids = random.Random(seed).choices(range(tokenizer.vocab_size), k=300)
    stream = tokenizer.stream()
    pieces = [stream.step(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert sum(map(bool, pieces)) > 100


def test_stream_of_words(folder):
    """The first of them has no space before it."""
    vocabulary = {"\u2581two": 0, "\u2581words": 1, "!": 2}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="!"))
    model.decoder = tokenizers.decoders.Metaspace()
    model.save(str(folder / "tokenizer.json"))
    stream = load_tokenizer(folder).stream()
    assert [stream.step(token) for token in (0, 1, 2, 0)] == ["two", " words", "!", " two"]
    assert stream.finish() == ""
