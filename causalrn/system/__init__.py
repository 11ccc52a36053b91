"""The machine: optional packages, free memory, the lock of a folder."""
