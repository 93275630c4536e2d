"""The demo language model: the text it learns, its tokenizer, and how it is trained."""
