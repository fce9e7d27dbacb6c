"""docs/clients.md from the record of a run."""

from clients.harness import CONTROL, SCHEMES


WORKS, LIMIT, REFUSED, BROKEN = "works", "client's limit", "refused", "**broken**"


def verdict(row: dict, model: str, use: str) -> str:
    """→ what became of one use of a client by a model, by what became of it with Llama."""
    found = row["models"][model].get(use)
    if found is None:  # the client broke before it came to its uses
        found = row["models"][model][""]
    if found["outcome"] == "works":
        return WORKS
    control = row["models"].get(CONTROL, {})
    control = control.get(use) or control.get("", {})
    if model == CONTROL or control.get("outcome") == "failed":
        return LIMIT
    return REFUSED if found["refused"] else BROKEN


def cell(row: dict, model: str) -> str:
    """→ one word if all uses end alike, else how many of each."""
    if model not in row["models"]:
        return "–"
    said = [verdict(row, model, use) for use in row["models"][model]]
    kinds = list(dict.fromkeys(said))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{said.count(kind)} {kind}" for kind in sorted(kinds))


def make_page(record: dict) -> str:
    versions, hardware, rows = record["versions"], record["hardware"], record["clients"]
    used = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    libraries = ", ".join(f"{name} {versions[name]}" for name in used if name in versions)
    models = (CONTROL, *SCHEMES)
    lines = [
        "# Clients",
        "",
        "Other libraries on models of the family, and on Llama of the same size as the control: each run in a process",
        "of its own on a folder that `save_pretrained` wrote, loaded with `trust_remote_code=True`. Made by",
        "`make test-clients`, kept in docs/results/clients.json: "
        f"Python {versions['python']}, {libraries}; {hardware['cores']} cores of {hardware['cpu']}, no GPU.",
        "",
        f"*{WORKS}*: its numbers are those of the model. *{LIMIT}*: Llama fails as well. *{REFUSED}*: by the model, in",
        f"one line. {BROKEN}: none of these. A row with several uses counts them.",
        "",
        "| client | version | " + " | ".join(model if model == CONTROL else f"`{model}`" for model in models) + " |",
        "| --- | --- |" + " --- |" * len(models),
    ]
    for name, row in rows.items():
        version = next(iter(row["versions"].values()), "")
        if "missing" in row:
            lines.append(f"| {name} | not run |" + " – |" * len(models))
            continue
        lines.append(f"| {name} | {version} | " + " | ".join(cell(row, model) for model in models) + " |")
    lines += ["", "## What is run", ""]
    for name, row in rows.items():
        uses = [use for use in row["models"].get(CONTROL, {}) if use]
        listed = f" Uses: {'; '.join(uses)}." if uses else ""
        lines.append(f"- **{name}**: {row['what']}{listed}")
    lines += ["", "## What does not work, and why", "", *reasons(rows)]
    missing = {name: row["missing"] for name, row in rows.items() if "missing" in row}
    lines += ["", "## What was not run", "", *[f"- **{name}**: {why}" for name, why in missing.items()]]
    return "\n".join(lines if missing else [*lines, "Nothing."]) + "\n"


def reasons(rows: dict[str, dict]) -> list[str]:
    """→ a line for each error, with the client, the use and the models that it is of."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for name, row in rows.items():
        for model, uses in row["models"].items():
            for use, result in uses.items():
                said = verdict(row, model, use)
                if said != WORKS:
                    error = result["error"].replace(model, "…") if said != REFUSED else result["error"]
                    found.setdefault((name, use, said, error), []).append(model)
    return [
        f"- {name}{f', {use}' if use else ''} ({', '.join(models)}), {said}: {error}"
        for (name, use, said, error), models in found.items()
    ] or ["Nothing."]
