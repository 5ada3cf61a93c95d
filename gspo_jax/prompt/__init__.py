"""From a conversation to token ids and back.

In reading order:

    tokenizer      the chat template applied, ids made, and special tokens known
    chat_template  templates are programs that came with a model: run without trusting them
    sandbox        the budget that they run in
"""
