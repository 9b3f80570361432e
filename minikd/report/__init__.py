"""What a person gets to see of a run: the table and its verdict, progress, pictures, and the folder with the files."""

from minikd.report.config import from_toml, to_toml
from minikd.report.environment import environment_table
from minikd.report.folder import RunFolder
from minikd.report.pictures import learning_curves, soft_labels
from minikd.report.progress import Watcher, watch
from minikd.report.table import Table, plain, results_table, show, verdicts

__all__ = [
    "RunFolder",
    "Table",
    "Watcher",
    "environment_table",
    "from_toml",
    "learning_curves",
    "plain",
    "results_table",
    "show",
    "soft_labels",
    "to_toml",
    "verdicts",
    "watch",
]
