"""What is made of the samples: ratios, tables on the terminal, and the text in the README.

The report is one JSON object:

    machine     processor, C level, BLAS with its kernels, versions, the backend that functions use, load at the start
    missing     contender → why it could not run and how to mend that
    settings    what was asked for
    cases       one for each kernel, shape and condition (and peer, where it runs alone), with
        kernel, shape, condition, threads, elements
        bytes       what the operation has to move, write-allocate included
        limit       pattern → bytes per second that NumPy reaches at this footprint, in the same rounds
        memory      pattern → bytes per second with arrays far larger than the caches, in the same process
        contenders  name → median_ns, min_ns, iqr_ns (distance of the quartiles), samples, calls_per_sample,
            ns_per_element, bytes_per_second, share (of the highest `limit`), over_floor (time over that of `bytes` at
            memory's copy bandwidth), errors (output → error relative to its row's largest entry; null: not finite),
            wrong; or failed, with the reason
    ratios      one for each kernel, shape and contender of ours, with
        condition, threads      ours
        same, same_peer         time of the fastest peer in the same run over ours
        best, best_peer, best_condition     that of the fastest peer in any condition, alone or with all threads too
        tuned       as `same`, in the run with a tuned malloc, where there was one
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from minikd.bench.cases import KERNELS
from minikd.bench.contenders import CONTENDERS, PEERS, Contender
from minikd.bench.worker import CONDITIONS
from minikd.report.table import NOTHING, Table

Report = Mapping[str, Any]
SHORT = {"one": "1 thread", "all": "all threads", "alone": "alone", "tuned": "tuned malloc"}


# --- ratios ---


def ratios(cases: Sequence[Report]) -> list[dict[str, Any]]:
    """Our times, of the first condition measured, against each kernel's and shape's fastest peer."""
    found = []
    for main in main_cases(cases):
        related = [c for c in cases if (c["kernel"], c["shape"]) == (main["kernel"], main["shape"])]
        same = fastest_peer([main])
        best = fastest_peer(c for c in related if not CONDITIONS[c["condition"]].tuned)
        tuned = [c for c in related if CONDITIONS[c["condition"]].tuned]
        for key, row in main["contenders"].items():
            if not CONTENDERS[key].ours or not ranked(row) or same is None or best is None:
                continue
            entry = {name: main[name] for name in ("kernel", "shape", "condition", "threads")} | {"contender": key}
            entry |= {"same": same[0] / row["median_ns"], "same_peer": same[1]}
            entry |= {"best": best[0] / row["median_ns"], "best_peer": best[1], "best_condition": best[2]}
            keeping = next(filter(None, (ratio_in(case, key) for case in tuned)), None)
            found.append(entry | ({"tuned": keeping} if keeping else {}))
    return found


def ratio_in(case: Report, key: str) -> float | None:
    """Time of the case's fastest peer over that of this contender of ours."""
    row, best = case["contenders"].get(key, {}), fastest_peer([case])
    if best is None or not CONTENDERS[key].ours or not ranked(row):
        return None
    return float(best[0] / row["median_ns"])


def main_cases(cases: Sequence[Report]) -> list[Report]:
    """One case for each kernel and shape: that of the first condition in which ours took part."""
    chosen: dict[tuple[Any, ...], Report] = {}
    for condition in CONDITIONS:
        for case in cases:
            if case["condition"] == condition and any(CONTENDERS[key].ours for key in case["contenders"]):
                chosen.setdefault((case["kernel"], *case["shape"]), case)
    kernels = list(KERNELS)

    def place(case: Report) -> tuple[int, int]:
        return kernels.index(case["kernel"]), KERNELS[case["kernel"]].shapes.index(tuple(case["shape"]))

    return sorted(chosen.values(), key=place)


def ranked(row: Mapping[str, Any]) -> bool:
    """Whether a contender was measured and computed what it should."""
    return "median_ns" in row and not row["wrong"]


def fastest(cases: Iterable[Report], keys: Collection[str]) -> tuple[float, str, str] | None:
    """Median nanoseconds, name and condition of the fastest of these contenders that is not wrong."""
    times = [
        (row["median_ns"], key, case["condition"])
        for case in cases
        for key, row in case["contenders"].items()
        if key in keys and ranked(row)
    ]
    return min(times, default=None)


