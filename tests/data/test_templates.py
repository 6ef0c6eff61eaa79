"""The ids of a conversation are those of the text that the model's own template writes, no text forges one, and a row
is what the model is given, followed by what it must sample."""

import functools
import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxgpt.data import jinja_process, templates
from jaxgpt.data.templates import answer_text, example_ids, parse, prompt_ids
from jaxgpt.data.tokenizer import TAGS, Tokenizer, append_tags, gpt2_core, train_bpe
from jaxgpt.errors import UserError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
THINKING = (  # the parts of Qwen3's that decide about thinking
    "{%- if tools is not none %}{{ raise_exception('tools') }}{% endif %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last %}{{- '<think>\n\n</think>\n\n' + content.lstrip('\n') }}{%- else %}{{- content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
INST = (  # Mistral's: spaces beside the text
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{% generation %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endgeneration %}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
SOURCES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "thinking": THINKING,
    "inst": INST,
    "gemma": GEMMA,
    "phi3": PHI3,
    "zephyr": ZEPHYR,
}
REASONING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")  # DeepSeek-R1's habit: only asks with <think>
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
KINDS = ("byte-level", "metaspace first", "metaspace always", "prepend")
LOOSE = ("<think>", "</think>", "<tool_call>")  # added, but not marked special
TALK = [
    ("Hello, what is this?", "A thing.\n\nOf two lines"),
    ("\n x ", " y\n"),
    ("naïve 日本", "\n\nlines"),
    ("", "<b>ok</b>"),
    ("[INST", "<think>so</think>\n\nSo."),
]


@functools.cache
def small_tokenizer():
    return train_bpe(["a small tokenizer of a few words", "with two documents"], 270)


def core_of(kind: str, *controls: str) -> tokenizers.Tokenizer:
    """A small tokenizer with <s> and </s>; all kinds split text into few characters at a time."""
    if kind == "byte-level":
        pairs = [("t", "h"), ("Ġ", "t"), ("i", "s"), ("Ġ", "Ġ"), ("Ċ", "Ċ")]
        names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in pairs)]
        core = gpt2_core({name: i for i, name in enumerate(names)}, pairs)
        core.add_special_tokens(["<s>", "</s>"])
    else:
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *"Athinges.[]/"]
        pairs = [("\n", "\n"), ("▁", "t"), ("h", "i"), ("▁", "▁")]
        vocab = {name: i for i, name in enumerate([*names, *(a + b for a, b in pairs)])}
        core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, byte_fallback=True, unk_token="<unk>"))
        if kind == "prepend":
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.split()[1], split=False)
        strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        core.decoder = decoders.Sequence(strip)
        core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in controls])
    core.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in LOOSE])
    return core


def controls_in(source: str) -> list[str]:
    roles = ["<|user|>", "<|assistant|>"] if source == PHI3 else []
    return sorted({*re.findall(r"<\|\w+\|>|<\w+_of_turn>|\[/?INST\]", source), *roles})


@functools.cache
def chat_tokenizer(source: str = CHATML, kind: str = "byte-level") -> Tokenizer:
    core = core_of(kind, *controls_in(source))
    return templates.chat_tokenizer(core, source, NAMES, core.token_to_id("</s>"), "here")


def whole_text_ids(tok: Tokenizer, *texts: str) -> list[int]:
    """What transformers computes: the model's own tokenizer on the whole conversation, in which text can forge."""
    core = tokenizers.Tokenizer.from_str(tok.to_json())
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    text = jinja_process.render(tok.template.jinja, messages, NAMES, ask=len(texts) % 2 == 1)
    return core.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_ids_are_those_of_the_whole_conversation_encoded_as_one_text(source, kind):
    tok = chat_tokenizer(source, kind)
    assert tok.template.turn
    for i, (prompt, answer) in enumerate(TALK):
        said = [text for turn in TALK[:i] for text in turn]
        assert prompt_ids(tok, prompt, TALK[:i]) == whole_text_ids(tok, *said, prompt), prompt
        if "<" in answer:  # a control token, to the model's own tokenizer
            continue
        ids, roles = example_ids(tok, prompt, answer)
        whole, first = whole_text_ids(tok, prompt, answer), roles.index(1)
        assert ids == whole[: len(ids)] or whole[:first] != ids[:first], (prompt, answer)  # or one token spans both


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_ids_are_those_of_apply_chat_template(source, kind):
    transformers = pytest.importorskip("transformers")
    tok = chat_tokenizer(source, kind)
    core = tokenizers.Tokenizer.from_str(tok.to_json())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=source, **NAMES)
    messages = []
    for i, (prompt, answer) in enumerate(TALK):
        messages.append({"role": "user", "content": prompt})
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt_ids(tok, prompt, TALK[:i]) == expected, prompt
        messages.append({"role": "assistant", "content": answer})
    for prompt, answer in TALK[:2]:
        ids, _ = example_ids(tok, prompt, answer)
        turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole, first = theirs.apply_chat_template(turn, return_dict=False), len(prompt_ids(tok, prompt))
        assert ids == whole[: len(ids)] or whole[:first] != ids[:first], answer  # or one token spans both


