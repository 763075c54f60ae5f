"""Folders of Hugging Face: compressed as they are, and loaded by transformers as any other."""