def fastest_peer(cases: Iterable[Report]) -> tuple[float, str, str] | None:
    """Median nanoseconds, name and condition of the fastest peer that is not wrong."""
    return fastest(cases, PEERS)


# --- on the terminal ---

COLUMNS = ("", "median µs", "min", "IQR", "ns/elem", "GB/s", "of limit", "ratio", "error")
NOTE = (
    "of limit: share of the highest bandwidth that NumPy reaches with buffers of this size in the same rounds. "
    "ratio: time of the fastest peer in the same rounds over ours. "
    "error: against float64, relative to the largest entry of a row. Nobody reads the loss back into a Python number."
)


def tables(report: Report) -> Iterator[Table]:
    """One table for each kernel; in it a block for each shape and condition, the fastest first."""
    blocks: dict[tuple[Any, ...], list[Report]] = {}
    for case in report["cases"]:
        blocks.setdefault((case["kernel"], *case["shape"], case["condition"]), []).append(case)
    kernels = list(dict.fromkeys(case["kernel"] for case in report["cases"]))
    for kernel in kernels:
        rows: list[tuple[str, ...]] = []
        for place in sorted((place for place in blocks if place[0] == kernel), key=_of_shape):
            rows += _block(blocks[place])
        yield Table(COLUMNS, "<>>>>>>><", rows, NOTE if kernel == kernels[-1] else "")


def _of_shape(place: tuple[Any, ...]) -> tuple[int, int]:
    kernel, *shape, condition = place
    return KERNELS[kernel].shapes.index(tuple(shape)), list(CONDITIONS).index(condition)


def _block(cases: Sequence[Report]) -> list[tuple[str, ...]]:
    """A heading and a row for each contender of one kernel, shape and condition."""
    first = cases[0]
    words = [by(first["shape"]), CONDITIONS[first["condition"]].label]
    words += [f"limit {max(first['limit'].values()) / 1e9:.1f} GB/s"] if first["limit"] else []
    every = [
        (row.get("median_ns", float("inf")), key, row, case)
        for case in cases
        for key, row in case["contenders"].items()
    ]
    rows = [_row(key, row, ratio_in(case, key)) for _, key, row, case in sorted(every, key=lambda one: one[0])]
    return [(f"{first['kernel']}, {' · '.join(words)}",), *rows]


def _row(key: str, row: Mapping[str, Any], ratio: float | None) -> tuple[str, ...]:
    label = CONTENDERS[key].label
    if "failed" in row:
        return (label, *[NOTHING] * 7, row["failed"])
    return (
        label,
        micro(row["median_ns"]),
        micro(row["min_ns"]),
        micro(row["iqr_ns"]),
        f"{row['ns_per_element']:.3g}",
        f"{row['bytes_per_second'] / 1e9:.3g}",
        NOTHING if row["share"] is None else f"{100 * row['share']:.0f} %",
        NOTHING if ratio is None else f"{ratio:.1f}",
        ("WRONG: " if row["wrong"] else "") + errors_text(row["errors"]),
    )


def errors_text(errors: Mapping[str, float | None]) -> str:
    """The largest error of the outputs, and beside it that of the loss where there is one."""
    numbers = {name: math.inf if e is None else e for name, e in errors.items()}
    loss = f", loss {power(numbers.pop('loss'))}" if "loss" in numbers else ""
    return power(max(numbers.values())) + loss


def power(error: float) -> str:
    """An error as a power of ten with one digit before it."""
    return f"{error:.0e}" if math.isfinite(error) else "not finite"


def micro(ns: float) -> str:
    """Nanoseconds as microseconds with three digits."""
    us = ns / 1000
    return f"{us:,.0f}" if us >= 100 else f"{us:.3g}"


def by(shape: Sequence[int]) -> str:
    """A shape for people: 128 × 10, or 1,276,810 parameters."""
    return " × ".join(map(str, shape)) if len(shape) > 1 else f"{shape[0]:,} parameters"


# --- in the README ---


def markdown(report: Report, kernels: Sequence[str] = ()) -> str:
    """The machine, how it was measured, and the tables of each kernel (or of those named)."""
    mains = main_cases(report["cases"])
    parts = [machine_text(report, memory=_memory_text(mains))]
    for kernel in dict.fromkeys(case["kernel"] for case in mains):
        if not kernels or kernel in kernels:
            cases = [case for case in mains if case["kernel"] == kernel]
            parts += [f"### {kernel}", times_table(cases), ratios_table(report, cases)]
    return "\n\n".join(parts)


