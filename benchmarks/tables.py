"""What every table of the results is made of."""

from __future__ import annotations

from typing import Any


def describe(cases: list[dict[str, Any]]) -> str:
    """Where and with what the cases were measured."""

    def each(key: str) -> str:
        return ", ".join(sorted({str(case["environment"][key]) for case in cases if key in case["environment"]}))

    threads = "" if "cuda" in cases[0]["environment"] else f", {each('threads')} threads"
    known = {", ".join(case["environment"].get("instructions", [])) for case in cases} - {""}
    processor = each("processor") + (f" ({'; '.join(sorted(known))})" if known else "")
    return (
        f"{processor}{threads}; torch {each('torch')}, torchvision {each('torchvision')}, "
        f"Python {each('python')}; {each('date')}, commit {each('commit')}"
    )


def number(value: float | None) -> str:
    """Three significant digits, thousands with a comma."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table's lines."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def times(ratio: float | None) -> str:
    return f"**{number(ratio)}x**" if ratio else ""


def grouped(missing: dict[str, str]) -> list[str]:
    """Name -> reason as lines of text, one for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in missing.items():
        names.setdefault(reason, []).append(name)
    return [f"Not measured, as {reason}: {'; '.join(each)}." for reason, each in names.items()]
