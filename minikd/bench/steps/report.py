"""What is made of the samples of whole steps.

The report is one JSON object with machine, missing and settings as `minikd.bench.report` has them, and

    cases       one for each step and condition (and contender, where it runs alone), with
        step, condition, threads
        products_ns     median of the step's bare matrix products, in the same rounds; null where contenders run alone
        contenders      name → median_ns, min_ns, iqr_ns (of one step), samples, calls_per_sample,
            over_products (time over products_ns, or null), errors (output → error relative to its largest entry),
            wrong; or failed, with the reason
    ratios      one for each step and contender of ours, with
        condition                   ours
        same, same_peer             time of the fastest peer in the same run over ours
        best, best_peer, best_condition, own_condition
                                    the same, each in its best condition: alone and unpinned, or in a common run
        over_products               time over that of the bare matrix products in the same run

A contender that hands its loss back after each step is compared with peers that do so too; one that runs an epoch in a
call is compared with all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minikd.bench.report import (
    SHORT,
    Report,
    errors_text,
    fastest,
    machine_text,
    markdown_table,
    micro,
    ranked,
    time_cell,
)
from minikd.bench.steps.cases import STEPS
from minikd.bench.steps.contenders import CONTENDERS, EPOCHS, PEERS
from minikd.bench.worker import CONDITIONS
from minikd.report.table import NOTHING, Table

COLUMNS = ("", "median µs", "min", "IQR", "× products", "error")
NOTE = (
    "One step. × products: time over that of the step's matrix products alone, in the same rounds. error: of the first "
    "three losses (or rows) against float64. Everybody reads the loss back after each step, or after each epoch."
)


def main_cases(cases: Sequence[Report]) -> list[Report]:
    """One case for each step: that of the first condition in which all took turns."""
    chosen: dict[str, Report] = {}
    for condition in CONDITIONS:
        for case in cases:
            if case["condition"] == condition and not CONDITIONS[condition].alone:
                chosen.setdefault(case["step"], case)
    return [chosen[name] for name in STEPS if name in chosen]


def ratios(cases: Sequence[Report]) -> list[dict[str, Any]]:
    """Our times against each step's fastest peer of the same form, in the same run and each in its best condition."""
    found = []
    for main in main_cases(cases):
        related = [case for case in cases if case["step"] == main["step"]]
        for key, row in main["contenders"].items():
            peers = PEERS if key in EPOCHS else [peer for peer in PEERS if peer not in EPOCHS]
            same, best, own = fastest([main], peers), fastest(related, peers), fastest(related, [key])
            if not CONTENDERS[key].ours or not ranked(row) or same is None or best is None or own is None:
                continue
            entry = {"step": main["step"], "contender": key, "condition": main["condition"]}
            entry |= {"same": same[0] / row["median_ns"], "same_peer": same[1]}
            entry |= {"best": best[0] / own[0], "best_peer": best[1], "best_condition": best[2]}
            found.append(entry | {"own_condition": own[2], "over_products": row["over_products"]})
    return found


# --- on the terminal ---


def tables(report: Report) -> Iterator[Table]:
    """One table; in it a block for each step and condition, the fastest first."""
    blocks: dict[tuple[str, str], dict[str, Any]] = {}
    for case in report["cases"]:
        blocks.setdefault((case["step"], case["condition"]), {}).update(case["contenders"])
    rows: list[tuple[str, ...]] = []
    for (name, condition), contenders in sorted(blocks.items(), key=lambda block: place(*block[0])):
        rows.append((f"{STEPS[name].label} · {CONDITIONS[condition].label}",))
        by_time = sorted(contenders.items(), key=lambda one: one[1].get("median_ns", float("inf")))
        rows += [_row(*one) for one in by_time]
    yield Table(COLUMNS, "<>>>><", rows, NOTE)


def place(step: str, condition: str) -> tuple[int, int]:
    """Where a step in a condition stands among the others."""
    return list(STEPS).index(step), list(CONDITIONS).index(condition)


def _row(key: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (CONTENDERS[key].label, *[NOTHING] * 4, row["failed"])
    times = [micro(row[name]) for name in ("median_ns", "min_ns", "iqr_ns")]
    error = ("WRONG: " if row["wrong"] else "") + errors_text({"": max(row["errors"].values(), key=_worst)})
    return (CONTENDERS[key].label, *times, _over(row["over_products"]), error)


def _over(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"{ratio:.2f}"


def _worst(error: float | None) -> float:
    return float("inf") if error is None else error


# --- in the README ---


def markdown(report: Report, names: Sequence[str] = ()) -> str:
    """The machine and the tables; with the name "summary", the ratios alone, without those of the eager form."""
    own = [key for key, contender in CONTENDERS.items() if contender.ours]
    if "summary" in names:
        return "\n\n".join([machine_text(report, CONTENDERS), ratios_table(report, [k for k in own if k != "eager"])])
    times = times_table(main_cases(report["cases"]), "one step, µs (error)")
    parts = machine_text(report, CONTENDERS), times, alone_table(report), ratios_table(report, own)
    return "\n\n".join(filter(None, parts))


def times_table(cases: Sequence[Report], head: str) -> str:
    """Rows are contenders, columns steps; a cell is median microseconds with the error behind it."""
    rows = [
        [contender.label, *(time_cell(case["contenders"].get(key)) for case in cases)]
        for key, contender in CONTENDERS.items()
        if any(key in case["contenders"] for case in cases)
    ]
    if any(case["products_ns"] for case in cases):
        rows.append(["matrix products alone", *(micro(case["products_ns"]) for case in cases)])
    return markdown_table([head, *(STEPS[case["step"]].label for case in cases)], rows)


def alone_table(report: Report) -> str:
    """The same of those that ran alone, or nothing if nobody did."""
    merged: dict[str, dict[str, Any]] = {}
    for case in report["cases"]:
        if CONDITIONS[case["condition"]].alone:
            whole = merged.setdefault(case["step"], {"step": case["step"], "contenders": {}, "products_ns": None})
            whole["contenders"] |= case["contenders"]
    cases = [merged[name] for name in STEPS if name in merged]
    return times_table(cases, "each alone, unpinned, µs (error)") if cases else ""


def ratios_table(report: Report, own: Sequence[str]) -> str:
    """Rows are steps: how many times faster than the fastest peer, and how near to the bare matrix products."""
    own = [key for key in own if any(ratio["contender"] == key for ratio in report["ratios"])]
    heads = ["time of the fastest peer / ours"]
    for key in own:
        heads += [CONTENDERS[key].label, "peer in the same run", "in its best condition", "× products"]
    rows = []
    for case in main_cases(report["cases"]):
        here = {ratio["contender"]: ratio for ratio in report["ratios"] if ratio["step"] == case["step"]}
        rows.append([STEPS[case["step"]].label, *(cell for key in own for cell in _ratio_cells(here.get(key)))])
    return markdown_table(heads, rows)


def _ratio_cells(ratio: Mapping[str, Any] | None) -> list[str]:
    if ratio is None:
        return [NOTHING] * 4
    best = f"{CONTENDERS[ratio['best_peer']].label}, {SHORT[ratio['best_condition']]}"
    ratios = f"{ratio['same']:.2f} · {ratio['best']:.2f}"
    return [ratios, CONTENDERS[ratio["same_peer"]].label, best, f"{ratio['over_products']:.2f}"]
