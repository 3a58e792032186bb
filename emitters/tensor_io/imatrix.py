"""Importance matrices of llama.cpp: what every column of a matrix got as input, in squares."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from emitters.numerics import Array
from emitters.tensor_io.files import Source, file_facts
from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, fail
from policy_dsl.escaping import shown
from policy_dsl.regular_files import LOOKED_AT_NBYTES, opened, refuse_placeholder
from policy_dsl.roles.model import llama_cpp_names

if TYPE_CHECKING:
    from gguf.gguf_reader import GGUFReader, ReaderTensor

SUM_NBYTES = 4  # float32, counts likewise
# More than any model has; a file of nothing but tiny entries must not fill the memory.
MAX_ENTRIES = 20_000
# Each read of a GGUF header keeps about 700 bytes; a file of 1,000 entries needs 18,000.
_MAX_READS = 50_000
_MAX_NAME = 1024
_MAGIC = b"GGUF"
_SUMS, _COUNTS = ".in_sum2", ".counts"
# What damage makes the readers raise; OSError is a file that could not be mapped.
_DAMAGE = (ValueError, LookupError, ArithmeticError, TypeError, RecursionError, OSError)
# llama-imatrix sees no inputs of a table of rows, and leaves out the head unless it is asked.
_NEVER, _ONLY_IF_ASKED = "embed", "lm_head"
_REMAKE = "fetch the file again, or make it again with llama-imatrix"


class Entry(NamedTuple):
    """Where float32 numbers of matrices are. Legacy: no counts_at, `calls` is the only count."""

    sums_at: int
    n_sums: int
    n_counts: int = 1
    counts_at: int | None = None
    calls: int = 0


class InputSums(NamedTuple):
    """Sums over tokens of the squared inputs of a matrix, or of each expert of a layer.

    sums: float32 [n_matrices, columns]; counts: float32 [n_matrices], of tokens, in a legacy file
    of chunks. Both are read-only, and 0 where no token came.
    """

    entry: str
    sums: Array
    counts: Array

    def of(self, matrices: Sequence[int]) -> InputSums:
        """What is known of these matrices, in this order."""
        return self._replace(sums=self.sums[[*matrices]], counts=self.counts[[*matrices]])

    def importance(self) -> Array:
        """float32 [n_matrices, columns]: mean squared inputs; 1 for experts without tokens.

        Source: ggml-org/llama.cpp 03161a4, tools/quantize/quantize.cpp, `load_imatrix`.
        """
        used, one = self.counts[:, None] > 0, np.float32(1)
        means: Array = np.where(used, self.sums / np.where(used, self.counts[:, None], one), one)
        return means


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix file by llama.cpp's names of matrices. span: where a policy names it."""

    path: Path
    entries: Mapping[str, Entry]
    source: Source
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def findings(self) -> tuple[Diagnostic, ...]:
        """A warning if the file keeps one count for all experts of a layer.

        Legacy files do, and GGUF files made of them. Their sums are divided by each expert's own
        tokens, so that traffic is lost when experts are added up.
        """
        if all(one.n_counts > 1 for name, one in self.entries.items() if "_exps." in name):
            return ()
        cure = "make it again with llama-imatrix, which writes GGUF, if experts should count"
        path = str(self.path)
        return (diagnostic("imatrix-without-counts", self.span, path=path, suggestion=cure),)

    def sums(
        self, role: str, layer: int | None, *, n_matrices: int = 1, columns: int, instead: str = ""
    ) -> InputSums:
        """The sums of a role's matrices in a layer, all experts in order; 0 where no token came.

        n_matrices: experts, or 1; columns: inputs of a matrix. instead: the treatment that could
        be taken without them, for the finding.
        Raises: PolicyError if the file lacks the entry, it has another shape, a sum or a count
        is not a number from 0 up, or no token reached any of the matrices.
        """
        name = self._name(role, layer, instead)
        entry = self.entries[name]
        held = entry.n_counts, entry.n_sums // entry.n_counts
        broadcast = entry.n_counts == 1 < n_matrices
        if held != ((1, n_matrices * columns) if broadcast else (n_matrices, columns)):
            found, wanted = "{} matrices of {} columns".format(*held), f"{n_matrices} of {columns}"
            code, cure = "imatrix-of-another-model", "give the importance matrix of this model"
            raise self._fail(code, cure, entry=name, found=found, wanted=wanted)
        sums = self._floats(entry.sums_at, entry.n_sums).reshape(n_matrices, columns)
        counts = np.array([entry.calls], np.float32)
        if entry.counts_at is not None:
            counts = self._floats(entry.counts_at, entry.n_counts)
        if broadcast:
            # A mean of exactly 1 in all columns means no token. Source: ggml-org/llama.cpp
            # 006e7ef, tools/imatrix/imatrix.cpp, `save_imatrix_legacy`.
            used = (sums != counts[0]).any(axis=1)
            counts = np.where(used, counts[0], np.float32(0))
            sums = np.where(used[:, None], sums, np.float32(0))
        if defect := _defect(sums, counts):
            raise self._fail("bad-imatrix-entry", _REMAKE, entry=name, reason=defect)
        sums.flags.writeable = counts.flags.writeable = False
        return InputSums(name, sums, counts)

    def _name(self, role: str, layer: int | None, instead: str) -> str:
        names = llama_cpp_names(role, layer)
        if held := [name for name in names if name in self.entries]:
            return held[0]
        rule = f"write `{role}: {instead}`" if instead else "choose another method for it"
        if role == _ONLY_IF_ASKED:
            cure = f"run llama-imatrix with --process-output, or {rule}"
        elif not names or role == _NEVER:
            cure = f"llama-imatrix writes nothing about {role}: {rule}"
        else:
            cure = f"it should be called {names[0]}: make the file of this model, with enough text"
        what = role if layer is None else f"{role} of layer {layer}"
        raise self._fail("missing-imatrix-entry", cure, what=what)

    def _floats(self, start: int, count: int) -> Array:
        return self.source.read(self.path.name, start, count * SUM_NBYTES).view(np.float32)

    def _fail(self, code: str, cure: str, **facts: str) -> PolicyError:
        return fail(code, self.span, suggestion=cure, path=str(self.path), **facts)


