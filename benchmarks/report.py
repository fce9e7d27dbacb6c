"""Tables and plots of a benchmark, from its result file alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_relpos.results.figure_style import exact_labels, new_figure, save_figure
from hf_relpos.results.result_file import markdown


def tables(result: dict[str, Any]) -> str:
    """Markdown: ratios by name and length, of time and memory, and what was skipped with its reason."""
    arguments, hardware = result["arguments"], result["hardware"]
    where = hardware.get("gpu") if arguments["device"] == "cuda" else hardware["cpu"]
    lines = [
        f"{where}, {arguments['num_threads']} threads, {arguments['dtype']}, torch {result['versions']['torch']}; "
        f"{'CPU seconds, ' if arguments.get('clock') == 'cpu' else ''}medians of {arguments['repeats']} interleaved "
        "rounds. A ratio is to the row of the same column that has 1.00."
    ]
    for title, records in _sections(result):
        lines += ["", f"**{title}**", "", ratio_table(records)]
    for record in result.get("profiles", []):
        lines += ["", f"**Profile of a step of {record['name']} at {record['length']}**, {record['seconds']:.2f} s", ""]
        shares = [[name, f"{100 * share:.1f} %"] for name, share in record["operations"].items()]
        lines.append(markdown([["operation", "share of the time"], *shares]))
    if result["skipped"]:
        lines += ["", "**Skipped**", ""]
        reasons: dict[tuple[str, str], set[int]] = {}
        for case in result["skipped"]:
            what = " ".join(x for x in (case["part"], case["mode"], case.get("measure")) if x)
            reasons.setdefault((f"{case['name']} ({what})", case["reason"]), set()).add(case["length"])
        for (name, reason), lengths in reasons.items():
            lines.append(f"- {name} at {', '.join(map(str, sorted(lengths)))}: {reason}")
    return "\n".join(lines) + "\n"


def peer_table(*results: dict[str, Any]) -> str:
    """Markdown: one table of kernels of attention and of models beside each other, ratios of medians.

    Args:
        results: of benchmarks of the same machine, one with times, others with memory. A row has the ratios of time by
            length, of peak memory and of a cached step of one row, both at the longest length that was measured.
    """
    times = [record for result in results for record in result["times"] if record["mode"] != "forward"]
    memory = [record for result in results for record in result["memory"]]
    decode = [record for record in times if record["part"] == "decode" and record["batch_size"] == 1]
    lengths = sorted({record["length"] for record in times if record["part"] in ("attention", "step")})
    furthest = max((record["length"] for record in memory), default=0)
    cached = max((record["length"] for record in decode), default=0)
    rows = [["ratio of", *map(str, lengths), f"memory at {furthest}", f"cached step after {cached}"]]
    blocks = (("attention", "attention, to causal SDPA"), ("step", "training step, to Llama of equal size"))
    for part, title in blocks:
        rows.append([f"**{title}**", *[""] * (len(rows[0]) - 1)])
        found = {(record["name"], record["length"]): record for record in times if record["part"] == part}
        ends = [{r["name"]: r for r in memory if r["part"] == part and r["length"] == furthest}]
        ends.append({r["name"]: r for r in decode if r["length"] == cached} if part == "step" else {})
        for name in dict.fromkeys(name for name, _ in found):
            records = [found.get((name, length)) for length in lengths] + [end.get(name) for end in ends]
            rows.append([name, *("–" if record is None else f"{record['ratio']:.2f}" for record in records)])
    return markdown(rows)


def _sections(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    tokens, step_tokens = result["arguments"]["tokens"], result["arguments"]["step_tokens"]

    def pick(key: str, **fields: Any) -> list[dict[str, Any]]:
        return [record for record in result[key] if all(record[name] == value for name, value in fields.items())]

    sections = [
        (f"Attention, forward and backward, {tokens} tokens", pick("times", part="attention", mode="forward_backward")),
        (f"Attention, forward, {tokens} tokens", pick("times", part="attention", mode="forward")),
        ("Attention, forward and backward, peak memory above the inputs", pick("memory", part="attention")),
        (f"Training step, {step_tokens} tokens", pick("times", part="step")),
        (f"Compiled training step, {step_tokens} tokens", pick("times", part="compiled_step")),
        (f"Training step, peak memory, {step_tokens} tokens", pick("memory", part="step")),
    ]
    sections.append(("Loss of each token of one row, peak memory and time", pick("memory", part="evaluate")))
    for rows in result["arguments"]["decode_batch_sizes"]:
        sections.append((f"Cached step of {rows} rows", pick("times", part="decode", batch_size=rows)))
    return [(title, records) for title, records in sections if records]


def ratio_table(records: list[dict[str, Any]]) -> str:
    """Rows by name, columns by length: the ratio and the median."""
    lengths = sorted({record["length"] for record in records})
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        by_name.setdefault(record["name"], {})[record["length"]] = record
    rows = [[name, *(_cell(found.get(length)) for length in lengths)] for name, found in by_name.items()]
    return markdown([["", *map(str, lengths)], *rows])


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "–"
    if record["part"] == "evaluate":
        return f"{record['process_mib']:.0f} MiB, {record['seconds']:.1f} s"
    amount = f"{record['mib']:.0f} MiB" if "mib" in record else f"{1000 * record['seconds']:.4g} ms"
    return f"{record['ratio']:.2f} ({amount})" if "ratio" in record else amount


def plot_benchmark(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws time and memory against length, as ratios to the base of each length.

    Returns:
        the paths of the plots, one for attention and one for steps, of those that were measured.
    """
    from matplotlib import colormaps

    paths = []
    for part, base in (("attention", "causal SDPA"), ("step", "Llama")):
        times = [r for r in result["times"] if r["part"] == part and r["mode"] != "forward" and "ratio" in r]
        memory = [r for r in result["memory"] if r["part"] == part and r.get("ratio", 0) > 0]
        if not times:
            continue
        drawn = [(records, what) for records, what in ((times, "time"), (memory, "peak memory")) if records]
        figure = new_figure(3.5 * (1 + len(drawn)), 4.6)
        panels = figure.subplots(1, len(drawn), squeeze=False)[0]
        names = list(dict.fromkeys(record["name"] for record in [*times, *memory]))
        for axes, (records, what) in zip(panels, drawn):
            _draw(axes, records, names, colormaps["tab20"])
            axes.set(title=f"{what}, ratio to {base}", xlabel="length (tokens), equal tokens in all")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2 + 2 * len(drawn), fontsize="small", frameon=False
        )
        paths.append(folder / f"{part}_cost.png")
        save_figure(figure, paths[-1])
    return paths


def _draw(axes: Any, records: list[dict[str, Any]], names: list[str], colors: Callable[[int], Any]) -> None:
    lengths = sorted({record["length"] for record in records})
    for index, name in enumerate(names):
        found = {record["length"]: record["ratio"] for record in records if record["name"] == name}
        xs = [length for length in lengths if length in found]
        style = {"linewidth": 2.6 if name.startswith("distance_bias") or name == "linear_cpb" else 1.4}
        axes.plot(xs, [found[x] for x in xs], marker="o", markersize=4, color=colors(index), label=name, **style)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    exact_labels(axes.yaxis)
    axes.tick_params(axis="y", which="minor", labelsize="x-small")
    axes.grid(alpha=0.3)
