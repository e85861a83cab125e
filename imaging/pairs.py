"""Pairs low-resolution files with high-resolution ones: the same name, or with x4, _LRx4 or so."""

from collections.abc import Sequence
from pathlib import Path


def find_low_resolution(path: Path, candidates: Sequence[Path], scale: float) -> Path:
    """Find the low resolution of a file; ValueError where there is none, or more than one."""
    matches = [candidate for candidate in candidates if _are_pair(path.stem, candidate.stem, scale)]
    return _only(matches, path, f"no low-resolution image for {path}; name it {path.stem}x{scale:g}")


def find_original(path: Path, candidates: Sequence[Path], scale: float) -> Path:
    """Find the original of a file; ValueError where there is none, or more than one."""
    matches = [candidate for candidate in candidates if _are_pair(candidate.stem, path.stem, scale)]
    return _only(matches, path, f"no original of {path}; give it the same name")


def _are_pair(high: str, low: str, scale: float) -> bool:
    high, low, tag = high.lower(), low.lower(), f"x{scale:g}"
    endings = ("", tag, f"_{tag}", f"-{tag}", "_lr", f"_lr{tag}", f"_lr_{tag}", f"_{tag}_lr", f"{tag}_lr")
    return low == high or low in {high.removesuffix("_hr") + ending for ending in endings}


def _only(matches: Sequence[Path], path: Path, nothing: str) -> Path:
    matches = [candidate for candidate in matches if candidate.stem == path.stem] or matches
    if not matches:
        raise ValueError(nothing)
    if len(matches) > 1:
        raise ValueError(f"{matches[0]} and {matches[1].name} could both belong to {path}; leave one out")
    return matches[0]
