"""One small tokenizer for the whole folder, trained on text written here."""

import pytest

from glm45_jax.text import Tokenizer, train_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It doesn't stop; they'll run, we've seen it, I'm sure.\n" * 4,
    "def add(a, b):\n    return a + b\n\n\nfor i in range(100):\n    print(add(i, 2024))\n" * 4,
    "天气很好，你好，世界！\n今日は世界。\nÜber größere Straßen, déjà vu, ñandú.\n" * 4,
    "12 + 30 = 42, 123456789, 3.14159; 2024-05-17 and 1,000,000.\r\n\r\n\ttab\t" * 4,
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n' * 4,
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 480)