def open_imatrix(path: Path, span: Span | None = None) -> Imatrix:
    """The importance matrix in a file, GGUF or legacy by its first bytes, known by its header.

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
        if nbytes < len(_MAGIC):
            raise ValueError(f"it has only {nbytes} bytes" if nbytes else "it is empty")
        is_gguf, walk = first.startswith(_MAGIC), _Walk(source, path.name, nbytes)
        entries, defects = _gguf_entries(path) if is_gguf else (_legacy_entries(walk), {})
    except _DAMAGE as error:
        raise fail("not-an-imatrix", span, reason=shown(str(error)), **facts) from error
    if defects:
        raise PolicyError(
            diagnostic("bad-imatrix-entry", span, entry=shown(name), reason=reason, **facts)
            for name, reason in defects.items()
        )
    return Imatrix(path, entries, source, span)


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
    return "matrices without tokens have sums" if sums[counts == 0].any() else None


@dataclass
class _Walk:
    """A way through a legacy file, from one length to the next; `skip` gives the place."""

    source: Source
    file: str
    left: int
    at: int = 0

    def skip(self, count: int) -> int:
        if count > self.left:
            raise ValueError(f"it needs {count} bytes where {self.left} are left")
        start, self.at, self.left = self.at, self.at + count, self.left - count
        return start

    def take(self, count: int) -> bytes:
        return self.source.read(self.file, self.skip(count), count).tobytes()

    def integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", self.take(4 * count))


def _legacy_entries(walk: _Walk) -> dict[str, Entry]:
    """Entry by name. Calls are chunks of text, and sums are means times calls.

    Source: ggml-org/llama.cpp 006e7ef, tools/imatrix/imatrix.cpp, `save_imatrix_legacy`.
    """
    (count,) = walk.integers(1)
    if not 0 < count <= MAX_ENTRIES:
        raise ValueError("it begins neither as GGUF nor with a count of entries")
    entries: dict[str, Entry] = {}
    for number in range(count):
        try:
            name, entry = _legacy_entry(walk)
        except ValueError as defect:
            raise ValueError(f"entry {number + 1} of {count}: {defect}") from None
        if name in entries:
            raise ValueError(f'there are two entries "{name}"')
        entries[name] = entry
    # What may follow: the number of chunks, and the name of the text.
    if walk.left:
        walk.skip(4)
    if walk.left:
        (length,) = walk.integers(1)
        if length != walk.left:
            raise ValueError(f"{walk.left} bytes follow its last entry, not {length}")
    return entries


def _legacy_entry(walk: _Walk) -> tuple[str, Entry]:
    (length,) = walk.integers(1)
    if not 0 < length <= _MAX_NAME:
        raise ValueError(f"its name would have {length} bytes")
    # A name that is not UTF-8 raises a ValueError too.
    name = walk.take(length).decode()
    if not name.isprintable():
        raise ValueError("its name holds characters that cannot be printed")
    calls, n_sums = walk.integers(2)
    if calls < 1 or n_sums < 1:
        raise ValueError(f'"{shown(name)}" says {calls} calls and {n_sums} sums')
    return name, Entry(walk.skip(SUM_NBYTES * n_sums), n_sums, calls=calls)


def _gguf_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entry by name, and by name what is wrong with others. Sums and counts are never touched.

    Raises: one of `_DAMAGE` if it is not a whole GGUF file of an importance matrix.
    Source: gguf 0.19.0, `GGUFReader`; ggml-org/llama.cpp 006e7ef, tools/imatrix/imatrix.cpp,
    `save_imatrix`; offsets without gaps as ggml's `gguf_init_from_file` demands.
    """
    # Offsets beyond 64 bits must not become small ones.
    with np.errstate(over="raise"), opened(path) as file:
        # The file and not its path, which may lead to another one by now.
        reader = _gguf_reader()(cast("Any", file))
    if reader.byte_order != "I":
        raise ValueError("its numbers are big-endian")
    kind = reader.get_field("general.type")
    said = kind.contents() if kind else None
    if said != "imatrix":
        raise ValueError(f'its general.type is "{shown(str(said))}", not "imatrix"')
    end, tensors = reader.data_offset, {}
    names: dict[str, None] = {}
    for tensor in reader.tensors:
        if tensor.data_offset != end:
            at = f"byte {tensor.data_offset} and not at {end}"
            raise ValueError(f'tensor "{shown(tensor.name)}" starts at {at}')
        end += tensor.n_bytes + -tensor.n_bytes % int(reader.alignment)
        tensors[tensor.name] = tensor
        # Those that have sums or counts; `.in_sum` and all else is not used.
        if tensor.name.endswith((_SUMS, _COUNTS)):
            names[tensor.name.rpartition(".")[0]] = None
    entries: dict[str, Entry] = {}
    defects: dict[str, str] = {}
    for name in names:
        try:
            entries[name] = _gguf_entry(tensors, name)
        except ValueError as defect:
            defects[name] = str(defect)
    if not names:
        raise ValueError("it has no entries")
    return entries, defects


