"""Importance matrices of llama.cpp: what every column of a matrix got as input, in squares.

path ── open_imatrix ──> Imatrix ── sums of a role in a layer ──> InputSums

A file is as large as its model has columns, experts counted: it is opened by its header, and
sums are read when they are asked for. GGUF and the older `.dat` come to the same entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emitters.numerics.value_types import Array
from emitters.tensor_io.imatrix_entries import SUM_NBYTES, Entry, legacy_entries
from emitters.tensor_io.read import Source, file_facts
from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, fail
from policy_dsl.escaping import shown
from policy_dsl.regular_files import LOOKED_AT_NBYTES, refuse_placeholder
from policy_dsl.roles.published_names import llama_cpp_names

_MAGIC = b"GGUF"
# What damage makes the readers raise; OSError is a file that could not be mapped.
_DAMAGE = (ValueError, LookupError, ArithmeticError, TypeError, RecursionError, OSError)
# llama-imatrix sees no inputs of a table of rows, and leaves out the head unless it is asked.
_NEVER = ("embed",)
_ONLY_IF_ASKED = ("lm_head",)
_REMAKE = "fetch the file again, or make it again with llama-imatrix"


class InputSums(NamedTuple):
    """Sums over tokens of the squared inputs of a matrix, or of each expert of a layer.

    sums: float32 [n_matrices, columns], counts: float32 [n_matrices] (tokens; in a legacy file
    chunks), both read-only and 0 where no token came. counts_known: False if the file has one
    count for all experts, so that every expert that was used has the same.
    """

    entry: str
    sums: Array
    counts: Array
    counts_known: bool = True

    def of(self, matrices: Sequence[int]) -> InputSums:
        """What is known of these matrices, in this order."""
        chosen = list(matrices)
        return self._replace(sums=self.sums[chosen], counts=self.counts[chosen])

    def importance(self) -> Array:
        """float32 [n_matrices, columns]: mean squared inputs; 1 for experts without tokens.

        Source: ggml-org/llama.cpp 03161a4, tools/quantize/quantize.cpp, `load_imatrix`.
        """
        used = self.counts > 0
        counts = np.where(used, self.counts, np.float32(1))[:, None]
        means: Array = np.where(used[:, None], self.sums / counts, np.float32(1))
        return means


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix file, known by its header: entry by llama.cpp's name of a matrix.

    span: where a policy names the file. Many threads may share it.
    """

    path: Path
    entries: Mapping[str, Entry]
    source: Source
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def findings(self) -> tuple[Diagnostic, ...]:
        """A warning if the file keeps one count for all experts of a layer.

        Legacy files do, and GGUF files made of them: each expert's sums are divided by its own
        tokens before they are written, so that traffic is lost when experts are added up.
        """
        counts = (entry.n_counts for name, entry in self.entries.items() if "_exps." in name)
        if 1 not in counts:
            return ()
        cure = "make it again with llama-imatrix, which writes GGUF, if experts should count"
        path = str(self.path)
        return (diagnostic("imatrix-without-counts", self.span, path=path, suggestion=cure),)

    def sums(
        self, role: str, layer: int | None, *, n_matrices: int = 1, columns: int, instead: str = ""
    ) -> InputSums:
        """The sums of a role's matrices in a layer, all experts in order.

        n_matrices: experts, or 1; columns: inputs of a matrix. An expert that no token reached
        has sums and a count of 0, in every kind of file. instead: the treatment that could be
        taken without them, for the finding.
        Raises: PolicyError if the file lacks the entry, it has another shape, a sum or a count
        is not a number from 0 up, or no token reached any of the matrices.
        """
        name, entry = self._find(role, layer, instead)
        columns_held = entry.n_sums // entry.n_counts
        broadcast = entry.n_counts == 1 < n_matrices
        whole = (1, n_matrices * columns) if broadcast else (n_matrices, columns)
        if (entry.n_counts, columns_held) != whole:
            held = f"{entry.n_counts} matrices of {columns_held} columns"
            needs = f"{n_matrices} of {columns}"
            cure = "give the importance matrix of this model"
            raise self._fail("imatrix-of-another-model", cure, entry=name, found=held, wanted=needs)
        sums = self._floats(entry.sums_at, entry.n_sums).reshape(n_matrices, columns)
        if entry.counts_at is None:
            counts = np.array([entry.calls], np.float32)
        else:
            counts = self._floats(entry.counts_at, entry.n_counts)
        if broadcast:
            sums, counts = _without_placeholders(sums, counts[0])
        defect = _defect(sums, counts)
        if defect:
            raise self._fail("bad-imatrix-entry", _REMAKE, entry=name, reason=defect)
        sums.flags.writeable = counts.flags.writeable = False
        return InputSums(name, sums, counts, not broadcast)

    def _find(self, role: str, layer: int | None, instead: str) -> tuple[str, Entry]:
        names = llama_cpp_names(role, layer)
        for name in names:
            if name in self.entries:
                return name, self.entries[name]
        what = role if layer is None else f"{role} of layer {layer}"
        rule = f"write `{role}: {instead}`" if instead else "choose another method for it"
        if role in _ONLY_IF_ASKED:
            cure = f"run llama-imatrix with --process-output, or {rule}"
        elif not names or role in _NEVER:
            cure = f"llama-imatrix writes nothing about {role}: {rule}"
        else:
            called = f"it should be called {names[0]}"
            cure = f"{called}: make the file of this model, with enough text"
        raise self._fail("missing-imatrix-entry", cure, what=what)

    def _floats(self, start: int, count: int) -> Array:
        return self.source.read(self.path.name, start, count * SUM_NBYTES).view(np.float32)

    def _fail(self, code: str, cure: str, **facts: str) -> PolicyError:
        return fail(code, self.span, suggestion=cure, path=str(self.path), **facts)


