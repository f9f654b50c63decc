"""LLVM IR of the functions that `compiled.py` calls: passes over the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from .kernels import emit_collect, emit_copy, emit_sum, emit_write
from .lanes import declarations, emit_moves, function

FIELDS = {
    "latent": "ptr", "parameter": "ptr", "size": "i64",
    "whole": "ptr", "count": "i64", "checksum": "i64",
    "begin": "i64", "end": "i64", "below": "i64",
    "low": "i32", "high": "i32", "limit": "i32", "flag": "i32",
    "tau": "float", "scale": "float",
}  # fmt: skip
"""Fields of a row of a table, and their types; `compiled.py` describes them."""


def _at(name: str) -> str:
    """Return an instruction that finds the address of a field of the row."""
    index = list(FIELDS).index(name)
    return f"%{name}.at = getelementptr %Row, ptr %row, i32 0, i32 {index}"


def _get(*names: str) -> str:
    """Return instructions that load fields of the row."""
    return "\n".join(
        f"{_at(name)}\n%{name} = load {FIELDS[name]}, ptr %{name}.at" for name in names
    )


def _set(name: str, value: str) -> str:
    """Return instructions that store a field of the row."""
    field = f"getelementptr %Row, ptr %row, i32 0, i32 {list(FIELDS).index(name)}"
    return f"%{name}.to = {field}\nstore {FIELDS[name]} {value}, ptr %{name}.to"


def _each_row(name: str, arguments: str, before: str, body: str) -> str:
    """Return a function that is called for the first `%rows` rows of a table.

    Args:
        name: of the function.
        arguments: more of them, each after a comma.
        before: instructions before the first row.
        body: instructions for `%row`; they end with a branch to `%next`.
    """
    return function(
        f"void @{name}(ptr %table, i64 %rows{arguments})",
        before,
        f"""br label %head
head:
%r = phi i64 [0, %entry], [%following, %next]
%more = icmp slt i64 %r, %rows
br i1 %more, label %body, label %done
body:
%row = getelementptr %Row, ptr %table, i64 %r
{body}
next:
%following = add i64 %r, 1
br label %head
done:""",
    )


def _emit_leave() -> str:
    """Return `leave`: parameters become latent weights, unless other code wrote into them.

    Sets `flag` to whether the checksum differs. A null pointer for latent weights copies nothing.
    """
    return _each_row(
        "leave",
        "",
        "%found = alloca i64",
        f"""{_get("latent", "parameter", "size", "checksum")}
call i32 @sum(ptr %parameter, i64 %size, ptr %found)
%now = load i64, ptr %found
%differs = icmp ne i64 %now, %checksum
%marked = zext i1 %differs to i32
{_set("flag", "%marked")}
%nothing = icmp eq ptr %latent, null
%stays = or i1 %differs, %nothing
br i1 %stays, label %next, label %copies
copies:
call void @copy(ptr %latent, ptr %parameter, i64 %size)
br label %next""",
    )


def _emit_enter(copies: bool) -> str:
    """Return `enter`: latent weights become parameters, and magnitudes are collected.

    Its arguments: memory for collected scores and one more vector, how many it holds. Sets `below`,
    and where the collected scores `begin` and `end`; an end beyond the memory shows that some were
    lost. Without copies, it is `collect`.
    """
    name = "read" if copies else "count"
    values = "ptr %parameter, ptr %latent, i64 %size, float %scale, i32 %low, i32 %high"
    return _each_row(
        "enter" if copies else "collect",
        ", ptr %near, i64 %room",
        "%found = alloca i64\nstore i64 0, ptr %found",
        f"""{_get("latent", "parameter", "size", "low", "high", "scale")}
%first = load i64, ptr %found
{_set("begin", "%first")}
%upto = call i64 @{name}({values}, ptr %near, i64 %room, ptr %found)
{_set("below", "%upto")}
%last = load i64, ptr %found
{_set("end", "%last")}
br label %next""",
    )


def _emit_update(p: int | None) -> str:
    """Return `update_P`: parameters become effective weights; then a range of them is summed.

    With tau = 0, kept weights keep their values. Sets `flag` if a sum found NaN or infinity.
    """
    values = "ptr %latent, ptr %parameter, i64 %size, i32 %limit, float %tau, float %scale"
    return _each_row(
        f"update_{p or 'hard'}",
        "",
        "",
        f"""{_get("latent", "parameter", "size", "limit", "tau", "scale")}
{_get("whole", "count")}
%soft = fcmp ogt float %tau, 0.0
br i1 %soft, label %power, label %hard
power:
call void @write_{p or "hard"}({values})
br label %written
hard:
call void @write_hard({values})
br label %written
written:
%sums = icmp sgt i64 %count, 0
br i1 %sums, label %add, label %next
add:
{_at("checksum")}
%odd = call i32 @sum(ptr %whole, i64 %count, ptr %checksum.at)
{_set("flag", "%odd")}
br label %next""",
    )


def emit_module(
    width: int, factors: Sequence[int], packs: bool = False, tables: bool = False
) -> str:
    """Return the LLVM IR of all functions.

    Args:
        width: float32 numbers in a vector.
        factors: of the columns of a checksum.
        packs: compute kept weights side by side, for processors that move them there fast.
        tables: move them with AVX2.

    Example:
        >>> text = emit_module(8, [1] * 509)
        >>> [line.split("(")[0] for line in text.splitlines() if line.startswith("define void")][:2]
        ['define void @leave', 'define void @enter']
    """
    kinds = (None, 1, 2, 3)
    return "\n".join(
        [
            f"%Row = type {{{', '.join(FIELDS.values())}}}",
            *declarations(width),
            *emit_moves(width, tables),
            *(emit_write(f"write_{p or 'hard'}", p, width, packs) for p in kinds),
            *(emit_collect(width, copies) for copies in (True, False)),
            emit_copy(width),
            emit_sum(width, factors),
            _emit_leave(),
            *(_emit_enter(copies) for copies in (True, False)),
            *(_emit_update(p) for p in kinds),
        ]
    )
