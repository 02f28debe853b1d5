"""From results.json to what people read: a Markdown table that pastes into a README, and a PNG plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from coral.bench import gate
from coral.bench.results import read
from coral.errors import CoralError
from coral.files import atomic_text
from coral.tree import TreeSize

NAMES = {
    "plain": "plain",
    "hf_generate": "HF generate",
    "hf_prompt_lookup": "HF prompt lookup",
    "hf_assisted": "HF assisted",
    "ngram": "n-gram",
}

CALM = 0.2  # share of repetition below which a suite is no gift to lookup

LEGEND = (
    "speedup: tokens a second over those of plain decoding, same prompts, sum over sum; all but `no prefill` "
    "with prefill. tau: tokens a cycle. c: bytes of weights that a draft step reads over those of a plain "
    "step. v(n): time of verifying n nodes over that of a plain step. S: draft steps a cycle. "
    "ceiling: tau / (v + S c)."
)


def report(results: str | Path, console: Console | None = None) -> list[Path]:
    """Write results.md and results.png beside results.json and print the table; returns the written paths.

    Without matplotlib the plot is left out, with a line that says how to get it.

    Raises:
        CoralError: `results` cannot be read.
    """
    path, console = Path(results), console or Console(width=180)
    data = read(path)
    text = markdown(data)
    written = [path.with_suffix(".md")]
    atomic_text(written[0], text)
    console.print(Markdown(text))
    try:
        plot(data, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    except CoralError as error:
        console.print(f"No plot: {error}")
    return written


def markdown(results: dict[str, Any]) -> str:
    """A table for each dtype and temperature, with a caption that says what was measured, where and how."""
    lines = [caption(results), ""]
    for (dtype, temperature), rows in _settings(results["rows"]).items():
        suites = _suites(rows)
        costs = results["costs"][dtype]
        times = ", ".join(f"{name} {1000 * s:.1f} ms a token" for name, s in costs["plain_seconds"].items())
        lines += [
            f"**{dtype}, T = {temperature:g}**; plain decoding is the fastest of: {times}",
            "",
            _line(["method", *(f"speedup {suite}" for suite in suites), *_COLUMNS]),
            _line(["---"] + ["---:"] * (len(suites) + len(_COLUMNS) - 1) + ["---"]),
        ]
        found = {(_name(row), row["suite"]): row for row in rows}
        for name in dict.fromkeys(name for name, _ in found):
            speedups = [found.get((name, suite), {}).get("speedup") for suite in suites]
            row = found[name, "all"]
            cells = [column(row) for column in _COLUMNS.values()]
            lines.append(_line([name, *(_number(x, "{:.2f}x") for x in speedups), *cells]))
        lines += [
            "",
            *_beside_peers(rows),
            *_trees(results.get("trees", {}).get(dtype, {})),
            *_routed_heads(results.get("routed_heads", {}).get(dtype, {})),
        ]
    lines += [line for found in results.get("gates", []) for line in gate.markdown(found)]
    command, commit = results["command"], results["commit"]
    return "\n".join([*lines, LEGEND, "", f"Reproduce with `{command}` at commit `{commit}`.", ""])


def caption(results: dict[str, Any]) -> str:
    """What was measured; numbers from a deepened target, and whatever the note says, are labelled here."""
    settings, target, where = results["settings"], results["target"], results["environment"]
    # Benches of before there was a choice ignored them.
    ends = "end tokens ignored" if settings.get("ignore_eos", True) else "up to the end token"
    sentences = [f"Target {target['name']}, {settings['max_new_tokens']} tokens a turn, {ends}."]
    if settings["deepen"]:
        sentences.append(
            f"**The target is deepened** to {target['layers']} layers: those appended (FFN width "
            f"{target['appended_ffn_width']}) change no output and only add cost, so that c is that of a "
            f"real pair. These are not speeds of a real LLM."
        )
    if settings["note"]:
        sentences.append(f"**{settings['note']}**")
    if results["skipped"]:
        sentences.append(f"{len(results['skipped'])} prompts did not fit the context and were left out.")
    if settings.get("assistant"):
        fixed = (
            "" if where.get("scikit_learn") else ", its threshold fixed since scikit-learn is not installed"
        )
        sentences.append(f"HF assisted generation drafts with {settings['assistant']}{fixed}.")
    features = [name for name, there in where["cpu_features"].items() if there]
    sentences.append(
        f"{where['hardware']}, {where['cores']} cores, {where['threads']} threads ({', '.join(features)}), "
        f"torch {where['torch']}, transformers {where['transformers']}."
    )
    return " ".join(sentences)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of speedup by suite and method beside acceptance by depth, a row of panels for each setting.

    Raises:
        CoralError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CoralError("matplotlib is not installed; pip install 'coral-drafter[bench]'.") from error
    settings = _settings(results["rows"])
    figure = Figure(figsize=(12, 4 * len(settings) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(settings), 2, squeeze=False, width_ratios=(3, 2))
    for (bars, curves), ((dtype, temperature), rows) in zip(panels, settings.items(), strict=True):
        names, suites = list(dict.fromkeys(_name(row) for row in rows)), _suites(rows)
        for index, name in enumerate(names):
            mine = {row["suite"]: row for row in rows if _name(row) == name}
            at = [place + (index - (len(names) - 1) / 2) * 0.8 / len(names) for place in range(len(suites))]
            heights = [mine.get(suite, {}).get("speedup") or 0.0 for suite in suites]
            bars.bar(at, heights, width=0.8 / len(names), label=name, color=f"C{index}")
            rates = mine.get("all", {}).get("acceptance_by_depth") or []
            if rates:
                curves.plot(range(1, len(rates) + 1), rates, marker="o", label=name, color=f"C{index}")
        bars.axhline(1.0, color="grey", linewidth=0.8)
        bars.set_xticks(range(len(suites)), suites)
        if len(suites) > 5:
            bars.tick_params(axis="x", rotation=20)
        bars.set(title=f"{dtype}, T = {temperature:g}", ylabel="speedup over the fastest plain decoding")
        bars.legend(fontsize="small")
        curves.set(title="acceptance by depth", xlabel="depth", ylim=(0, 1))
    label = f"{results['target']['name']}" + (" (deepened)" if results["settings"]["deepen"] else "")
    figure.suptitle(" ".join([label, results["settings"]["note"]]).strip())
    aside = path.with_name(f".{path.name}")
    try:
        figure.savefig(aside, format="png", dpi=120)
        aside.replace(path)
    except OSError as error:
        raise CoralError(f"cannot write {path}: {error.strerror}; free some space.") from error
    finally:
        aside.unlink(missing_ok=True)


def _beside_peers(rows: list[dict[str, Any]]) -> list[str]:
    """Our fastest drafter over the fastest HF peer where little repeats, and over every peer on all."""
    plain, drafters, peers = ([r for r in rows if r["kind"] == kind] for kind in ("plain", "drafter", "peer"))
    calm = [r["suite"] for r in plain if r["suite"] != "all" and r["repeat_share"] < CALM]
    hf = [r for r in peers if r["drafter"].startswith("hf_")]
    lines = []
    for where, suites, others, called in (
        (f"Where less than {CALM:.0%} repeats ({', '.join(calm)})", calm, hf, "HF peer"),
        ("Over all prompts", ["all"], peers, "peer"),
    ):
        ours, theirs = (_fastest(r for r in group if r["suite"] in suites) for group in (drafters, others))
        if ours and theirs:
            ratio = ours[0] / theirs[0]
            lines.append(f"{where} {ours[1]} is {ratio:.2f}x as fast as {theirs[1]}, the fastest {called}.")
    return [*lines, ""] if lines else []


def _fastest(rows: Iterable[dict[str, Any]]) -> tuple[float, str] | None:
    """Tokens a second, sum over sum, and name of the fastest method of these rows."""
    sums: dict[str, tuple[int, float]] = {}
    for row in rows:
        tokens, seconds = sums.get(_name(row), (0, 0.0))
        sums[_name(row)] = tokens + row["tokens"], seconds + row["seconds"]
    return max(((tokens / seconds, name) for name, (tokens, seconds) in sums.items()), default=None)


def _trees(found: dict[str, Any]) -> Iterable[str]:
    if found:
        shown = (f"{name} {TreeSize(**tree['tree_size'])} ({tree['origin']})" for name, tree in found.items())
        yield f"trees (`--tree`): {', '.join(shown)}"
        yield ""


def _routed_heads(found: dict[str, Any]) -> Iterable[str]:
    for name, head in found.items():
        shown = " ".join(f"{recall:.1%}" for recall in head["recall"]) or "nothing measured"
        core = f" beside a core of {head['core']} ids" if head.get("core") else ""
        yield (
            f"routed head of {name}: {head['active']} of {head['groups']} groups{core} hold {shown} of the "
            f"target's mass at depths 1 to {len(head['recall'])}, on the accepted path (greedy, not timed)"
        )
        yield ""


def _settings(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["temperature"]), []).append(row)
    return groups


def _suites(rows: Iterable[dict[str, Any]]) -> list[str]:
    """In the order of the run, `all` last."""
    return [*dict.fromkeys(row["suite"] for row in rows if row["suite"] != "all"), "all"]


def _name(row: dict[str, Any]) -> str:
    name = NAMES.get(row["drafter"], row["drafter"])
    if row["kind"] != "drafter" or row["temperature"] == 0:
        return str(name)
    return f"{name}, {'coupled' if row['coupled'] else 'not coupled'}"


def _output(row: dict[str, Any]) -> str:
    if row["identical"] is None:
        return "other weights" if row["dtype"] == "packed" else "other random numbers"
    if row["wrong"]:
        return f"**{row['wrong']} wrong**"
    return "identical" + (f" ({row['near_tie']} near ties)" if row["near_tie"] else "")


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "no prefill": lambda row: _number(row.get("speedup_without_prefill"), "{:.2f}x"),
    "over HF": lambda row: _number(row["speedup_over_hf"], "{:.2f}x"),
    "tokens/s": lambda row: _number(row["tokens_per_second"], "{:.1f}"),
    "tau": lambda row: _number(row["tau"]),
    "tau unrepeated": lambda row: _number(row["tau_unrepeated"]),
    "repeats": lambda row: _number(row["repeat_share"], "{:.0%}"),
    "draft": lambda row: _number(row["draft_share"], "{:.0%}"),
    "verify": lambda row: _number(row["verify_share"], "{:.0%}"),
    "c": lambda row: _number(row["c"], "{:.3f}"),
    "v(n)": lambda row: _number(row["v"]) + (f" ({row['nodes']:.0f})" if row["nodes"] else ""),
    "S": lambda row: _number(row["draft_forwards"], "{:.1f}"),
    "ceiling": lambda row: _number(row["ceiling"], "{:.2f}x"),
    "output": _output,
}
