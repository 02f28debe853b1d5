"""A real LLM by Hugging Face, llama.cpp, vLLM and us: `python benchmarks/real.py OUTPUT [--target FILE]`.

One run on one machine: the same prompts as the same token ids, greedy, the same number of tokens, texts end
where the target ends them. Every method is a process of its own. It loads, writes a text that is not
counted, writes all prompts one after the other, and ends, so no other engine is alive while one is timed.
Rounds repeat all methods in turn: while the machine is slow, it is slow for all. Each text is kept as it
comes, and the same command goes on where it was stopped. `real.sh` makes the environments.

llama.cpp reads the file as it is, and as BF16 and Q8_0 made from it (`requant.py`). The others read the
dequantised weights in bfloat16, from a directory that `coral convert` writes. So BF16 means the same weights
everywhere, and only there texts are compared with those of our plain decoding. Ours also decode with the
file's own blocks, packed; those texts are compared with plain decoding of the same blocks. Writes
OUTPUT/records.jsonl, OUTPUT/results.json, OUTPUT/results.md and the clients' logs.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from publish import header, reproduce, save
from real_clients import ClientFailed, Records, ask
from real_methods import chosen, every_method
from real_table import PACKED, PLAIN, Method, by_method, differences, rows, speed, table

from coral.cli.options import quiet_transformers
from coral.drafters.drafting import Drafting
from coral.errors import CoralError
from coral.export import write
from coral.suites import prompts as suites
from coral.target import default as models
from coral.target.target import Target

HERE = Path(__file__).resolve().parent
CLIENTS = {
    "ours": HERE / "real_ours.py",
    "transformers": HERE.parent / "checks" / "real_transformers.py",
    "llama": HERE.parent / "checks" / "real_llama.py",
    "vllm": HERE.parent / "checks" / "real_vllm.py",
}


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a client does not outlive a killed run
    try:
        return run(read_options())
    except CoralError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--target", type=Path, help="a GGUF file; else SmolLM2 and the drafter of the package"
    )
    parser.add_argument(
        "--directory", type=Path, help="its weights in bfloat16; else `coral convert` makes it"
    )
    parser.add_argument("--drafter", help="as of `coral generate`, without +ngram")
    parser.add_argument("--tree", help="that we draft, as of `coral generate`; else the drafter's own")
    parser.add_argument("--draft-tokens", type=int, default=4, help="of vLLM's chains")
    parser.add_argument("--suite", default=",".join(suites.SUITES))
    parser.add_argument("--limit", type=int, default=4, help="prompts of each suite, their first turns")
    parser.add_argument("--tokens", type=int, default=128, help="at most, of each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--only", default="*", help="names of methods, separated by commas; * and ? stand for any"
    )
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="where converted weights go")
    parser.add_argument("--llama", type=Path, default=HERE.parent / ".venv-llama", help="its environment")
    parser.add_argument("--vllm", type=Path, default=HERE.parent / ".venv-engines", help="its environment")
    return parser.parse_args()


def run(options: argparse.Namespace) -> int:
    """Write what is missing, then compare texts, and print the table.

    Raises:
        CoralError: an environment or a file that is not there, no such method, or another run's output.
    """
    quiet_transformers()
    if options.target is None:
        options.target, options.drafter = models.fetch(), options.drafter or str(models.DRAFTER)
    methods = chosen(every_method(options), options.only)
    pythons = environments(options, {method.engine for method in methods})
    digest = file_digest(options.target)
    paths, methods = weights(options, methods, pythons, digest)
    directory = paths["directory"]
    if any(method.name == "vllm_drafter" for method in methods):
        export(options)
    prompts, eos_ids = first_turns(directory, options)
    common = {
        "dtype": "bfloat16",
        "tokens": options.tokens,
        "threads": options.threads,
        "eos_ids": sorted(eos_ids),
        "tree": options.tree,
    }
    results = header()
    results["environment"]["threads"] = options.threads
    names = ("drafter", "tree", "draft_tokens", "suite", "limit", "tokens", "threads")
    results["settings"] = {name: getattr(options, name) for name in names} | {"target_sha256": digest}
    log = Records(options.output / "records.jsonl", {name: results[name] for name in ("settings", "commit")})

    def client(engine: str, name: str, job: Mapping[str, Any]) -> Any:
        printed = options.output / "logs" / f"{name}.log"
        return ask(pythons[engine], CLIENTS[engine], common | job, printed, options.threads)

    failed: set[str] = set()
    for number in range(1, options.rounds + 1):
        for method in methods:
            missing = {p: ids for p, ids in prompts.items() if (method.name, number, p) not in log.texts}
            if not missing or method.name in failed:
                continue
            job = {**method.settings, "model": str(paths[method.model]), "prompts": missing}
            try:
                for line in client(method.engine, method.name, job):
                    kind = "text" if "prompt" in line else "client"
                    log.add(
                        {kind: line | {"method": method.name} | ({"round": number} if kind == "text" else {})}
                    )
                    progress(log, method, number, options.rounds, len(prompts))
                print(file=sys.stderr)
            except ClientFailed as error:
                failed.add(method.name)
                print(f"\n{method.name} {error}", file=sys.stderr)
            write_table(options.output, results, methods, log, {})
    disputed = differing(methods, log, prompts)
    verdicts: dict[str, list[str]] = {name: [] for name, _ in disputed}
    if disputed:
        job = {"model": str(directory), "disputed": [texts for _, texts in disputed]}
        for (name, _), line in zip(disputed, client("ours", "verdicts", job), strict=True):
            verdicts[name].append(line["verdict"])
    print(write_table(options.output, results, methods, log, verdicts))
    wrong = [name for name in verdicts if name in ("ngram", "coral", "coral_lookup")]
    found = rows(methods, [*log.texts.values()], verdicts)
    wrong += [
        row["method"]
        for row in found
        if row["method"].endswith(PACKED) and any(at is not None for at in row["first_differences"].values())
    ]
    if wrong:
        print(f"error: not the text of plain decoding: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(failed or wrong))


def environments(options: argparse.Namespace, engines: set[str]) -> dict[str, Path]:
    """The Python of each engine."""
    pythons = {"ours": Path(sys.executable), "transformers": Path(sys.executable)}
    for engine, root in (("llama", options.llama), ("vllm", options.vllm)):
        pythons[engine] = root.absolute() / "bin" / "python"
        if engine in engines and not pythons[engine].exists():
            raise CoralError(
                f"there is no {pythons[engine]}; run `make {root.name}/installed`, or leave these methods "
                f"out with --only."
            )
    return pythons


def weights(
    options: argparse.Namespace, methods: list[Method], pythons: dict[str, Path], digest: str
) -> tuple[dict[str, Path], list[Method]]:
    """What each method reads, made where it is missing; and the methods with the file's own precision."""
    stem = options.models.absolute() / f"{options.target.stem}-{digest[:12]}"
    convert: list[str | Path] = [sys.executable, "-m", "coral", "convert", options.target]
    directory = options.directory or made(Path(f"{stem}-bf16"), [*convert, "{}"])
    paths = {"directory": directory.absolute(), "file": options.target.absolute()}
    if all(method.engine != "llama" for method in methods):
        return paths, [replace(method, precision=method.precision or "the file's") for method in methods]
    requant: list[str | Path] = [pythons["llama"], HERE / "requant.py", options.target]
    for name in {method.model for method in methods} & {"bf16", "q8_0"}:
        paths[name] = made(Path(f"{stem}-{name}.gguf"), [*requant, "{}", name.upper()])
    own = subprocess.run(requant, capture_output=True, text=True, check=True).stdout.strip()
    return paths, [replace(method, precision=method.precision or own) for method in methods]


