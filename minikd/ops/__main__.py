"""``python -m minikd.ops`` prints the table of operations as the page docs/operations.md."""

from minikd.ops import OPS

PREAMBLE = """# Operations

Made from the table in `minikd/ops` by `python -m minikd.ops > docs/operations.md`.

Inputs stand before the arrow, outputs behind it, values saved for backward behind the semicolon. `?` marks a buffer
that may be missing, `!` one that is read and written. Without a kind a buffer is float32 or float64, as the operation
runs; `index` is int64, `scalar` one float64 and `counter` one int64, read at each call. Every kernel takes its buffers
in the order outputs, saved values, inputs; its vjp takes the inputs' gradients and the outputs' gradients before them.
"""


def page() -> str:
    """The whole page: each operation with its formula, signature, attributes and source."""
    parts = [PREAMBLE]
    for op in OPS.values():
        lines = [f"## {op.name}", "", f"    {op.name}: {op.signature}", ""]
        lines += [f"- {part.strip()}" for part in op.formula.split(";  ")]
        if op.attrs:
            lines += ["- attributes: " + ", ".join(f"{k} = {v!r}" for k, v in op.attrs.items())]
        lines += [f"- gradient of: {', '.join(op.wrt)}" if op.vjp else "- not differentiable, on purpose"]
        lines += [f"- source: {op.source}"] if op.source else []
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