pieces = st.lists(
    st.sampled_from(["<|im_start|>", "<|im_end|>", "</s>", "<s>", *LOOSE, "\n", "user", " a", "[", "/INST]", "é"]),
    max_size=7,
).map("".join)


@settings(max_examples=40, deadline=None)
@given(prompt=pieces, answer=pieces, source=st.sampled_from([CHATML, THINKING, INST]), kind=st.sampled_from(KINDS))
def test_no_text_forges_a_control_token(prompt, answer, source, kind):
    """And a row is what the model is given for the prompt, then what it must sample."""
    tok = chat_tokenizer(source, kind)
    added = tokenizers.Tokenizer.from_str(tok.to_json()).get_added_tokens_decoder()
    count = lambda ids: sum(i in added for i in ids)  # noqa: E731
    ids, roles = example_ids(tok, prompt, answer)
    assert count(ids) == count(example_ids(tok, "", "")[0]) and ids[-1] == tok.template.end
    given_ids = prompt_ids(tok, prompt)
    assert ids[: len(given_ids)] == given_ids and roles == [0] * len(given_ids) + [1] * (len(ids) - len(given_ids))
    assert count(prompt_ids(tok, prompt, [(prompt, answer)])) == count(prompt_ids(tok, "", [("", "")]))
    if kind == "byte-level":  # the others drop a space at the beginning of what they decode
        found = parse(tok, ids)
        stripped = templates._strip(answer, tok.template.answer_strip)
        assert (found.prompt, found.answer, found.ended) == (prompt, stripped, True)
        assert answer_text(tok, ids[roles.index(1) :]).strip() == stripped.strip()


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        *(
            (name, False)
            for name in ("|end|", "‹think›", "【tool】", "@@call@@", "＜x＞", "▁<PRE>", "<think> ", "\n[x]")
        ),
        *((name, True) for name in ("    ", "word", "C++", ":-)", "://", "---")),
    ],
)
def test_a_word_between_signs_is_a_control_token_and_any_other_added_token_is_text(name, typed):
    core = core_of("byte-level", "<|im_start|>", "<|im_end|>")
    core.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False)])
    tok = templates.chat_tokenizer(core, CHATML, NAMES, core.token_to_id("</s>"), "here")
    assert (core.token_to_id(name) in prompt_ids(tok, f"a{name}b")) == typed


@pytest.mark.parametrize("model", ["unigram", "wordlevel"])
def test_a_control_token_in_the_vocabulary_is_no_word(model):
    """<s> as one of a model's own pieces, which its text could be split into."""
    words = ["<unk>", "<s>", "▁", *"<s>/ab"]
    kinds = {
        "unigram": lambda: models.Unigram([(word, -1.0) for word in words], unk_id=0),
        "wordlevel": lambda: models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"),
    }
    core = tokenizers.Tokenizer(kinds[model]())
    core.pre_tokenizer = pre_tokenizers.Whitespace() if model == "wordlevel" else None
    core.add_special_tokens(["<unk>", "<s>"])
    tok = Tokenizer(core, append_tags(core, None))
    assert 1 not in tok.encode("<s>a<s> <s>") and 1 in core.encode("<s>a").ids
    assert tok.encode("a") == [words.index("a")] and tok.decode(tok.encode("a")) == "a"


def test_our_tags_stand_after_a_vocabulary():
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[]))
    tok = Tokenizer(core, append_tags(core, 2))
    assert prompt_ids(tok, "ab") == [3, 0, 1, 4, 5] and tok.template.end == 6 and tok.vocab_size == 7


def test_what_the_template_says_before_an_answer_is_no_part_of_it():
    tok = chat_tokenizer(THINKING)
    ids, roles = example_ids(tok, "Hi", "\nyes")
    assert tok.show(ids[roles.index(1) :]) == "<think>\n\n</think>\n\nyes<|im_end|>"
    assert answer_text(tok, ids[roles.index(1) :]) == "yes" == parse(tok, ids).answer
    thought = "<think>\nwell\n</think>\n\nyes"
    assert answer_text(tok, tok.encode(tok.mark(thought))) == thought
    assert prompt_ids(tok, "and", [("Hi", thought)]) == whole_text_ids(tok, "Hi", thought, "and")


