"""What times the operators and the training, and the dated records; a tool of the checkout, not of the wheel."""
