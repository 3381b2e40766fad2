"""Findings of the doctor's checks, printed as they come."""

from typing import Any


class Report:
    """Findings, and the figures they are based on.

    Attributes:
        findings (`list[dict[str, str]]`): `status` (ok, warning or problem), `subject` and `text`, in their order.
        facts (`dict[str, Any]`): JSON-serialisable figures by subject.
    """

    def __init__(self) -> None:
        self.findings: list[dict[str, str]] = []
        self.facts: dict[str, Any] = {}

    def add(self, status: str, subject: str, text: str) -> None:
        self.findings.append({"status": status, "subject": subject, "text": text})
        print(f"{status:8} {subject}: {text}".replace("\n", f"\n{'':9}"), flush=True)

    def ok(self, subject: str, text: str) -> None:
        self.add("ok", subject, text)

    def warning(self, subject: str, text: str) -> None:
        self.add("warning", subject, text)

    def problem(self, subject: str, text: str) -> None:
        self.add("problem", subject, text)

    def count(self, status: str) -> int:
        return sum(finding["status"] == status for finding in self.findings)

    def summary(self) -> str:
        """The numbers of problems and warnings, as a sentence."""
        problems, warnings = self.count("problem"), self.count("warning")
        return f"{problems} problem{'s' * (problems != 1)} and {warnings} warning{'s' * (warnings != 1)}."
