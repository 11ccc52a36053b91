"""Scripts that time the operators and the training, and the dated records; no part of the wheel."""
