"""Ranges of settings: one line that names what lies outside of its interval, what it is, and what is wanted."""

from collections.abc import Sequence

Number = int | float


def check_range(owner: object, interval: str, **values: Number | Sequence[Number | None] | None) -> None:
    """Holds settings against an interval.

    Args:
        owner: the object that takes the settings, whose class is named; None where there is none.
        interval: in the notation of mathematics: "[1, inf)" holds 1 and above, "[0, 1)" holds 0 and not 1.
        values: numbers, or sequences of them, by name. None is a setting that is not used. NaN lies in no interval.

    Raises:
        ValueError: naming the first value outside.
    """
    for name, value in values.items():
        numbers = value if isinstance(value, Sequence) else [value]
        if not all(number is None or contains(interval, number) for number in numbers):
            prefix = "" if owner is None else f"{type(owner).__name__}: "
            raise ValueError(f"{prefix}{name} must be {in_words(interval)}: got {value}")


def check_options(options: object, interval: str, *names: str) -> None:
    """Holds attributes against an interval, and names one as the option of a command that it is."""
    check_range(None, interval, **{f"--{name.replace('_', '-')}": getattr(options, name) for name in names})


def check_batch_size(batch_size: int, ranks: int) -> None:
    """Raises a ValueError unless the ranks can share a batch evenly."""
    if batch_size % ranks:
        below = batch_size - batch_size % ranks
        wanted = f"{below} or {below + ranks}" if below else str(ranks)
        raise ValueError(
            f"batch_size {batch_size} counts the samples of a step over all ranks and is not divisible by {ranks} ranks; "
            f"want for example {wanted}"
        )


def contains(interval: str, number: Number) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval.startswith("[") else number > low
    return above and (number <= high if interval.endswith("]") else number < high)


def in_words(interval: str) -> str:
    """An interval in the words of a message: "at least 1", "above 0", "finite", else the interval itself."""
    low, high = interval[1:-1].replace(" ", "").split(",")
    if high != "inf":
        return f"in {interval}"
    if low == "-inf":
        return "finite"
    return f"at least {low}" if interval.startswith("[") else f"above {low}"
