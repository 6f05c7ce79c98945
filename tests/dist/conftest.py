"""Folders of tiny models for the tests that start ranks."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, make_llama, tokenizer) -> Path:
    """A tiny pretrained Llama's folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