def _gguf_reader() -> type[GGUFReader]:
    """The library's reader, which else takes lengths beyond the file as empty, and goes on."""
    # Late: reading any other file does not need the library and its tables of model families.
    from gguf.gguf_reader import GGUFReader  # noqa: PLC0415

    class Checked(GGUFReader):
        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.reads += 1
            if self.reads > _MAX_READS:
                raise ValueError("its header has more parts than an importance matrix ever has")
            left = max(0, self.data.size - int(offset))
            if int(count) * np.dtype(dtype).itemsize > left or int(offset) > self.data.size:
                raise ValueError(f"it is cut short: {count} values do not fit into {left} bytes")
            return super()._get(offset, dtype, count, override_order)

    return Checked


def _gguf_entry(tensors: Mapping[str, ReaderTensor], name: str) -> Entry:
    if not name.isprintable():
        raise ValueError("its name holds characters that cannot be printed")
    for part in (_SUMS, _COUNTS):
        if name + part not in tensors:
            raise ValueError(f"it has no {part}")
        dtype = tensors[name + part].tensor_type.name
        if dtype != "F32":
            raise ValueError(f"its {part} are {dtype}, not F32")
    sums, counts = tensors[name + _SUMS], tensors[name + _COUNTS]
    n_sums, n_counts = int(sums.n_elements), int(counts.n_elements)
    # One count for each matrix; [in, 1] is also written as [in].
    if not n_sums or n_sums != int(sums.shape[0]) * n_counts:
        shape = sums.shape.tolist()
        raise ValueError(f"it has sums of shape {shape} and {n_counts} counts")
    return Entry(sums.data_offset, n_sums, n_counts, counts.data_offset)