def open_imatrix(path: Path, span: Span | None = None) -> Imatrix:
    """The importance matrix in a file, GGUF or legacy by its first bytes; its header is read.

    span: where a policy names it, for the findings. Memory: 50 MB at most, whatever the file.
    Raises: PolicyError if it cannot be read, or is not a whole importance matrix.
    """
    try:
        source = Source(path.parent, file_facts(path.parent, [path.name]))
        nbytes = source.facts[path.name].nbytes
        first = source.read(path.name, 0, min(nbytes, LOOKED_AT_NBYTES)).tobytes()
        refuse_placeholder(path.name, first, nbytes)
    except PolicyError as error:
        # Where a policy names it is where the cure is.
        raise PolicyError(replace(defect, span=span) for defect in error.diagnostics) from error
    facts: dict[str, Any] = {"path": str(path), "suggestion": _REMAKE}
    try:
        entries, defects = _entries(source, path)
    except _DAMAGE as error:
        raise fail("not-an-imatrix", span, reason=shown(str(error)), **facts) from error
    if defects:
        raise PolicyError(
            diagnostic("bad-imatrix-entry", span, entry=shown(name), reason=reason, **facts)
            for name, reason in defects.items()
        )
    return Imatrix(path, entries, source, span)


def _entries(source: Source, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    nbytes = source.facts[path.name].nbytes
    if nbytes < len(_MAGIC):
        raise ValueError(f"it has only {nbytes} bytes" if nbytes else "it is empty")
    if source.read(path.name, 0, len(_MAGIC)).tobytes() != _MAGIC:
        return legacy_entries(source, path.name), {}
    # Late: reading any other file does not need the library.
    from emitters.tensor_io.imatrix_gguf import gguf_entries  # noqa: PLC0415

    return gguf_entries(path)


def _defect(sums: Array, counts: Array) -> str | None:
    """What is wrong with an entry's numbers; None if nothing is."""
    finite = np.isfinite(sums) & (sums >= 0)
    # A NaN that signals would warn; it is reported below.
    with np.errstate(invalid="ignore"):
        whole = np.isfinite(counts) & (counts >= 0) & (counts == np.rint(counts))
    for what, values, good in (("sum", sums, finite), ("count", counts, whole)):
        if not good.all():
            at = int(np.argmin(good))
            return f"{what} {at} is {values.reshape(-1)[at]}"
    if not counts.any():
        return "no token reached it"
    if sums[counts == 0].any():
        return "matrices without tokens have sums"
    return None


def _without_placeholders(sums: Array, count: np.float32) -> tuple[Array, Array]:
    """Sums and a count for each expert; a mean of exactly 1 in all columns means no token.

    Source: ggml-org/llama.cpp 006e7ef, tools/imatrix/imatrix.cpp, `save_imatrix_legacy`.
    """
    used = (sums != count).any(axis=1)
    counts = np.where(used, count, np.float32(0))
    return np.where(used[:, None], sums, np.float32(0)), counts
