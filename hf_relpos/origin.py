"""Where an imported model comes from, which its card must say."""

from typing import Any


NO_REPOSITORY = "none"  # as `base_model`: the model was never on the Hub
HOW_TO_SAY = {"license": "--license NAME", "base_model": f"--base_model OWNER/NAME ({NO_REPOSITORY}: never on the Hub)"}


def known_origin(
    imported_from: dict[str, Any], base_model: str | None = None, license: str | None = None
) -> dict[str, str | None]:
    """→ `license` and `base_model`, each as the user says it, or as the import recorded it; `None` where nobody knows.

    Args:
        imported_from: of a configuration.
        base_model, license: what the user says of them.
    """
    said = {"license": license, "base_model": base_model}
    return {name: value or imported_from.get(name) for name, value in said.items()}


def missing_flags(known: dict[str, str | None]) -> str:
    """→ the flags that say what is not known of an origin, or ""."""
    return " and ".join(HOW_TO_SAY[name] for name, value in known.items() if not value)


def repository_of(base_model: str | None) -> str | None:
    """→ the repository that a `base_model` names, if there is one."""
    return None if base_model == NO_REPOSITORY else base_model
