"""What drafts for a target, and how: one value, which the rest of the library hands on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coral.device import has_queue
from coral.drafters.default_tree import default_tree
from coral.errors import CoralError
from coral.tree import LOOKUP_NODES, TreeSize

if TYPE_CHECKING:
    from coral.decoding.cycle import Proposer
    from coral.drafters.heads.store import Head
    from coral.target.target import Target


@dataclass(frozen=True)
class Drafting:
    """What drafts, and how; without a source and lookup it is plain decoding.

    source: a drafter's directory or hub id ("me/drafter", pinned as "me/drafter@REVISION"), or a drafter that
        is already loaded.
    head: the drafter's LM head, see `heads.load`; of no account where its kind has none.
    lookup: prompt lookup drafts, too, in the same tree.
    tree: how large draft trees grow; None: what `coral tune` found for this drafter here, else
        `default_tree`.
    coupled: at temperature > 0 draft with the noise that the sampler will use.
    fallback: take plain steps while drafting is slower than they are.
    """

    source: Any = None
    head: str = "auto"
    lookup: bool = False
    tree: TreeSize | None = None
    coupled: bool = True
    fallback: bool = True

    @classmethod
    def parse(cls, drafter: Any, **options: Any) -> Drafting:
        """What `drafter` names: None or "plain" is plain decoding, "ngram" lookup alone. Behind a directory
        or hub id stand "+ngram" for both in one tree, and "+full", "+routed" and so on for one of its heads.

        Args:
            drafter: such a name, a path, a loaded drafter, or a Drafting, which is returned.
            options: the other fields. A head in the name goes before.

        Raises:
            CoralError: a Drafting with other options beside it.
        """
        from coral.drafters.heads.store import HEADS

        if isinstance(drafter, Drafting):
            defaults = {field.name: field.default for field in fields(cls)}
            if odd := [name for name, value in options.items() if value not in (None, defaults[name])]:
                raise CoralError(f"{' and '.join(odd)} belong into the Drafting; leave them out beside it.")
            return drafter
        asked = {**options, "head": options.get("head") or "auto"}
        if drafter in (None, "plain", "ngram"):
            return cls(None, lookup=drafter == "ngram", **asked)
        lookup = False
        while isinstance(drafter, str):
            source, _, last = drafter.rpartition("+")
            if not source or last not in ("ngram", *HEADS):
                break
            drafter, lookup = source, lookup or last == "ngram"
            asked["head"] = asked["head"] if last == "ngram" else last
        return cls(drafter, lookup=lookup, **asked)

    def located(self) -> Drafting:
        """The same with its local directory in place of a hub id. The hub is asked once, so what is read
        afterwards is of one revision.

        Raises:
            CoralError: no such drafter or head.
        """
        from coral.drafters import checkpoint
        from coral.drafters.heads import store as heads

        if not isinstance(self.source, str | Path):
            return self
        directory = checkpoint.locate(self.source)
        heads.resolve(directory, self.head)
        return replace(self, source=directory)

    def tree_size(self, target: Target) -> tuple[TreeSize, str]:
        """How large its trees grow, and where that comes from: "asked for", "tuned" or "default".

        Tuned is what `coral tune` found for this drafter and head on such a device, with a target of this
        dtype, number of layers and backend.

        Raises:
            CoralError: no such drafter or head, or a file of tuned trees that cannot be read.
        """
        from coral.drafters import tuned
        from coral.drafters.heads import store as heads

        if self.tree is not None:
            return self.tree, "asked for"
        found, here = None, self.located()
        if isinstance(here.source, Path):
            head = heads.resolve(here.source, here.head)
            found = tuned.find(here.source, tuned.Conditions.of(target, head))
        tree = found or default_tree(target)
        if self.lookup:
            tree = replace(tree, num_nodes=max(tree.num_nodes, LOOKUP_NODES))
        return tree, "tuned" if found else "default"

    def proposer(self, target: Target) -> Proposer:
        """What drafts for a target.

        Raises:
            CoralError: no such drafter or head, or a drafter of another target.
        """
        from coral.decoding import row_costs
        from coral.decoding.fallback import Fallback
        from coral.decoding.merged import Merged
        from coral.decoding.plain import Plain

        if self.source is None and not self.lookup:
            return Plain()
        drafts = _lookup(target) if self.source is None else self._of_source(target)
        merges = self.source is not None and self.lookup
        proposer = Merged(drafts, _lookup(target)) if merges else drafts
        costs = None if has_queue(target.device) else partial(row_costs.of, target, drafts)
        return Fallback(proposer, costs) if self.fallback else proposer

    def _of_source(self, target: Target) -> Proposer:
        from coral.drafters import checkpoint, kinds

        here = self.located()
        if isinstance(here.source, Path):
            device = target.head_weight.device
            drafter = checkpoint.load(here.source, target, dtype=target.dtype, device=device)
        else:
            drafter = _fitted(here.source, target)
        kind = kinds.find(drafter.kind)
        head = here._head(target) if kind.draft else None
        return kind.proposer(drafter, target, head, self.coupled)

    def _head(self, target: Target) -> Head:
        from coral.drafters.heads import store as heads

        if isinstance(self.source, Path):
            return heads.load(self.source, target, self.head)
        return heads.of_target(target, heads.DEFAULT_HEAD if self.head == "auto" else self.head)


def _lookup(target: Target) -> Proposer:
    from coral.drafters import kinds

    lookup = kinds.find("lookup")
    return lookup.proposer(lookup.Drafter(lookup.Config()), target, None, False)


def _fitted(drafter: Any, target: Target) -> Any:
    """A loaded drafter in the target's dtype and on its device; copied where that changes it."""
    drafter.config.check_sizes(target)
    wanted = target.head_weight
    if all((own.dtype, own.device) == (wanted.dtype, wanted.device) for own in drafter.parameters()):
        return drafter
    return deepcopy(drafter).to(device=wanted.device, dtype=wanted.dtype)
