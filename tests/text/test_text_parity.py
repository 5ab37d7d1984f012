"""Live comparison: transformers loads a saved folder and gives the same ids and the same conversations."""

import pytest

from glm45_jax.text import SPECIAL_TOKENS, Tokenizer, train_tokenizer

from .conftest import CORPUS

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

TOOLS = [{"type": "function", "function": {"name": "f", "description": 'a <b> & "ü"', "parameters": {}}}]
ARGUMENTS = {"s": "a\n<b>", "n": 1.5, "o": {"k": ["é", None, True]}}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello 你好"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "x/nothink"}]}],
    [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<think>\nr\n</think>\n\na1"},
        {"role": "user", "content": "q2"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": " y ",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}},
                {"name": "g", "arguments": {}},
            ],
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": " done \n"},
        {"role": "tool", "content": [{"output": "3"}, {"output": "4"}]},
    ],
]


@pytest.fixture(scope="module", params=["glm-4.5", "glm-4.7"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    ours = train_tokenizer(CORPUS, 600, chat_template=request.param, split_digits=request.param == "glm-4.7")
    ours.save(folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder), folder


def test_same_ids(pair):
    ours, theirs, folder = pair
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in [*CORPUS, "".join(SPECIAL_TOKENS), "a <think>b</think> /nothink<|user|>c", "", "\n\n", "é🎉\x00"]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == fast(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True)
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_ids[0], ours.pad_id)


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"clear_thinking": False}, {"tools": TOOLS}])
@pytest.mark.parametrize("prompt", [True, False])
def test_same_conversations(pair, kwargs, prompt):
    ours, theirs, _ = pair
    for messages in CONVERSATIONS:
        text = ours.render_chat(messages, add_generation_prompt=prompt, **kwargs)
        assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **kwargs) == text
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, **kwargs)["input_ids"]
        assert ids == ours.encode_chat(messages, add_generation_prompt=prompt, **kwargs)


OWN = (
    "{%- for m in messages %}{% generation %}{{ bos_token or '' }}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
    "{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{{ tools | tojson(indent=2) if tools }}{{ '>' if add_generation_prompt }}"
)


def test_same_text_of_a_checkpoints_own_template(pair):
    ours, _, folder = pair
    Tokenizer(ours.backend, OWN).save(folder / "own")
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "own")
    loaded = Tokenizer.load(folder / "own")
    for messages in CONVERSATIONS[:2]:
        for tools in (None, TOOLS):
            text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
            assert loaded.render_chat(messages, tools) == text


def test_a_tokenizer_that_transformers_saved_loads_here(pair, tmp_path):
    ours, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat_template == ours.chat_template
    assert loaded.encode(CORPUS[0]) == ours.encode(CORPUS[0])
    assert loaded.special_ids == ours.special_ids and loaded.pad_id == ours.pad_id
    assert loaded._hidden_ids == ours._hidden_ids
