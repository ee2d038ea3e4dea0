"""Findings as a page of Markdown: the worst first, one section a rule, what to do in each.

Names and sentences come from users and their rules, so every character that Markdown or HTML could read as its own is
written as an entity: it is shown as it is, and does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gradlens.records import Finding, Severity

SHOWN = 30  #: sections of a page
DETAILED, NAMED = 4, 40  #: parameters of a section that have a line of their own, and that are named


def escape(text: str) -> str:
    """Text that Markdown shows literally, on one line."""
    return re.sub(r"[^\w .,:;=?/-]|_", lambda found: f"&#{_shown(found[0])};", " ".join(text.split()))


def _shown(character: str) -> int:
    """Its number; that of the replacement character for what no page can hold."""
    return ord(character) if character.isprintable() else 0xFFFD


def findings(found: Iterable[Finding]) -> str:
    """The page. What one rule says of several parameters, with the same advice, is one section."""
    sections: dict[tuple[object, ...], list[Finding]] = {}
    for finding in sorted(found, key=lambda finding: (-finding.severity.rank, finding.step)):
        key = (finding.severity, finding.rule, finding.causes, finding.remedy)
        sections.setdefault(key, []).append(finding)
    if not sections:
        return "No findings so far."
    lines = [_summary(sections.values()), ""]
    for section in list(sections.values())[:SHOWN]:
        lines += _section(section)
    if len(sections) > SHOWN:
        lines.append(f"*and {len(sections) - SHOWN} more, less severe or later: `gradlens report` lists all.*")
    return "\n".join(lines)


def _summary(sections: Iterable[list[Finding]]) -> str:
    counts = dict.fromkeys(reversed(Severity), 0)
    rules: dict[str, int] = {}
    for section in sections:
        counts[section[0].severity] += len(section)
        rules[section[0].rule] = rules.get(section[0].rule, 0) + len(section)
    total = ", ".join(f"{n} {word}{'s' * (n > 1 and word != Severity.INFO)}" for word, n in counts.items() if n)
    return f"**{total}**: " + ", ".join(escape(rule) + f" ({n})" * (n > 1) for rule, n in rules.items())


def _section(section: list[Finding]) -> list[str]:
    first, rest = section[0], section[DETAILED:]
    where = f" at {len(section)} parameters" if len(section) > 1 else ""
    lines = [f"#### {first.severity.upper()}: {escape(first.rule)}{where}", ""]
    for finding in section[:DETAILED]:
        name = f"**{escape(finding.parameter)}**, " if finding.parameter else ""
        lines.append(f"- {name}step {finding.step}: {escape(finding.seen)}")
    if rest:
        names = ", ".join(f"{escape(finding.parameter or 'the model')} (step {finding.step})" for finding in rest[:NAMED])
        lines.append(f"- and {names}" + f", and {len(rest) - NAMED} more" * (len(rest) > NAMED))
    if first.causes:
        lines += ["", "*Likely:* " + "; ".join(escape(cause) for cause in first.causes)]
    if first.remedy:
        lines += ["", "*Do:* " + escape(first.remedy)]
    return [*lines, ""]
