"""The command `minikd`: distil a teacher into a student, and say what came of it.

Each subcommand is one entry of COMMANDS. The options of `minikd distill` are the fields of `Settings`, one each; what
an option does not say is taken from the TOML file of --config, and what that leaves out is the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import minikd
from minikd import bench, exporting, labelling
from minikd.data.sources import NAMED
from minikd.distillation import DistillResult, Experiment
from minikd.errors import ArgumentError, MinikdError
from minikd.kernels import current_backend, matmul_precision
from minikd.kernels.precision import FULL
from minikd.objectives import PRESETS
from minikd.report import RunFolder, Table, Watcher, environment_table, from_toml, results_table, show, verdicts, watch
from minikd.report.config import LAYERS, OUT, TEACHER, setting_types
from minikd.report.folder import CHECKPOINTS, CONFIG
from minikd.report.progress import training_in_words
from minikd.report.table import show_sentence
from minikd.report.weighing import show_weighings
from minikd.settings import SCHEDULED, Settings, sizes_from_text
from minikd.weighing import warnings_of, weigh_first_epoch

OK, FAILED, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141  # exit codes; the last two are 128 + the signal, as in a shell


# --- settings as texts on the command line ---

MOST_SEEDS = 1000


def read_layers(text: str) -> tuple[int, ...]:
    """Layer sizes from "256-256" or "256,256"; "none" is no hidden layer."""
    try:
        return sizes_from_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_teacher(text: str) -> tuple[int, ...] | str:
    """Layer sizes where the text is such, else the name of a teacher."""
    try:
        return sizes_from_text(text)
    except ValueError:
        return text


def read_seeds(text: str) -> tuple[int, ...]:
    """Seeds from a list of seeds and ranges: "0-4", "0,1,2", "0-2,7"; a single number is that one seed."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"must be seeds such as 0-4 or 0,1,7, {MOST_SEEDS} at most; got {text!r}")
        seeds += range(first, last + 1)
    return tuple(seeds)


def _read_flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false; got {text!r}")
    return text.lower() == "true"


