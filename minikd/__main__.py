"""`python -m minikd` is the command `minikd`."""

from minikd.cli import main

raise SystemExit(main())
