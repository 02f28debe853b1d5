"""What names a GGUF file: a path, a directory with one, ORG/REPO:QUANT or ORG/REPO/FILE.gguf on the hub."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from coral.errors import CoralError

_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)  # one of several files of a model
_QUANT = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+)")
_FILE = re.compile(r"([\w.-]+/[\w.-]+)/(.+\.gguf)", re.IGNORECASE)


def find(source: str | Path, revision: str | None = None) -> list[Path] | None:
    """The files of the model that `source` names, its parts in order; downloaded unless they are in the
    hub's cache. None: it names no GGUF file, but perhaps a Hugging Face model.

    Args:
        revision: on the hub.

    Raises:
        CoralError: there is no such file, several fit, or one of its parts is missing.
    """
    text, path = str(source), Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            return None
        inside = [p.name for p in path.iterdir() if p.name.lower().endswith(".gguf")]
        return _parts(path / _only(inside, text, "the file")) if inside else None
    if path.is_file():
        return _parts(path) if text.lower().endswith(".gguf") else None
    named, quant = _FILE.fullmatch(text), _QUANT.fullmatch(text)
    is_path = isinstance(source, Path) or text.startswith((".", "/", "~"))
    if text.lower().endswith(".gguf") and (is_path or named is None):
        raise CoralError(f"there is no file {text}; check the path.")
    if is_path:
        return None
    if named is not None:
        return _download(named[1], named[2], revision, *_on_hub(named[1], revision))
    if quant is None:
        return None
    files, there = _on_hub(quant[1], revision)
    fitting = [name for name in files if _is_of(name, quant[2])]
    if not fitting:
        raise CoralError(
            f"{quant[1]} holds no GGUF file of the quantisation {quant[2]!r}; it holds {_list(files)}."
        )
    chosen = _only(fitting, text, f"it as {quant[1]}/FILE.gguf")
    return _download(quant[1], chosen, revision, files, there)


def is_gguf(source: str | Path) -> bool:
    """Whether `source` names a GGUF file, as far as that shows without asking the hub."""
    if (path := Path(source)).is_dir():
        return not (path / "config.json").is_file() and any(path.glob("*.[gG][gG][uU][fF]"))
    return str(source).lower().endswith(".gguf") or bool(_QUANT.fullmatch(str(source)))


def hint(source: str | Path, revision: str | None = None) -> str:
    """What to say about a hub id that is no Hugging Face model: the GGUF files that it holds, if any."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return ""
    try:
        files, _ = _on_hub(str(source), revision)
    except CoralError:
        return ""
    return f" It holds GGUF files; name one of {_list(files)} as {source}/FILE.gguf." if files else ""


def _is_of(name: str, quant: str) -> bool:
    stem = re.sub(r"\.gguf$", "", _PART.sub("", name), flags=re.IGNORECASE)
    before = "-._/" if re.match(r"[a-z]+\d", quant, re.IGNORECASE) else "-./"  # K_M is not Q4_K_M
    return re.search(rf"(?:^|[{before}]){re.escape(quant)}$", stem, re.IGNORECASE) is not None


def _only(names: Iterable[str], asked: str, instead: str) -> str:
    """The one model among these files: parts are one, and an image encoder beside it does not count."""
    models: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        models[_PART.sub("", name)].append(name)
    texts = {key: parts for key, parts in models.items() if not Path(key).name.lower().startswith("mmproj")}
    if len(texts) != 1:
        found = [parts[0] for parts in (texts or models).values()]
        raise CoralError(f"{asked} may be one of several GGUF files: {_list(found)}; name {instead}.")
    return next(iter(texts.values()))[0]


def _list(names: list[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _siblings(name: str) -> list[str]:
    """The names of all parts, in order, of the model that `name` is a part of."""
    if (part := _PART.search(name)) is None:
        return [name]
    count = int(part[2])
    return [f"{name[: part.start()]}-{i:05d}-of-{count:05d}{name[part.end() :]}" for i in range(1, count + 1)]


def _parts(path: Path) -> list[Path]:
    paths = [path.with_name(name) for name in _siblings(path.name)]
    if missing := [p.name for p in paths if not p.is_file()]:
        raise CoralError(f"{path} is one of {len(paths)} parts; {_list(missing)} should lie beside it.")
    return paths


def _download(repo: str, name: str, revision: str | None, files: list[str], there: Path | None) -> list[Path]:
    from huggingface_hub import hf_hub_download

    from coral.target.download import explained

    if absent := [part for part in _siblings(name) if part not in files]:
        raise CoralError(f"{repo} holds no {absent[0]}; it holds {_list(files)}.")
    if there is not None:
        return [there / part for part in _siblings(name)]
    try:
        return [Path(hf_hub_download(repo, part, revision=revision)) for part in _siblings(name)]
    except Exception as error:
        raise explained(error, f"cannot download {name} of {repo!r}: ", revision) from error


def _on_hub(repo: str, revision: str | None) -> tuple[list[str], Path | None]:
    """The GGUF files of a repository, or, without a network, those that were downloaded, and their place."""
    from huggingface_hub import HfApi, snapshot_download

    from coral.target.download import explained

    there = None
    try:  # one request without retries, which take half a minute where there is no network
        siblings = HfApi().model_info(repo, revision=revision, timeout=20).siblings
        names = [file.rfilename for file in siblings or ()]
    except Exception as error:
        try:
            there = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        except Exception:
            raise explained(error, f"no target {repo!r}: no such file, and ", revision) from error
        names = [path.relative_to(there).as_posix() for path in there.rglob("*")]
    return [name for name in names if name.lower().endswith(".gguf")], there