def _read_number(kind: Callable[[str], Any], words: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {words}; got {text!r}") from None

    return read


def layers_in_words(sizes: Sequence[int]) -> str:
    """The text that `read_layers` reads."""
    return "-".join(map(str, sizes)) or "none"


def seeds_in_words(seeds: Sequence[int]) -> str:
    """The text that `read_seeds` reads, neighbours as ranges."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


class Text(NamedTuple):
    """How a setting stands on the command line: its placeholder, how it is read and how it is shown."""

    metavar: str
    read: Callable[[str], Any]
    show: Callable[[Any], str]


TEXTS: dict[Any, Text] = {
    str: Text("TEXT", str, str),
    int: Text("N", _read_number(int, "a whole number"), str),
    float: Text("X", _read_number(float, "a number"), lambda value: f"{value:g}"),
    bool: Text("true|false", _read_flag, lambda value: str(value).lower()),
    LAYERS: Text("SIZES", read_layers, layers_in_words),
    TEACHER: Text("TEACHER", read_teacher, lambda value: value if isinstance(value, str) else layers_in_words(value)),
}
# Settings whose text is not that of their type, and what their help says beyond the setting's own.
SPECIAL = {"seeds": Text("SEEDS", read_seeds, seeds_in_words)}
MORE_HELP = {
    "teacher": "layers as 256-256 or 256,256, none for no hidden layer, or all of them with features and classes: "
    "64-256-256-10; a file: .onnx, .safetensors, .npz, .npy or .csv, the folder of a store, with --allow-pickle also "
    ".joblib and .pkl; rf, gbt and mlp are trained by scikit-learn",
    "preset": f"{', '.join(PRESETS)}; with other values: --objective \"preset('keras', alpha=0.2)\"",
    "student": "layers written as the teacher's",
    "seeds": "a list of seeds and ranges: 0-4, or 0,1,7; a single number is that one seed",
}


def option_name(setting: str) -> str:
    """The option of a setting: --batch-size of batch_size."""
    return "--" + setting.replace("_", "-")


# --- minikd distill ---


def distill_options(parser: argparse.ArgumentParser) -> None:
    """One option for each setting, and where the results go."""
    output = parser.add_argument_group("configuration and output")
    output.add_argument("--config", metavar="FILE.toml", help="settings from a file, named as the options are, with _")
    output.add_argument("--out", metavar="FOLDER", default="", help="for the results (default: runs/DATA-DATE-TIME)")
    output.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in the folder")
    output.add_argument("--resume", metavar="FOLDER", help="go on with a run that was stopped, with its own settings")
    output.add_argument("--allow-pickle", action="store_true", help="read a pickled teacher, which runs its code")
    output.add_argument("--tensorboard", action="store_true", help="also write the history as TensorBoard events")
    output.add_argument("--quiet", action="store_true", help="no progress and no table, the verdict alone")
    setting_options(parser, "--config")


def setting_options(parser: argparse.ArgumentParser, file: str) -> None:
    """One option for each setting; `file` is how the command calls the file that they win over."""
    group = parser.add_argument_group("settings", f"An option wins over the file of {file}, and that over the default.")
    types = setting_types()
    for field in dataclasses.fields(Settings):
        text = SPECIAL.get(field.name, TEXTS[types[field.name]])
        default = text.show(field.default)
        words = [field.metadata["help"], MORE_HELP.get(field.name, "")]
        help_text = "; ".join(filter(None, words)) + (f" (default: {default})" if default else "")
        group.add_argument(
            option_name(field.name),
            metavar=text.metavar,
            type=text.read,
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
        )


def read_settings(options: argparse.Namespace) -> tuple[Settings, dict[str, str]]:
    """The settings of a command line and its --config, and where each came from: an option or a key of the file.

    The file's key `out` takes the place of an option --out that was not given.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    from_file = from_toml(options.config) if options.config else {}
    options.out = options.out or from_file.pop(OUT, "")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    origins = {name: f"{option_name(name)} (its default)" for name in names}
    if os.environ.get("MINIKD_BACKEND"):
        origins["backend"] = "MINIKD_BACKEND"
    origins |= {name: f"{options.config}: {name}" for name in from_file}
    origins |= {name: option_name(name) for name in given}
    settings = Settings(**{**from_file, **given})
    data = None if settings.data.lower() in NAMED else settings.data
    paths: dict[str, Any] = {"data": data, "teacher": settings.teacher}
    for name, path in paths.items():
        if isinstance(path, str) and path and Path(path).exists():
            paths[name] = str(Path(path).absolute())  # for config.toml's sake
    return dataclasses.replace(settings, **{name: path for name, path in paths.items() if path is not None}), origins


def take_up(options: argparse.Namespace) -> RunFolder:
    """The folder of --resume, whose config.toml takes the place of all other settings.

    Raises
    ------
    ArgumentError : settings were given beside it.  OutputError : there is no run in the folder, or a complete one.
    """
    beside = [field.name for field in dataclasses.fields(Settings) if hasattr(options, field.name)]
    beside += [name for name in ("config", "out", "overwrite") if getattr(options, name)]
    if beside:
        fix = "A run goes on with the settings that it began with, which are in its config.toml."
        expected = "left out beside --resume"
        raise ArgumentError("minikd distill", option_name(beside[0]), expected=expected, got="both", fix=fix)
    folder = RunFolder(options.resume)
    folder.resume()
    options.config, options.out = str(folder.path / CONFIG), options.resume
    return folder


# Where an error is raised, and the argument that it names → the setting that it is about.
SETTING_OF = {
    ("data.load", "source"): "data",
    ("use_backend", "name"): "backend",
    ("matmul_precision", "precision"): "precision",
    ("as_teacher", "x"): "teacher",
    ("distill", "teacher"): "teacher",
}


@contextmanager
def naming(origins: dict[str, str], command: str = "minikd distill") -> Iterator[None]:
    """An error about a setting names the option or the key of the file that it came from."""
    try:
        yield
    except MinikdError as error:
        setting = error.argument if error.where == "settings" else SETTING_OF.get((error.where, error.argument), "")
        if setting not in origins:
            raise
        described = {"expected": error.expected, "got": error.got, "fix": error.fix}
        raise type(error)(command, origins[setting], **described) from error


def distill(options: argparse.Namespace) -> int:
    """Train, write the folder, and print the table and the verdict."""
    with ExitStack() as held:  # which lets the folder go
        resumed = held.enter_context(take_up(options)) if options.resume else None
        settings, origins = read_settings(options)
        fresh = RunFolder(options.out, options.overwrite) if options.out else RunFolder.fresh(settings.data)
        return distill_into(resumed or held.enter_context(fresh), settings, origins, options)


def distill_into(folder: RunFolder, settings: Settings, origins: dict[str, str], options: argparse.Namespace) -> int:
    """Do so in this folder, from where it was stopped if it was taken up; returns the exit code."""
    began = time.monotonic()
    folder.tensorboard = options.tensorboard
    watcher = watch(sys.stderr, options.quiet)
    with naming(origins):
        experiment = Experiment(
            settings,
            allow_pickle=options.allow_pickle,
            on_progress=watcher,
            on_model=lambda: folder.write_results(experiment.result()),
        )
        if not options.resume:
            folder.begin(experiment.settings)
        experiment.keep_in(folder.path / CHECKPOINTS)
    introduce(experiment, options.quiet)
    interrupted = False
    try:
        with watcher:
            experiment.run()
    except KeyboardInterrupt:
        interrupted = True
    result = experiment.result()
    folder.write_results(result)
    missing = draw(folder, result)
    if result.complete:
        experiment.forget_checkpoints()
    if interrupted:
        print(f"\n{what_is_left(result, watcher, folder)}", file=sys.stderr, flush=True)
    conclude(result, folder, missing, options.quiet, time.monotonic() - began)
    return INTERRUPTED if interrupted else OK


def draw(folder: RunFolder, result: DistillResult) -> str:
    """Draw the pictures; returns why there are none, or an empty text."""
    try:
        folder.write_pictures(result)
    except ImportError:
        return "Pictures were left out: pip install 'minikd[cli]' brings matplotlib, which draws them."
    return ""


def introduce(experiment: Experiment, quiet: bool) -> None:
    """Say what is about to be trained."""
    settings, data = experiment.settings, experiment.dataset
    if quiet:
        return
    done = f", {experiment.taken_up} of them done before" if experiment.taken_up else ""
    rows = ", ".join(f"{part} {count:,}" for part, count in data.sizes.items())
    large, small = experiment.parameters
    ratio = f", {large / small:.0f} times fewer" if large and large >= 2 * small else ""
    between = [("between", f"assistants {settings.assistants}")] if settings.assistants else []
    between += [("between", f"{settings.generations} generations of students")] if settings.generations > 1 else []
    schedules = [f"{name.replace('_', ' ')} {getattr(settings, name)}" for name in SCHEDULED if getattr(settings, name)]
    weights = f"hard weight {settings.hard_weight:g}, soft weight {settings.soft_weight:g}"
    lines = [
        ("data", f"{data.name}: {rows}; {data.features:,} features, {data.classes:,} classes"),
        ("teacher", experiment.teacher_in_words()),
        *between,
        ("student", f"{layers_in_words(experiment.student_sizes)}, {small:,} parameters{ratio}"),
        (
            "loss",
            str(experiment.objective)
            if settings.objective or settings.preset
            else ", ".join([f"T = {settings.temperature:g}", weights, *schedules]),
        ),
        ("run", f"{experiment.trainings} trainings{done}, {_seeds(settings.seeds)}, backend {_backend_in_words()}"),
        ("steps", f"{settings.epochs} epochs in batches of {settings.batch_size}, {settings.optimizer}"),
    ]
    show(Table(("", ""), "<<", lines), sys.stdout)
    print(flush=True)


def _backend_in_words() -> str:
    """The backend in use, with the precision of its products where that is not float32."""
    precision = matmul_precision().name
    return current_backend() + (f" with products in {precision}" if precision != FULL else "")


def what_is_left(result: DistillResult, watcher: Watcher, folder: RunFolder) -> str:
    """After Ctrl-C: which seeds are complete, which are not, where the training was, and where the files are."""
    complete, wanted = result.report["seeds"], result.report["requested_seeds"]
    left = [seed for seed in wanted if seed not in complete]
    parts = ["minikd distill: interrupted."]
    parts.append(f"Complete: {_seeds(complete)}." if complete else "No seed is complete, so there are no figures.")
    if left:
        last = watcher.last
        where = f", stopped at {training_in_words(last)}, epoch {last.epoch} of {last.epochs}" if last else ""
        parts.append(f"To do: {_seeds(left)}{where}.")
    parts.append(f"{'What is complete' if complete else 'The history so far'} is in {folder.path}.")
    return " ".join([*parts, f"Go on with: minikd distill --resume {shlex.quote(str(folder.path))}"])


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {seeds_in_words(seeds)}"


def conclude(result: DistillResult, folder: RunFolder, missing: str, quiet: bool, seconds: float) -> None:
    """Print the table, the verdict, the files, and what to do next."""
    out, complete = sys.stdout, bool(result.report["seeds"])
    if complete and not quiet:
        show(results_table(result.report), out)
        print(file=out)
    if complete:
        for kind, sentence in verdicts(result.report):
            show_sentence(kind, sentence, out)
    if quiet:
        print(f"Files are in {folder.path}", file=out)
        return
    print(f"\nFiles in {folder.path}:", file=out)
    show(Table(("", ""), "<<", folder.files()), out)
    if missing:
        print(f"\n{missing}", file=out)
    print(f"\nTotal time: {seconds:.1f} s. Everything can be changed: minikd distill --help", file=out)


# --- minikd explain ---


def explain_options(parser: argparse.ArgumentParser) -> None:
    """The settings, in a file or as options."""
    parser.usage = "minikd explain [CONFIG.toml] [options]"
    parser.set_defaults(out="")
    what = "settings, such as the config.toml of a run; without it those of minikd distill"
    parser.add_argument("config", metavar="CONFIG.toml", nargs="?", help=what)
    parser.add_argument("--allow-pickle", action="store_true", help="read a pickled teacher, which runs its code")
    parser.add_argument("--quiet", action="store_true", help="no progress and no table, the warnings alone")
    setting_options(parser, "CONFIG.toml")


def explain(options: argparse.Namespace) -> int:
    """Weigh the terms of the loss before the training of the first seed's student and after its first epoch."""
    settings, origins = read_settings(options)
    watcher = watch(sys.stderr, options.quiet)
    with naming(origins, "minikd explain"):
        settings.check()
        settings = dataclasses.replace(settings, seeds=settings.seeds[:1], labels=0, generations=1)
        experiment = Experiment(settings, allow_pickle=options.allow_pickle, on_progress=watcher)
    introduce(experiment, options.quiet)
    with watcher:
        training, teacher, teacher_accuracy, alone_accuracy = experiment.rehearse(settings.seeds[0])
    weighings, trouble = weigh_first_epoch(training)
    if not options.quiet:
        show_weighings(weighings, {teacher: teacher_accuracy, "student alone": alone_accuracy}, sys.stdout)
    known = {"teacher_accuracy": teacher_accuracy, "student_accuracy": alone_accuracy}
    found = [*trouble, *warnings_of(*weighings, **known, teacher=teacher)]
    for sentence in found:
        show_sentence("warning", f"Warning: {sentence}", sys.stdout)
    if not found:
        print("Nothing stands out.")
    return OK


# --- minikd info ---


def no_options(parser: argparse.ArgumentParser) -> None:
    """For a subcommand that has none."""


def info(options: argparse.Namespace) -> int:
    """Print what there is on this machine."""
    show(environment_table(), sys.stdout)
    return OK


# --- the command ---


class Command(NamedTuple):
    """One subcommand: what it does in a line, an example, its options, and the function that runs it."""

    summary: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "distill": Command(
        "train a teacher, distil it into a small student, and say whether that helped",
        """\
examples:
  minikd distill
  minikd distill --student 32 --temperature 4 --labels 50 --seeds 0-9 --out runs/mine
  minikd distill --data measurements.csv --label-column kind
  minikd distill --teacher model.onnx --student 32-16 --data measurements.csv
  minikd distill --teacher rf --objective "HardLabels(0.1) + ReverseKL(0.9, temperature=2)"
  minikd distill --config runs/mine/config.toml --out runs/again
  minikd distill --resume runs/mine""",
        distill_options,
        distill,
    ),
    "explain": Command(
        "weigh the terms of the loss against each other before a long training, and warn of usual mistakes",
        """\
examples:
  minikd explain runs/mine/config.toml
  minikd explain runs/mine/config.toml --temperature 20
  minikd explain --data measurements.csv --objective "HardLabels(0.1) + ReverseKL(0.9, temperature=2)"

It trains the teacher and, alone, the student of the first seed, and then a copy of the student for one epoch. Nothing
is written.""",
        explain_options,
        explain,
    ),
    "label": Command(
        "keep a teacher's logits of every row of a data set, for many distillations",
        labelling.EXAMPLE,
        labelling.add_arguments,
        labelling.run,
    ),
    "export": Command(
        "write a student as C, ONNX or safetensors, and prove that it computes the same",
        exporting.EXPORT_EXAMPLE,
        exporting.add_export_arguments,
        exporting.export,
    ),
    "size": Command(
        "say what a student takes of a device, before anything is exported",
        exporting.SIZE_EXAMPLE,
        exporting.add_size_arguments,
        exporting.size,
    ),
    "bench": Command(
        "time the kernels beside PyTorch, JAX, SciPy and NumPy",
        "examples:\n  minikd bench --quick\n  minikd bench --kernel softmax --peers jax numpy --threads 1",
        bench.add_arguments,
        bench.run,
    ),
    "info": Command(
        "show versions, backends, extras and data sets on this machine",
        "example:\n  minikd info",
        no_options,
        info,
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse's parser with an error that is one message and not the list of all options."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[\w-]+): ", r"\1 ", message)
        self.exit(FAILED, f"{self.prog}: error: {message}\n(Try {self.prog} --help.)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of `minikd` and all its subcommands."""
    form = argparse.RawDescriptionHelpFormatter
    example = "example:\n  minikd distill\n\nEach command has a --help of its own."
    about = "Knowledge distillation without a deep-learning framework."
    whole = Parser("minikd", description=about, epilog=example, formatter_class=form, allow_abbrev=False)
    version = f"minikd {minikd.__version__}"
    whole.add_argument("--version", action="version", version=version)
    commands = whole.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        summary = command.summary[0].upper() + command.summary[1:] + "."
        one = commands.add_parser(
            name,
            help=command.summary,
            usage=f"minikd {name} [options]",
            description=summary,
            epilog=command.example,
            formatter_class=form,
            allow_abbrev=False,
        )
        one.add_argument("--version", action="version", version=version)
        command.options(one)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 after an error, 130 after Ctrl-C.

    Errors are one message on stderr; MINIKD_DEBUG=1 shows where they came from.
    """
    name = "minikd"
    try:
        try:
            _survive_narrow_encodings()
            whole = parser()
            options = whole.parse_args(arguments)
            if options.command is None:
                whole.print_help()
                return OK
            name = f"minikd {options.command}"
            with _warnings_in_words(name), _sigterm_as_ctrl_c():
                return COMMANDS[options.command].run(options)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _let_go_of_stdout()
        return BROKEN_PIPE
    except (MinikdError, OSError, MemoryError) as error:
        if os.environ.get("MINIKD_DEBUG") == "1":
            raise
        print(f"{name}: error: {_in_words(error).removeprefix(f'{name}: ')}", file=sys.stderr)
        _let_go_of_stdout()
        return FAILED


def _in_words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"There is not enough memory ({error}). Use smaller layers or smaller batches."
    return str(error)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """A polite request to end keeps what is complete, as Ctrl-C does, even where a shell has switched that off."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: somebody else's program, and its own signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings_in_words(name: str) -> Iterator[None]:
    """Warnings as one line on stderr, without the line of code that gave them."""

    def tell(message: Warning | str, *details: Any, **more: Any) -> None:
        print(f"{name}: warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        yield


def _survive_narrow_encodings() -> None:
    """Where the terminal's encoding lacks a character, print ? and do not fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _let_go_of_stdout() -> None:
    """Point stdout to nowhere if it cannot be written, or Python complains of it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
