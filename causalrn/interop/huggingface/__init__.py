"""Models as Hugging Face folders: written with their own modelling code, and read back."""
