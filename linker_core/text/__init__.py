"""Tokenizers, chat templates and incremental detokenisation. Needs no torch."""
