"""The card of a data set repository of stored answers."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from ..answers import Manifest


TEMPLATE = Path(__file__).with_name("templates") / "answers_card.md"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def answers_card(manifest: Manifest, repo_id: str) -> str:
    """The README of stored answers: whose they are, to what, how many and how large."""
    teacher = manifest.teacher
    link = f"[{teacher['name']}](https://huggingface.co/{teacher['name']})"
    size = next((name for limit, name in SIZES if manifest.rows < limit), "1M<n<10M")
    data = DatasetCardData(tags=["object-detection", "knowledge-distillation", "hf-detrkd"], size_categories=[size])
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        manifest=manifest,
        teacher=teacher,
        dataset=manifest.dataset,
        repo_id=repo_id,
        teacher_name=link if teacher["source"] == "hub" else "a teacher that is not on the Hub",
        size=", ".join(f"{name} {side}" for name, side in manifest.images["size"].items()),
        asked=", ".join(f"`{name}`" for name in manifest.questions) or "its own queries only",
    )
    return str(card)