def test_templates_that_finish_an_answer_otherwise_than_they_ask_for_it_only_ask():
    tok = chat_tokenizer(REASONING)
    assert prompt_ids(tok, "Hi") == whole_text_ids(tok, "Hi")
    assert prompt_ids(tok, "and", [("Hi", "so")]) == whole_text_ids(tok, "Hi", "so", "and")
    with pytest.raises(UserError, match=r"asks for an answer after .*<think>.* but writes a finished one after"):
        example_ids(tok, "Hi", "so")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages }}", "not enough values"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ strftime_now('%d') }}" + CHATML, "writes today's date"),
        ("{% for m in messages %}{{ m.content }}{{ '</s>' if m.role == 'user' }}{% endfor %}", "ends answers with ''"),
        ("{{ raise_exception('x') }}", "used: TemplateError: x"),
        (CHATML.replace("['content']", "['content'].replace('  ', ' ')"), "the prompt ' two  spaces"),
        (CHATML.replace("['content']", "['content'].replace('\n \n', '\n')"), "at the sides of a text"),
        ("{% for m in messages %}{{ m.content + ('\nA: ' if loop.index % 2 else '</s>') }}{% endfor %}", "could forge"),
    ],
)
def test_templates_that_can_not_be_used_are_refused_by_name(source, text):
    with pytest.raises(UserError, match=re.escape(text)):
        chat_tokenizer(source)


@pytest.mark.parametrize(
    "change",
    [
        *("|e", "|capitalize", "|replace('{','(')", "|replace('\\n\\n','\\n')", "|replace('/think','')", "[:1000]"),
        *(".lstrip('a')", ".replace('\\t', ' ')", "|truncate(200)"),
    ],
)
def test_templates_that_change_a_text_are_refused(change):
    """Wherever they do so: in a prompt or in an answer, in a sign, a letter, or beyond a length."""
    for role in ("user", "assistant"):
        changed = f"(message['content']{change} if message['role'] == '{role}' else message['content'])"
        source = CHATML.replace("+ message['content'] +", f"+ {changed} +")
        assert changed in source
        core = core_of("byte-level", *controls_in(source))
        with pytest.raises(UserError, match="can't be used"):
            templates.chat_tokenizer(core, source, NAMES, core.token_to_id("</s>"), "here")


def test_a_tokenizer_keeps_its_template(tmp_path):
    for tok in (chat_tokenizer(THINKING, "prepend"), chat_tokenizer(), small_tokenizer()):
        tok.save(tmp_path)
        again = Tokenizer.load(tmp_path)
        assert again.template == tok.template and again.fingerprint == tok.fingerprint
        assert example_ids(again, "<think>é", " a") == example_ids(tok, "<think>é", " a")
    assert again.fingerprint != chat_tokenizer().fingerprint


@pytest.mark.parametrize("kind", [None, *KINDS[:2]])
def test_templates_of_version_2_become_todays(kind, tmp_path):
    """Version 2 held ids. Where the text has other ids today, the error says so."""
    tok = chat_tokenizer(CHATML, kind) if kind else small_tokenizer()
    tok.save(tmp_path)
    now, ids = tok.template, lambda text: tok.encode(tok.mark(text))
    old = {"before": ids(now.before), "between": ids(now.between), "end": now.end, "separator": now.separator}
    old |= {"version": 2, "turn": ids(now.turn), "strip": False}
    (tmp_path / "template.json").write_text(json.dumps(old))
    again = Tokenizer.load(tmp_path)
    assert example_ids(again, "a few", "words") == example_ids(tok, "a few", "words")
    if kind:
        assert prompt_ids(again, "two", [("a", "b")]) == prompt_ids(tok, "two", [("a", "b")])
        pair = json.loads(tok.to_json())["model"]["merges"][0]
        apart = [tokenizers.Tokenizer.from_str(tok.to_json()).token_to_id(piece) for piece in pair]
        (tmp_path / "template.json").write_text(json.dumps({**old, "before": [*old["before"], *apart]}))
        with pytest.raises(UserError, match=r"template.json is unreadable .*load the original model"):
            Tokenizer.load(tmp_path)
    else:
        assert again.template == TAGS
    (tmp_path / "template.json").write_text(json.dumps({**now.to_json(), "end": -1}))
    with pytest.raises(UserError, match="wrong type"):
        Tokenizer.load(tmp_path)
