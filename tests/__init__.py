"""Tests, a folder for each of the project's, and what they share."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
