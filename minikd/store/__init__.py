"""A teacher's raw logits on disk, by sample number: `write` fills a store, `open` reads it."""

from minikd.store.reading import Store, open
from minikd.store.writing import Progress, write

__all__ = ["Progress", "Store", "open", "write"]
