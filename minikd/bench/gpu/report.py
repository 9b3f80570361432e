"""What is made of the samples on a GPU: ratios, tables on the terminal, and the text in a README.

The report is the one of minikd.bench.report, with other cases:

    cases       one for each kernel and shape, and each step, with
        name, shape, condition ("gpu"), gpu
        bytes       what the operation has to move, 12 for each element of a distillation loss; 0 of a step
        copy        bytes per second of a copy on the GPU in the same rounds
        contenders  name → median_ns, min_ns, iqr_ns, samples, calls_per_sample, ns_per_element, bytes_per_second,
            share (of `copy`), errors, wrong; or failed, with the reason
    ratios      one for each case and contender of ours: name, shape, contender, peer, and
        same        time of the fastest peer in the same rounds over ours
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minikd.bench.gpu.cases import GpuCase
from minikd.bench.gpu.contenders import CONTENDERS
from minikd.bench.report import errors_text, fastest, machine_text, markdown_table, micro, ranked
from minikd.report.table import NOTHING, Table

Report = Mapping[str, Any]
PEERS = tuple(key for key, contender in CONTENDERS.items() if not contender.ours)
COLUMNS = ("", "median µs", "min", "IQR", "GB/s", "of copy", "ratio", "error")
NOTE = (
    "of copy: share of the bandwidth of a copy on this GPU, in the same rounds. "
    "ratio: time of the fastest peer in the same rounds over ours. "
    "error: largest, relative to the largest entry of its row; loss: that of the loss."
)


def ratios(cases: Sequence[Report]) -> list[dict[str, Any]]:
    """Our times against the fastest peer of each case."""
    found = []
    for case in cases:
        peer = fastest([case], PEERS)
        for key, row in case["contenders"].items():
            if peer and CONTENDERS[key].ours and ranked(row):
                entry = {name: case[name] for name in ("name", "shape")}
                found.append(entry | {"contender": key, "same": peer[0] / row["median_ns"], "peer": peer[1]})
    return found


def _label(case: Report) -> str:
    return GpuCase(case["name"], tuple(case["shape"])).label


def tables(report: Report) -> Iterator[Table]:
    """One table of all cases, for the terminal."""
    rows: list[tuple[str, ...]] = []
    for case in report["cases"]:
        rows.append((f"{_label(case)} · {case['gpu']} · copy {case['copy'] / 1e9:,.0f} GB/s",))
        every = sorted(case["contenders"].items(), key=lambda pair: pair[1].get("median_ns", float("inf")))
        ours = {r["contender"]: r["same"] for r in ratios([case])}
        rows += [_row(key, row, ours.get(key)) for key, row in every]
    yield Table(COLUMNS, "<>>>>>><", rows, NOTE)


def _row(key: str, row: Report, ratio: float | None) -> tuple[str, ...]:
    label = CONTENDERS[key].label
    if "failed" in row:
        return (label, *[NOTHING] * 6, row["failed"])
    return (
        label,
        micro(row["median_ns"]),
        micro(row["min_ns"]),
        micro(row["iqr_ns"]),
        f"{row['bytes_per_second'] / 1e9:,.0f}" if "share" in row else NOTHING,
        f"{100 * row['share']:.0f} %" if "share" in row else NOTHING,
        NOTHING if ratio is None else f"{ratio:.2f}",
        ("WRONG: " if row["wrong"] else "") + errors_text(row["errors"]),
    )


def markdown(report: Report, names: Sequence[str] = ()) -> str:
    """The machine, and a table whose rows are the cases (or those named), for a README."""
    cases = [case for case in report["cases"] if not names or case["name"] in names]
    keys = [key for key in CONTENDERS if any(key in case["contenders"] for case in cases)]
    gpus = ", ".join(dict.fromkeys(f"{c['gpu']}, copy {c['copy'] / 1e9:,.0f} GB/s" for c in cases[-1:]))
    heads = ["µs (share of copy, error)", *(CONTENDERS[key].label for key in keys), "fastest peer / ours"]
    rows = [[_label(case), *(_cell(case["contenders"].get(key)) for key in keys), _best(case)] for case in cases]
    return "\n\n".join([machine_text(report, CONTENDERS, f"GPU: {gpus}."), markdown_table(heads, rows)])


def _cell(row: Report | None) -> str:
    if row is None or not ranked(row):
        return NOTHING if row is None else "wrong" if row.get("wrong") else "failed"
    share = f"{100 * row['share']:.0f} %, " if "share" in row else ""
    return f"{micro(row['median_ns'])} ({share}{errors_text(row['errors'])})"


def _best(case: Report) -> str:
    found = max(ratios([case]), key=lambda ratio: float(ratio["same"]), default=None)
    return f"{found['same']:.2f}, {CONTENDERS[found['peer']].label}" if found else NOTHING
