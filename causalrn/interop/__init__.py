"""Other programs' formats: the official code's state dicts, Hugging Face folders, lm-evaluation-harness, exported steps."""