def _memory_text(cases: Sequence[Report]) -> str:
    """The bandwidth of the memory, of the first case that has it."""
    memory: dict[str, Any] = next((case["memory"] for case in cases if case["memory"]), {})
    speeds = ", ".join(f"{pattern} {speed / 1e9:.1f}" for pattern, speed in memory.items())
    return f"Memory in GB/s: {speeds}." if speeds else ""


def machine_text(report: Report, contenders: Mapping[str, Contender] = CONTENDERS, memory: str = "") -> str:
    """Processor, BLAS, versions, conditions and what else was said of the machine, in a paragraph."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    level = f", C kernels for {machine['cpu_level']}" if machine["cpu_level"] else ""
    conditions = "; ".join(CONDITIONS[c].label for c in dict.fromkeys(case["condition"] for case in report["cases"]))
    sentences = [
        f"{machine['cpu']}, {machine['cores']} cores{level}; {machine['system']}, Python {machine['python']}.",
        f"BLAS: {machine['blas']}. {versions}.",
        memory,
        f"Conditions: {conditions}." if conditions else "",
        *(f"Not measured: {contenders[key].label} ({reason})." for key, reason in report["missing"].items()),
    ]
    return " ".join(filter(None, sentences))


def times_table(cases: Sequence[Report]) -> str:
    """Rows are shapes, columns contenders; a cell is median microseconds with the largest error behind it."""
    keys = [key for key in CONTENDERS if any(key in case["contenders"] for case in cases)]
    heads = ["µs (error)", *(CONTENDERS[key].label for key in keys)]
    rows = [[by(case["shape"]), *(time_cell(case["contenders"].get(key)) for key in keys)] for case in cases]
    return markdown_table(heads, rows)


def ratios_table(report: Report, cases: Sequence[Report]) -> str:
    """Rows are shapes: how many times faster than the fastest peer, and how near to the limit of the memory."""
    of_kernel = [r for r in report["ratios"] if r["kernel"] == cases[0]["kernel"]]
    own = [key for key in CONTENDERS if any(r["contender"] == key for r in of_kernel)]
    tuned = any("tuned" in r for r in of_kernel)
    heads = ["ratio", *(CONTENDERS[key].label for key in own), "peer in the same run", "peer in its best condition"]
    heads += [f"{CONTENDERS[own[0]].label}, malloc tuned"] if tuned else []
    heads += ["GB/s", "of limit", "× copy floor"]
    rows = []
    for case in cases:
        here = {r["contender"]: r for r in of_kernel if r["shape"] == case["shape"]}
        first = next(iter(here.values()), None)
        cells = [by(case["shape"])]
        cells += [f"{here[key]['same']:.1f} · {here[key]['best']:.1f}" if key in here else NOTHING for key in own]
        cells += _peers_cells(first) + ([_number(first, "tuned")] if tuned else [])
        rows.append(cells + _limit_cells(case["contenders"].get(first["contender"]) if first else None))
    return markdown_table(heads, rows)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column stands to the left and all others to the right."""
    return "\n".join(map(_line, [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def time_cell(row: Mapping[str, Any] | None) -> str:
    """Median microseconds with the largest error behind them, or why there are none."""
    if row is None:
        return NOTHING
    if "failed" in row:
        return "failed"
    if row["wrong"]:
        return "wrong"
    worst = max(e for e in row["errors"].values() if e is not None)
    return f"{micro(row['median_ns'])} ({worst:.0e})"


def _peers_cells(ratio: Mapping[str, Any] | None) -> list[str]:
    if ratio is None:
        return [NOTHING, NOTHING]
    best = f"{CONTENDERS[ratio['best_peer']].label}, {SHORT[ratio['best_condition']]}"
    return [CONTENDERS[ratio["same_peer"]].label, best]


def _number(ratio: Mapping[str, Any] | None, name: str) -> str:
    return f"{ratio[name]:.1f}" if ratio and name in ratio else NOTHING


def _limit_cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or row["share"] is None:
        return [NOTHING] * 3
    return [f"{row['bytes_per_second'] / 1e9:.1f}", f"{100 * row['share']:.0f} %", f"{row['over_floor']:.2f}"]
