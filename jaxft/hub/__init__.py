"""Other people's files, both ways: Hugging Face folders, GGUF, PEFT adapters."""