def made(path: Path, command: Sequence[str | Path]) -> Path:
    """A path; where there is nothing yet, by this command, in which {} stands for it."""
    if not path.exists():
        print(f"making {path}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run([str(word).replace("{}", str(path)) for word in command]).returncode:
            raise CoralError(f"{path} could not be made from the target; the reason is above.")
    return path


def export(options: argparse.Namespace) -> None:
    """The drafter as vLLM reads it; a head that its plug-in serves goes along if --drafter names it."""
    named = Drafting.parse(options.drafter)
    assert named.source is not None
    to, head = ("vllm-coral", named.head) if named.head in ("static", "routed") else ("vllm", "full")
    write.export(Path(named.source), to, options.output / "vllm-drafter", served="", head=head)


def first_turns(directory: Path, options: argparse.Namespace) -> tuple[dict[str, list[int]], frozenset[int]]:
    """By suite and name: the prompts as token ids, those that leave room to write; and what ends a text."""
    target = Target.load(directory, dtype="bfloat16")
    room = target.context_length - options.tokens - 64
    prompts = {
        f"{suite}/{prompt.id}": suites.render(target.tokenizer, prompt)
        for suite, found in suites.load(options.suite, options.limit).items()
        for prompt in found
    }
    return {name: ids for name, ids in prompts.items() if len(ids) <= room}, target.eos_ids


def file_digest(path: Path) -> str:
    if not path.is_file():
        raise CoralError(f"there is no {path}; --target names a GGUF file.")
    with path.open("rb") as file:
        found = sha256()
        while piece := file.read(1 << 24):
            found.update(piece)
    return found.hexdigest()


def progress(log: Records, method: Method, number: int, rounds: int, prompts: int) -> None:
    texts = [*by_method([*log.texts.values()]).get(method.name, {}).get(number, {}).values()]
    now = speed(texts, decode=True)
    done = f"round {number}/{rounds} {method.name}: {len(texts)}/{prompts} texts"
    print(f"\r{done}, {now:.1f} tokens/s" if now else f"\r{done}", end="", file=sys.stderr, flush=True)


def differing(
    methods: Sequence[Method], log: Records, prompts: Mapping[str, list[int]]
) -> list[tuple[str, tuple[list[int], list[int], list[int]]]]:
    """Method, prompt, our plain text and its own, where the weights are the same and the texts are not."""
    written = by_method([*log.texts.values()])
    found = []
    for method in methods:
        own = written.get(method.name, {})
        parted = differences(own, written.get(PLAIN, {})) if method.reference == PLAIN else {}
        for prompt in (prompt for prompt, at in parted.items() if at is not None):
            plain = next(texts[prompt].tokens for texts in written[PLAIN].values() if prompt in texts)
            others = (texts[prompt].tokens for texts in own.values() if prompt in texts)
            other = next(tokens for tokens in others if tokens != plain)
            found.append((method.name, (prompts[prompt], plain, other)))
    return found


def write_table(
    output: Path,
    results: dict[str, Any],
    methods: Sequence[Method],
    log: Records,
    verdicts: Mapping[str, Sequence[str]],
) -> str:
    """Write results.json and results.md as far as they are; returns the latter."""
    found = rows(methods, [*log.texts.values()], verdicts)
    versions = {k: v for client in log.clients.values() for k, v in client["versions"].items()}
    labels = {method.name: method.label.strip("*") for method in methods}
    trees = {
        labels[name]: one["tree"] for name, one in log.clients.items() if one.get("tree") and name in labels
    }
    results |= {"versions": versions, "trees": trees, "rows": found}
    lines = [*table(found), "", conditions(results), "", reproduce(results), ""]
    save(output, results, "\n".join(lines))
    return "\n".join(lines)


def conditions(results: Mapping[str, Any]) -> str:
    """The sentences under the table."""
    place, settings, rounds = results["environment"], results["settings"], results["rows"]
    flags = ", ".join(name for name, has in place["cpu_features"].items() if has)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    trees = "".join(f" {name} drafts the tree {tree}." for name, tree in results["trees"].items())
    most = max((row["rounds"] for row in rounds), default=0)
    prompts = f"the first {settings['limit']} prompts of {settings['suite'].replace(',', ', ')}"
    return (
        f"{place['hardware']} ({flags}), {settings['threads']} threads; {prompts}, at most "
        f"{settings['tokens']} tokens, greedy. Tokens/s are the median of {most} rounds (least to most), "
        f"without prefill and with it; ratios are without prefill, in brackets with it. {versions}.{trees}"
    )


if __name__ == "__main__":
    sys.exit(main())
