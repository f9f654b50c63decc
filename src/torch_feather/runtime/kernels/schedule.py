"""LLVM IR of the functions that execute a program on one or several threads."""

from __future__ import annotations

from collections.abc import Iterator

from .host import Target
from .records import OPERATION

# Polls of a barrier (about 0.1 ms) before a thread sleeps. Two threads that share a core would
# otherwise block each other; a thread that wakes up is scheduled on a free core.
POLLS = 10_000
SLEEP_MICROSECONDS = 30
# Functions of LLVM that tell the processor that a thread is waiting, by architecture, and their
# argument. Inline assembly would need an assembler for the architecture.
PAUSES = {
    "x86_64": ("llvm.x86.sse2.pause", ""),
    "aarch64": ("llvm.aarch64.hint", "i32 1"),
    "arm64": ("llvm.aarch64.hint", "i32 1"),
}


def can_sleep(target: Target) -> bool:
    """Return whether the target's system has `usleep`.

    Example:
        >>> can_sleep(Target("x86_64-pc-windows-msvc"))
        False
    """
    return "windows" not in target.triple


def declare_waiting(target: Target) -> Iterator[str]:
    """Yield the declarations of the functions that the barrier calls.

    Example:
        >>> list(declare_waiting(Target("riscv64-linux-gnu")))
        ['declare i32 @usleep(i32)']
    """
    if can_sleep(target):
        yield "declare i32 @usleep(i32)"
    if target.architecture in PAUSES:
        name, argument = PAUSES[target.architecture]
        yield f"declare void @{name}({argument.partition(' ')[0]})"


def emit_run(target: Target) -> Iterator[str]:
    """Yield the lines of `run(operations, n, thread, threads, barrier)`.

    Each thread computes an equal part of the work items of each operation, then waits for the
    other threads. The barrier counts the threads that have finished an operation; it must be 0 at
    the beginning.

    Args:
        target: the processor.

    Example:
        >>> any("@llvm.x86.sse2.pause()" in line for line in emit_run(Target("x86_64-linux-gnu")))
        True
    """
    yield "define void @run(ptr %operations, i64 %n, i64 %thread, i64 %threads, ptr %barrier) {"
    yield "entry:"
    yield "  %alone = icmp eq i64 %threads, 1"
    yield "  %some = icmp ult i64 0, %n"
    yield "  br i1 %some, label %operation, label %exit"
    yield "operation:"
    yield "  %j = phi i64 [ 0, %entry ], [ %j.next, %next ]"
    yield f"  %place = mul i64 %j, {OPERATION.itemsize}"
    yield "  %kernel.at = getelementptr i8, ptr %operations, i64 %place"
    yield "  %kernel = load ptr, ptr %kernel.at"
    yield "  %record.at = getelementptr i8, ptr %kernel.at, i64 8"
    yield "  %record = load ptr, ptr %record.at"
    yield "  %items.at = getelementptr i8, ptr %kernel.at, i64 16"
    yield "  %items = load i64, ptr %items.at"
    yield "  %thread.after = add i64 %thread, 1"
    for name, thread in (("i0", "%thread"), ("i1", "%thread.after")):
        yield f"  %{name}.part = mul i64 %items, {thread}"
        yield f"  %{name} = udiv i64 %{name}.part, %threads"
    yield "  call void %kernel(ptr %record, i64 %i0, i64 %i1)"
    yield "  %j.next = add i64 %j, 1"
    yield "  br i1 %alone, label %next, label %arrive"
    yield from _wait_for_threads(target)
    yield "next:"
    yield "  %more = icmp ult i64 %j.next, %n"
    yield "  br i1 %more, label %operation, label %exit"
    yield "exit:"
    yield "  ret void"
    yield "}"


def _wait_for_threads(target: Target) -> Iterator[str]:
    """Wait until all threads have finished operations 0 to j."""
    pause = PAUSES.get(target.architecture)
    yield "arrive:"
    yield "  %before = atomicrmw add ptr %barrier, i64 1 acq_rel"
    yield "  %all = mul i64 %j.next, %threads"
    yield "  br label %wait"
    yield "wait:"
    yield "  %spin = phi i64 [ 0, %arrive ], [ %spin.next, %relax ], [ 0, %yield ]"
    yield "  %here = load atomic i64, ptr %barrier acquire, align 8"
    yield "  %complete = icmp uge i64 %here, %all"
    yield "  br i1 %complete, label %next, label %waiting"
    yield "waiting:"
    yield f"  %long = icmp ugt i64 %spin, {POLLS}"
    yield "  br i1 %long, label %yield, label %relax"
    yield "relax:"
    if pause:
        yield f"  call void @{pause[0]}({pause[1]})"
    yield "  %spin.next = add i64 %spin, 1"
    yield "  br label %wait"
    yield "yield:"
    if can_sleep(target):
        yield f"  %slept = call i32 @usleep(i32 {SLEEP_MICROSECONDS})"
    yield "  br label %wait"


def emit_run_team() -> Iterator[str]:
    """Yield the lines of `run_team(operations, n, threads, barrier)`.

    It calls `run` on all threads of an OpenMP team.

    Example:
        >>> next(emit_run_team())
        'declare void @GOMP_parallel(ptr, ptr, i32, i32)'
    """
    yield "declare void @GOMP_parallel(ptr, ptr, i32, i32)"
    yield "declare i32 @omp_get_thread_num()"
    yield "declare i32 @omp_get_num_threads()"
    yield "define void @member(ptr %call) {"
    yield "  %operations = load ptr, ptr %call"
    yield "  %n.at = getelementptr i64, ptr %call, i64 1"
    yield "  %n = load i64, ptr %n.at"
    yield "  %barrier.at = getelementptr i64, ptr %call, i64 2"
    yield "  %barrier = load ptr, ptr %barrier.at"
    for name in ("thread_num", "num_threads"):
        yield f"  %{name}.short = call i32 @omp_get_{name}()"
        yield f"  %{name} = zext i32 %{name}.short to i64"
    yield (
        "  call void @run(ptr %operations, i64 %n, i64 %thread_num, i64 %num_threads, ptr %barrier)"
    )
    yield "  ret void"
    yield "}"
    yield "define void @run_team(ptr %operations, i64 %n, i64 %threads, ptr %barrier) {"
    yield "  %call = alloca [3 x i64], align 8"
    yield "  store ptr %operations, ptr %call"
    yield "  %n.at = getelementptr i64, ptr %call, i64 1"
    yield "  store i64 %n, ptr %n.at"
    yield "  %barrier.at = getelementptr i64, ptr %call, i64 2"
    yield "  store ptr %barrier, ptr %barrier.at"
    yield "  %threads.short = trunc i64 %threads to i32"
    yield "  call void @GOMP_parallel(ptr @member, ptr %call, i32 %threads.short, i32 0)"
    yield "  ret void"
    yield "}"
